"""The precision of a network's forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from starflow.train.settings import TrainSettings


def network_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """bfloat16 where the settings ask for it, or leave it open and the device is a GPU that has it; else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported()
    low = settings.precision == "bfloat16" or (settings.precision == "auto" and native)
    return torch.bfloat16 if low else torch.float32


def network_precision(settings: TrainSettings, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to `network_dtype`. Weights, optimiser and losses stay in float32."""
    if network_dtype(settings, device) == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
