"""A teacher and its latents, for the trainings of what stands beside a flow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from starflow.conditioning import ClassLabels
from starflow.data.latent_cache import CachedLatents, InMemoryLatents, LatentEntry
from starflow.data.sets.small import SHAPES
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.settings import TrainSettings

CLASSES = ("a", "b", "c")
SETTINGS = TrainSettings(
    precision="float32",
    steps=8,
    batch=8,
    lr=3e-3,
    warmup=2,
    average=0.9,
    evaluate_every=4,
    sample_every=100,
    checkpoint_every=3,
)


def make_teacher(
    initialise: Callable[[nn.Parameter], Any], classes: tuple[str, ...] = CLASSES, pixels: int = 8
) -> StarFlowPipeline:
    """A flow of two blocks on 4 channels of latents, whose autoencoder makes 2 x 2 pixels of each."""
    torch.manual_seed(0)
    sizes = SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1)
    latents, labels = SmallLatents(SmallAutoencoder(sizes), 0.3), ClassLabels(classes)
    config = STARFlowConfig(
        in_channels=4,
        img_size=pixels // sizes.factor,
        channels=16,
        num_blocks=2,
        layers_per_block=1,
        head_dim=16,
        txt_size=1,
        txt_dim=labels.spec.dim,
    )
    flow = STARFlow(config)
    for parameter in flow.parameters():
        initialise(parameter)
    flow.requires_grad_(False)
    return StarFlowPipeline(
        flow, latents, labels, PipelineConfig("teacher", pixels, 0.3, latents.spec, labels.spec, guidance=1.0)
    )


def random_weights(parameter: nn.Parameter) -> None:
    """No identity, and no block like another."""
    nn.init.normal_(parameter, std=0.2)


def make_linear(pipeline: StarFlowPipeline) -> None:
    """Turn a new flow into a linear one: every block has one mean and one deviation for each channel."""
    for number, block in enumerate(pipeline.flow.iter_blocks()):
        bias = torch.tensor([0.5, -0.5, 0.2, 0.1, 0.3, -0.4, 0.6, -0.1]) * (1 + number)
        block.proj_out.bias.copy_(bias)


def make_cache(side: int = 4, classes: int = 3) -> CachedLatents:
    """Latents of 64 training images and 16 held-out ones, without a posterior."""
    draw = torch.Generator().manual_seed(1)
    mean = torch.randn(80, 4, side, side, generator=draw).half()
    entries = [LatentEntry(f"p{i}", "", "heldout" if i % 5 == 0 else "train", i % classes) for i in range(80)]
    one_hot = torch.eye(classes + 1)[:, None].half()
    return cast(CachedLatents, InMemoryLatents(mean, None, one_hot[:-1], one_hot[-1], entries, {}))


def save_shapes_teacher(folder: Path) -> Path:
    """A random model of the shapes that a recipe draws, on disk."""
    make_teacher(random_weights, SHAPES).save_pretrained(folder)
    return folder
