"""Prompts become the condition of a flow: tokens of a text encoder, a class's vector, or the labels of a TarFlow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow.conditioning import ClassLabels, Conditioner, OnDemandTextEncoder
from starflow.data.buckets import caption_with_ratio, nearest_aspect
from starflow.errors import UserError
from starflow.flow.model import STARFlow, TarFlow
from starflow.pipeline.config import PipelineConfig


def encode_prompts(
    prompts: Sequence[str],
    conditioner: Conditioner | None,
    flow: STARFlow | TarFlow,
    config: PipelineConfig,
    latent_shape: Sequence[int] = (1, 1),
) -> tuple[Tensor | None, Tensor | None]:
    """Condition and null condition of a batch, as the flow takes them.

    Args:
        prompts: (B,) texts, or names or numbers of classes; "" is unconditional.
        conditioner: None where the model takes no prompt.
        flow: STARFlow takes tokens (B, T, D), TarFlow labels (B,) on its device, -1 for no class.
        config: whose ratios the captions are told of.
        latent_shape: ends with the latents' (h, w).

    Raises:
        UserError: a prompt for a model that takes none, or an unknown class.
    """
    if conditioner is None:
        if any(prompts):
            raise UserError(f"'{config.name}' takes no prompt, got '{next(filter(None, prompts))}': leave it empty")
        return None, None
    if isinstance(flow, TarFlow):
        assert isinstance(conditioner, ClassLabels)
        labels = torch.tensor(list(map(conditioner.number, prompts)), dtype=torch.long, device=flow.device)
        return labels.where(labels < flow.config.num_classes, -1), None
    if conditioner.spec.kind != "class":
        prompts = add_aspect_ratio(prompts, config, latent_shape)
    return conditioner.encode(prompts), conditioner.null(len(prompts))


def remember_prompts(
    prompts: Sequence[str], conditioner: Conditioner | None, config: PipelineConfig, latent_shape: Sequence[int]
) -> None:
    """Encode prompts ahead where the text encoder is loaded on demand, so that it is loaded once for all of them."""
    if isinstance(conditioner, OnDemandTextEncoder):
        conditioner.encode_ahead(add_aspect_ratio(prompts, config, latent_shape))


def add_aspect_ratio(prompts: Sequence[str], config: PipelineConfig, latent_shape: Sequence[int]) -> list[str]:
    """Prompts as the text encoder reads them: with the nearest ratio, where the model was told of it in training.

    `latent_shape` ends with (h, w). An empty prompt stays the null condition.

    >>> from starflow.latents import AutoencoderSpec
    >>> config = PipelineConfig("wide", 256, 0.3, AutoencoderSpec("diffusers_kl", 4, 8), aspects=("1:1", "16:9"))
    >>> add_aspect_ratio(["a cat", ""], config, (4, 24, 42))
    ['a cat\\n in a 16:9 aspect ratio.\\n', '']
    """
    if len(config.aspects) < 2:
        return list(prompts)
    aspect = nearest_aspect(latent_shape[-1], latent_shape[-2], config.aspects)
    return [caption_with_ratio(prompt, aspect) if prompt else "" for prompt in prompts]


def example_prompts(conditioner: Conditioner | None, count: int) -> list[str]:
    """Prompts of the kind that a model reads, to measure with: its classes in turn, or things in two colours."""
    if conditioner is None:
        return [""] * count
    if isinstance(conditioner, ClassLabels):
        known: Sequence[str] = conditioner.spec.names
    else:
        known = [f"a {colour} {thing}" for thing in ("apple", "car", "cat", "tree") for colour in ("red", "blue")]
    return [known[index % len(known)] for index in range(count)]
