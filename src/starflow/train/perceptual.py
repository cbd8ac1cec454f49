"""Distances of pictures as a network sees them: LPIPS where it is installed, MobileNetV2's features anywhere.

Features of several depths, each normalised over channels, squared differences averaged over places and added: Zhang et
al., arXiv 1801.03924, equation 1, with equal weights instead of learned ones.
"""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.evaluate import MobileNetV2, load_mobilenet
from starflow.evaluate.mobilenet import MEAN, STD

PerceptualName = Literal["mobilenetv2", "lpips"]
DEPTHS = (1, 3, 6, 10)
"""Layers of MobileNetV2 after which features are compared: 16, 24, 32 and 64 channels at strides 2 to 16."""
EPS = 1e-8


class Perceptual(Protocol):
    """Two batches of pictures (B, 3, H, W) in [-1, 1] to a scalar, 0 for equal ones."""

    def __call__(self, images: Tensor, references: Tensor) -> Tensor: ...


class MobileNetDistance:
    """Distance of MobileNetV2's inner features, at the pictures' own size."""

    def __init__(self, network: MobileNetV2, device: torch.device) -> None:
        layers = list(network.features.to(device).children())
        ends = [depth + 1 for depth in DEPTHS]
        self._stages = [nn.Sequential(*layers[start:end]) for start, end in pairwise([0, *ends])]
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """See `Perceptual`."""
        ours, theirs = self._prepared(images), self._prepared(references)
        total = images.new_zeros(())
        for stage in self._stages:
            ours, theirs = stage(ours), stage(theirs)
            total = total + (_normalised(ours.float()) - _normalised(theirs.float())).square().sum(1).mean()
        return total

    def _prepared(self, images: Tensor) -> Tensor:
        return ((images + 1) / 2 - self._mean) / self._std


def load_perceptual(name: PerceptualName, device: torch.device) -> Perceptual:
    """The distance of that name, frozen.

    Raises:
        UserError: the package that carries its weights is not installed.
    """
    if name == "mobilenetv2":
        return MobileNetDistance(load_mobilenet(), device)
    try:
        lpips: Any = importlib.import_module("lpips")
    except ImportError:
        raise UserError("LPIPS is not installed: run 'pip install lpips', or take --features mobilenetv2") from None
    network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

    def distance(images: Tensor, references: Tensor) -> Tensor:
        found: Tensor = network(images, references).mean()
        return found

    return distance


def _normalised(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + EPS).sqrt()
