"""The nearest training pictures of a sample: what it shows, and whether it was copied.

What log-likelihoods decide: the class of a picture, and whether it belongs at all.

Log-likelihoods are nats, one a picture (and one a class). An outlier score is larger for stranger pictures.
"""

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


@dataclass(frozen=True)
class Classification:
    """Of a classifier argmax_c log p(x | c), with equal prior probabilities."""

    accuracy: float
    count: int
    confusion: tuple[tuple[int, ...], ...]
    """Rows are the true classes, columns the predicted ones."""
    not_finite: int = 0
    """Pictures without a finite log-likelihood under any class: counted as wrong, and in no cell of `confusion`."""


@dataclass(frozen=True)
class Outliers:
    """How well scores tell two sets apart: areas under the ROC curve, 0.5 by chance, 1 at best."""

    auroc_likelihood: float
    """Score -log p(x): below 0.5 means that the model finds the foreign pictures likelier than its own."""
    auroc_typicality: float
    """Score | -log p(x) - its mean on training pictures |."""
    mean_nats_inside: float
    mean_nats_outside: float
    count_inside: int
    count_outside: int
    not_finite: int = 0
    """Pictures of both sets without a finite log-likelihood: the strangest there are for both scores, in no mean."""


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that a score of `outside` exceeds one of `inside`, ties counting half: exactly, by ranks.

    Args:
        inside: (N,) outlier scores of pictures that belong.
        outside: (M,) of pictures that do not.

    Raises:
        UserError: an empty set, or scores that are not numbers (infinities are ranked).
    """
    if not len(inside) or not len(outside):
        raise UserError(f"{len(inside)} and {len(outside)} scores: both sets need at least one")
    scores = torch.cat([inside, outside]).double()
    if bool(scores.isnan().any()):
        raise UserError(f"{int(scores.isnan().sum())} of {len(scores)} scores are not numbers: look at those pictures")
    _, group, sizes = scores.unique(return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum(0) - (sizes - 1) / 2)[group]  # tied scores share their mean rank
    above = ranks[len(inside) :].sum() - len(outside) * (len(outside) + 1) / 2
    return float(above / (len(inside) * len(outside)))


def outliers(inside: Tensor, outside: Tensor, training: Tensor) -> Outliers:
    """Likelihood and typicality as outlier scores.

    Typicality (Nalisnick et al., arXiv 1906.02994, for one picture) asks whether a picture's log-likelihood is
    near that of training pictures rather than whether it is high: densities of foreign, simpler pictures are often
    higher (Nalisnick et al., arXiv 1810.09136).

    Args:
        inside: (N,) log-likelihoods in nats of held-out pictures of the model's own kind.
        outside: (M,) of foreign pictures of the same size.
        training: (T,) of training pictures.

    A value that is not finite is the strangest there is, and is counted.

    Raises:
        UserError: an empty set, or training pictures without one finite log-likelihood.
    """
    training = training[training.isfinite()]
    if not len(training):
        raise UserError("no finite log-likelihoods of training pictures: typicality needs their mean")
    usual = training.double().mean()
    within, beyond = (_strangest(one.double()) for one in (inside, outside))
    return Outliers(
        auroc_likelihood=auroc(-within, -beyond),
        auroc_typicality=auroc((within - usual).abs(), (beyond - usual).abs()),
        mean_nats_inside=float(within[within.isfinite()].mean()),
        mean_nats_outside=float(beyond[beyond.isfinite()].mean()),
        count_inside=len(within),
        count_outside=len(beyond),
        not_finite=int((~within.isfinite()).sum() + (~beyond.isfinite()).sum()),
    )


def _strangest(log_probs: Tensor) -> Tensor:
    """Values that are not finite as minus infinity."""
    return log_probs.where(log_probs.isfinite(), -torch.inf)


def classify(log_probs: Tensor, labels: Tensor) -> Classification:
    """The likelihood classifier's accuracy.

    Args:
        log_probs: (N, K) nats of each picture under each class.
        labels: (N,) true classes, 0 to K - 1.

    A class whose log-likelihood is not finite is not chosen; a picture without a finite one is wrong, and counted.

    Raises:
        UserError: shapes that do not fit, or no pictures.
    """
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise UserError(
            f"log-likelihoods {tuple(log_probs.shape)} and labels {tuple(labels.shape)}: expected (N, K) and (N,)"
        )
    classes, kept = log_probs.shape[1], log_probs.isfinite().any(1)
    predicted, true = _strangest(log_probs[kept]).argmax(1), labels[kept].long()
    confusion = torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)
    rows = tuple(tuple(row) for row in confusion.tolist())
    right = int((predicted == true).sum())
    return Classification(right / len(labels), len(labels), rows, int((~kept).sum()))
