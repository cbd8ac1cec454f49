"""Measure what weights in fewer bits cost: nats a dimension in every format, and changes of the pictures.

    python benchmarks/weights.py glyphs data/glyphs --output benchmarks/results/weights.json
    python benchmarks/document.py benchmarks/results/weights.json

Held-out pictures of a prepared set under their captions, with the noise of the model's training (one seed a picture);
and samples of the same seeds and prompts with and without rounding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from starflow.data.images import from_pil, on_background, resize_crop
from starflow.data.sources.folder import read_folder
from starflow.flow.memory import weight_bytes
from starflow.io.files import write_json
from starflow.nn.quantize import WeightFormat
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.solvers import relative_change

FORMS: tuple[WeightFormat, ...] = ("bfloat16", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--pictures", type=int, default=64, help="held-out pictures")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    whole = StarFlowPipeline.from_pretrained(options.model)
    images, captions = heldout(options.data, whole.config.image_size, options.pictures)
    exact, dimensions = whole.log_probs(images, captions, range(len(images)))
    prompts = captions[: options.samples]
    drawn = latents_of(whole, prompts)
    found: dict[str, Any] = {
        "command": f"python benchmarks/weights.py {options.model} {options.data}",
        "model": options.model,
        "pictures": len(images),
        "nats_per_dim": -float(exact.mean()) / dimensions,
        "samples": len(prompts),
        "guidance": whole.config.guidance,
        "weight_bytes": weight_bytes(whole.flow.config, "float32"),
        "formats": {},
    }
    for form in FORMS:
        rounded = StarFlowPipeline.from_pretrained(options.model, weights=form)
        change = (rounded.log_probs(images, captions, range(len(images)))[0] - exact) / dimensions
        apart = relative_change(drawn.flatten(2), latents_of(rounded, prompts).flatten(2))
        found["formats"][form] = {
            "weight_bytes": weight_bytes(whole.flow.config, "float32", form),
            "nats_per_dim_change": -float(change.mean()),
            "standard_error": float(change.std()) / len(images) ** 0.5,
            "nats_per_dim_change_largest": float(change.abs().max()),
            "latents_apart_mean": float(apart.mean()),
            "latents_apart_largest": float(apart.max()),
        }
        print(form, json.dumps(found["formats"][form]), flush=True)
    if options.output:
        write_json(options.output, found)


def latents_of(pipeline: StarFlowPipeline, prompts: list[str]) -> Tensor:
    """Samples of one seed each, token by token."""
    return pipeline(prompts, seed=0, solver="sequential", candidates=1).latents


def heldout(folder: Path, side: int, count: int) -> tuple[Tensor, list[str]]:
    """The first held-out pictures of a set, (B, 3, side, side) in [-1, 1], and their captions."""
    records = [record for record in read_folder(folder) if record.split == "heldout"][:count]
    pictures = [from_pil(square(record.file, side)) for record in records]
    return torch.cat(pictures), [record.caption for record in records]


def square(path: Path, side: int) -> Any:
    with Image.open(path) as image:
        return resize_crop(on_background(image), side)


if __name__ == "__main__":
    main()
