"""Distances of features: nothing between equal pictures, more the further apart, and gradients to the pixels."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from starflow.errors import UserError
from starflow.evaluate import MobileNetV2
from starflow.train.perceptual import MobileNetDistance, load_perceptual

CPU = torch.device("cpu")


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_pictures_are_at_no_distance_and_others_are() -> None:
    torch.manual_seed(0)
    distance = MobileNetDistance(MobileNetV2().eval().requires_grad_(False), CPU)
    one, two = pictures(0), pictures(1)
    assert float(distance(one, one)) == 0
    assert float(distance(one, two)) > float(distance(one, 0.9 * one + 0.1 * two)) > 0
    assert float(distance(one, two)) == pytest.approx(float(distance(two, one)))
    moved = one.clone().requires_grad_()
    distance(moved, two).backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().sum()) > 0


def test_lpips_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class LPIPS(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(one, two, reduction="none").mean((1, 2, 3), keepdim=True) * self.weight

    package: Any = types.ModuleType("lpips")
    package.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    one, two = pictures(0), pictures(1)
    assert float(load_perceptual("lpips", CPU)(one, two)) == pytest.approx(float(F.mse_loss(one, two)))
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips"):
        load_perceptual("lpips", CPU)
