"""Which prompt describes a picture best? A flow answers by its exact likelihood, no classifier needed.

    python examples/which_prompt.py                                 # draws a picture first
    python examples/which_prompt.py apple.png "a red apple" "a lemon"

Prints one line a prompt, the best first: log p(picture | prompt) - log p(picture), in nats. The noise that the model
adds to a latent is the same for every prompt, so that differences are the prompts' alone.
"""

from __future__ import annotations

import sys

from PIL import Image

from starflow import StarFlowPipeline
from starflow.pipeline.config import default_size

PROMPTS = ["a red heart", "a lemon", "an evergreen tree", "a blue car", "a smiling face"]


def main() -> None:
    pipe = StarFlowPipeline.from_pretrained("glyphs")
    prompts = sys.argv[2:] or PROMPTS
    if len(sys.argv) > 1:
        size = default_size(pipe.config, pipe.flow.config)
        image = Image.open(sys.argv[1]).convert("RGB").resize(size)
    else:
        image = pipe(prompts[0], seed=0).images[0]
    plain = pipe.log_prob(image, "", seed=0).nats
    gains = {prompt: pipe.log_prob(image, prompt, seed=0).nats - plain for prompt in prompts}
    for prompt, gain in sorted(gains.items(), key=lambda item: -item[1]):
        print(f"{gain:+9.1f} nats  {prompt}")


if __name__ == "__main__":
    main()
