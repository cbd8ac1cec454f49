"""The nearest training pictures of a sample: what it shows, and whether it was copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.errors import UserError

CHUNK = 1024


@dataclass(frozen=True)
class Retrieval:
    """How often the nearest training picture shows what was asked for."""

    score: float
    """The share of samples, from 0 to 1."""
    hits: tuple[bool, ...]
    """Per sample."""
    nearest: tuple[int, ...]
    """Per sample, the row of its nearest training picture."""


def nearest(features: Tensor, references: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
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


def retrieval_score(
    features: Tensor, concepts: Sequence[str], references: Tensor, reference_concepts: Sequence[str]
) -> Retrieval:
    """The share of samples whose nearest training picture shows the prompted concept.

    Args:
        features: (N, F) of the samples.
        concepts: what each sample was asked to show.
        references: (M, F) of the training pictures.
        reference_concepts: what each of them shows; concepts are compared as they are written.

    Raises:
        UserError: counts that do not match, or a concept that no training picture shows (it could never be hit).
    """
    if len(features) != len(concepts) or len(references) != len(reference_concepts) or not concepts:
        raise UserError(
            f"{len(features)} samples with {len(concepts)} concepts and {len(references)} training pictures with "
            f"{len(reference_concepts)}: expected one concept a picture, and at least one sample"
        )
    absent = sorted(set(concepts) - set(reference_concepts))
    if absent:
        raise UserError(f"no training picture shows {', '.join(map(repr, absent[:3]))}: leave out such samples")
    rows = tuple(int(row) for row in nearest(features, references)[0][:, 0])
    hits = tuple(reference_concepts[row] == concept for row, concept in zip(rows, concepts, strict=True))
    return Retrieval(sum(hits) / len(hits), hits, rows)
