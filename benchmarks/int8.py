"""Measure what 8-bit weights in the block next to the noise cost: nats a dimension, and changes of the pictures.

    python benchmarks/int8.py glyphs data/glyphs --output benchmarks/results/int8.json
    python benchmarks/document.py benchmarks/results/int8.json

Held-out pictures of a prepared set under their captions, with the noise of the model's training (one seed a picture);
and samples of the same seeds and prompts with and without rounding. Needs torchao (`pip install 'starflow[int8]'`).
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
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.solvers import relative_change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--pictures", type=int, default=64, help="held-out pictures")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    whole, rounded = (StarFlowPipeline.from_pretrained(options.model, int8=int8) for int8 in (False, True))
    images, captions = heldout(options.data, whole.config.image_size, options.pictures)
    exact, dimensions = whole.log_probs(images, captions, range(len(images)))
    change = (rounded.log_probs(images, captions, range(len(images)))[0] - exact) / dimensions
    prompts = captions[: options.samples]
    drawn = [pipeline(prompts, seed=0, solver="sequential", candidates=1).latents for pipeline in (whole, rounded)]
    apart = relative_change(drawn[0].flatten(2), drawn[1].flatten(2))
    pictures = [whole.autoencoder.decode(latents) for latents in drawn]
    error = (pictures[0] - pictures[1]).square().mean((1, 2, 3))
    decibels = 10 * (4 / error.clamp(min=1e-10)).log10()
    sizes = [weight_bytes(whole.flow.config, "float32", int8=int8) for int8 in (False, True)]
    found = {
        "command": f"python benchmarks/int8.py {options.model} {options.data}",
        "model": options.model,
        "int8": True,
        "pictures": len(images),
        "nats_per_dim": -float(exact.mean()) / dimensions,
        "nats_per_dim_change": -float(change.mean()),
        "nats_per_dim_change_largest": float(change.abs().max()),
        "samples": len(prompts),
        "guidance": whole.config.guidance,
        "latents_apart_mean": float(apart.mean()),
        "latents_apart_largest": float(apart.max()),
        "decibels_mean": float(decibels.mean()),
        "decibels_least": float(decibels.min()),
        "weight_bytes": sizes,
    }
    if options.output:
        write_json(options.output, found)
    print(json.dumps(found, indent=2))


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
