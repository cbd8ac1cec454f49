"""A classifier that was never trained as one: argmax_c log p(picture | c), by a class-conditional flow.

    python examples/classify.py MODEL PICTURE [PICTURE ...]
    python examples/classify.py                                   # draws a tiny model's own picture of each class

Prints the likeliest classes of each picture with their posterior probabilities under equal priors.
"""

from __future__ import annotations

import sys

import torch
from PIL import Image

from starflow import StarFlowPipeline
from starflow.conditioning import ClassLabels
from starflow.data.images import from_pil
from starflow.flow.config import TarFlowConfig
from starflow.flow.model import TarFlow
from starflow.latents import PixelLatents
from starflow.pipeline.config import PipelineConfig, default_size


def posterior(pipe: StarFlowPipeline, image: Image.Image, classes: tuple[str, ...]) -> list[tuple[float, str]]:
    """(probability, class), the likeliest first; the noise is the same for every class."""
    pictures = from_pil(image).expand(len(classes), -1, -1, -1).to(pipe.device)
    nats, _ = pipe.log_probs(pictures, classes, [0] * len(classes))
    return sorted(zip(nats.double().softmax(0).tolist(), classes, strict=True), reverse=True)


def untrained() -> StarFlowPipeline:
    """A model that knows nothing, to show the calls: its class vectors are random."""
    torch.manual_seed(0)
    flow = TarFlow(TarFlowConfig(3, 8, 4, 64, num_blocks=2, layers_per_block=1, num_classes=3))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    labels, pixels = ClassLabels(("circle", "square", "star")), PixelLatents()
    config = PipelineConfig("untrained", 8, 0.1, pixels.spec, labels.spec, cleaning="none")
    return StarFlowPipeline(flow, pixels, labels, config)


def main() -> None:
    pipe = StarFlowPipeline.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else untrained()
    if pipe.conditioner is None or pipe.conditioner.spec.kind != "class":
        raise SystemExit(f"'{pipe.config.name}' has no classes: name a class-conditional model")
    classes = pipe.conditioner.spec.names
    size = default_size(pipe.config, pipe.flow.config)
    if len(sys.argv) > 2:
        pictures = {name: Image.open(name).convert("RGB").resize(size) for name in sys.argv[2:]}
    else:
        pictures = {f"drawn: {name}": pipe(name, seed=0).images[0] for name in classes}
    for name, picture in pictures.items():
        best = ", ".join(f"{label} {100 * share:.1f} %" for share, label in posterior(pipe, picture, classes)[:3])
        print(f"{name}: {best}")


if __name__ == "__main__":
    main()
