"""The network that measures are made on: MobileNetV2 offline, Inception where the user has it, or any other.

Contract of an extractor: pictures (B, 3, H, W) in [-1, 1] of any size to features (B, F), or to features and class
logits (B, K); its `name` ends every measure's name. Only a network called "inception" gives `fid`, `kid` and `is`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow.data.pictures import to_bytes
from starflow.errors import UserError
from starflow.evaluate.mobilenet import load_mobilenet
from starflow.files import read_tensors

INCEPTION = "inception"
MOBILENET = "mobilenetv2"


@dataclass(frozen=True)
class Extractor:
    """A network and the name of its measures."""

    name: str
    network: nn.Module

    def names(self) -> tuple[str, str]:
        """What the Frechet and the kernel distance on its features are called."""
        return ("fid", "kid") if self.name == INCEPTION else (f"fd_{self.name}", f"kid_{self.name}")


@dataclass(frozen=True)
class Extracted:
    """What a set's pictures came to, in float64 on the CPU, all of them: rows may hold values that are not finite.

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

    def kept(self) -> Extracted:
        """The finite rows; `not_finite` says how many are missing."""
        rows = self.finite
        return Extracted(self.features[rows], None if self.logits is None else self.logits[rows])

    @property
    def not_finite(self) -> int:
        return int((~self.finite).sum())


def load_extractor(choice: str = MOBILENET, weights: Path | None = None) -> Extractor:
    """An extractor by its description.

    Args:
        choice: "mobilenetv2"; "inception", that of torch-fidelity; or NAME=MODULE:CLASS, a class (or function) of the
            user's own Python module that builds the network without arguments.
        weights: a state dict for the user's network: safetensors, or a .pth of tensors.

    Raises:
        UserError: a package, module, class or file is missing, or the weights do not fit.
    """
    name, own, target = choice.partition("=")
    if own:
        return Extractor(name, _own_network(target, weights))
    if weights is not None:
        raise UserError(
            f"weights {weights} are for a network of your own: name it as NAME=MODULE:CLASS, got '{choice}'"
        )
    if choice == MOBILENET:
        return Extractor(MOBILENET, load_mobilenet())
    if choice == INCEPTION:
        return Extractor(INCEPTION, _Fidelity(_torch_fidelity()))
    raise UserError(f"unknown features '{choice}': expected {MOBILENET}, {INCEPTION} or NAME=MODULE:CLASS")


@torch.no_grad()
def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Extracted:
    """Features of every picture that comes, the last batch as the others.

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
    return Extracted(torch.cat(features), torch.cat(logits) if logits else None)


class _Fidelity(nn.Module):
    """torch-fidelity's Inception, which reads bytes and resizes them as the original FID code does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] to pooled features (B, 2048) and logits (B, 1008) without their bias."""
        features, logits = self.network(to_bytes(images).to(images.device))
        return features, logits


def _torch_fidelity() -> nn.Module:
    try:
        fidelity: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise UserError(
            "fid, kid and is need Inception: run 'pip install torch-fidelity' (it fetches the weights), or name your "
            "own as inception=MODULE:CLASS with its weights"
        ) from None
    network: nn.Module = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    return network.eval().requires_grad_(False)


def _own_network(target: str, weights: Path | None) -> nn.Module:
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
        _load(network, weights)
    return network.eval().requires_grad_(False)


def _load(network: nn.Module, path: Path) -> None:
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
