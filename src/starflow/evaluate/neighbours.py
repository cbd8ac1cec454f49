"""Fidelity and variety apart: precision, recall, density and coverage of samples against real pictures.

Every point's ball reaches to its k-th nearest neighbour in its own set. Precision is the share of samples inside some
real ball, recall the share of real pictures inside some sample's ball (Kynkäänniemi et al., arXiv 1904.06991,
section 2); density counts the real balls around a sample over k, coverage is the share of real balls that hold a sample
(Naeem et al., arXiv 2002.09797, section 3). Float64, on features (N, F).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.errors import UserError

NEIGHBOURS = 5
CHUNK = 1024


@dataclass(frozen=True)
class Fidelity:
    """Shares from 0 to 1 (density may exceed 1), and the counts they rest on."""

    precision: float
    recall: float
    density: float
    coverage: float
    samples: int
    references: int
    neighbours: int = NEIGHBOURS


def fidelity(samples: Tensor, references: Tensor, neighbours: int = NEIGHBOURS) -> Fidelity:
    """All four measures of samples (N, F) against references (M, F).

    Raises:
        UserError: features of two widths, values that are not finite, or no more than `neighbours` pictures in a set.
    """
    if samples.ndim != 2 or samples.shape[1:] != references.shape[1:]:
        raise UserError(
            f"features have shapes {tuple(samples.shape)} and {tuple(references.shape)}, expected (N, F) and (M, F)"
        )
    if not 1 <= neighbours < min(len(samples), len(references)):
        raise UserError(
            f"{neighbours} neighbours among {len(samples)} samples and {len(references)} references: "
            "expected at least 1, and more pictures than neighbours in both"
        )
    if not bool(samples.isfinite().all() and references.isfinite().all()):
        raise UserError("features that are not finite have no neighbours: leave those pictures out and count them")
    samples, references = samples.double(), references.double()
    real_radii, made_radii = _radii(references, neighbours), _radii(samples, neighbours)
    inside_made = torch.zeros(len(references), dtype=torch.bool, device=samples.device)
    nearest = torch.full((len(references),), torch.inf, dtype=torch.float64, device=samples.device)
    balls = []
    for rows, radii in zip(samples.split(CHUNK), made_radii.split(CHUNK), strict=True):
        distances = _distances(rows, references)
        balls.append((distances <= real_radii).sum(1))
        inside_made |= (distances <= radii[:, None]).any(0)
        nearest = torch.minimum(nearest, distances.min(0).values)
    around = torch.cat(balls).double()
    return Fidelity(
        precision=float((around > 0).double().mean()),
        recall=float(inside_made.double().mean()),
        density=float(around.mean()) / neighbours,
        coverage=float((nearest <= real_radii).double().mean()),
        samples=len(samples),
        references=len(references),
        neighbours=neighbours,
    )


def _distances(rows: Tensor, points: Tensor) -> Tensor:
    """Euclidean distances; not by the product's expansion, which would not give zero for equal points."""
    return torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance of each point to its k-th nearest other point."""
    return torch.cat([_distances(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(CHUNK)])
