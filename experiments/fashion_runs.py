"""Experiments on Fashion-MNIST share their runs: data encoded once, a trained pipeline a variant, features."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from starflow.data.images import to_float
from starflow.data.sets.small import read_fashion_mnist
from starflow.data.views import load_views, save_views
from starflow.evaluate import FeatureExtractor, extract_features
from starflow.evaluate.dataset import select_rows
from starflow.io import files
from starflow.nn.cpu import has_bfloat16
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.recipe import load_recipe
from starflow.train.run import read_log, start_run
from starflow.train.stages import Stages, train_flow


def prepare(folder: Path, recipe: Path, data: Path | None, train: int, heldout: int, device: torch.device) -> Path:
    """The folder with the views and latents of `train` and `heldout` pictures, both evenly over the set; made once."""
    shared = folder / "data"
    if not (shared / "views.safetensors").is_file():
        views = read_fashion_mnist(data)
        first = views.splits.index("heldout")
        rows = [row * first // train for row in range(train)]
        rows += [first + row * (len(views) - first) // heldout for row in range(heldout)]
        save_views(shared / "views.safetensors", select_rows(views, rows))
    Stages(start_run(load_recipe(recipe), shared, device, progress=False)).cache_latents()
    return shared


def trained(
    shared: Path, folder: Path, recipe: Path, overrides: dict[str, str], device: torch.device
) -> StarFlowPipeline:
    """The pipeline of one variant and seed: trained in `folder` from the shared latents, or resumed, or only loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("latents", "classes.json", "autoencoder"):
        if (shared / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to(os.path.relpath(shared / name, folder))
    model = folder / "model"
    if not (model / "config.json").is_file():
        train_flow(start_run(load_recipe(recipe, overrides | slow_bfloat16(device)), folder, device))
    return StarFlowPipeline.from_pretrained(model, device)


def slow_bfloat16(device: torch.device) -> dict[str, str]:
    """Float32 in place of a recipe's bfloat16 on processors that only emulate it: six times slower there."""
    return {} if has_bfloat16(device) else {"train.precision": "float32"}


def heldout_curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, held-out and training nats/dim of every evaluation of a run."""
    lines = read_log(folder / "log.jsonl")
    return [
        (line["step"], line["heldout_nats_per_dim"], line["heldout_train_nats_per_dim"])
        for line in lines
        if "heldout_nats_per_dim" in line
    ]


def update_seconds(folder: Path, batch: int) -> float:
    """Median seconds of an update of a run."""
    rates = sorted(
        line["pictures_per_second"] for line in read_log(folder / "log.jsonl") if "pictures_per_second" in line
    )
    return batch / float(rates[len(rates) // 2])


def reference_features(shared: Path, extractor: FeatureExtractor, count: int) -> Tensor:
    """Features (N, F) of at most `count` held-out pictures, computed once."""
    path = shared / f"features-{extractor.name}-{count}.safetensors"
    if not path.is_file():
        views = load_views(shared / "views.safetensors")
        images = views.images[views.splits.index("heldout") :][:count]
        features = extract_features(extractor, (to_float(some) for some in images.split(64))).features
        files.write_tensors(path, {"features": features})
    return files.read_tensors(path)["features"]
