"""Scores on features and log-likelihoods: nearest training images, classification, and telling outliers apart.

Log-likelihoods are nats, one an image (and one a class). An outlier score is larger for stranger images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.errors import UserError

CHUNK = 1024
"""Rows that are compared with all references at once, for memory."""


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


@dataclass(frozen=True)
class Classification:
    """The result of the classifier argmax_c log p(x | c), with equal prior probabilities."""

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

    >>> auroc(inside=torch.tensor([1.0, 2.0]), outside=torch.tensor([2.0, 3.0]))
    0.875
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
    within, beyond = (_as_least_likely(one.double()) for one in (inside, outside))
    return Outliers(
        auroc_likelihood=auroc(-within, -beyond),
        auroc_typicality=auroc((within - usual).abs(), (beyond - usual).abs()),
        mean_nats_inside=float(within[within.isfinite()].mean()),
        mean_nats_outside=float(beyond[beyond.isfinite()].mean()),
        count_inside=len(within),
        count_outside=len(beyond),
        not_finite=int((~within.isfinite()).sum() + (~beyond.isfinite()).sum()),
    )


def _as_least_likely(log_probs: Tensor) -> Tensor:
    """Log-likelihoods with minus infinity for those that are not finite."""
    return log_probs.where(log_probs.isfinite(), -torch.inf)


def classify(log_probs: Tensor, labels: Tensor) -> Classification:
    """The accuracy of the likelihood classifier, and its confusions.

    Args:
        log_probs: (N, K) nats of each picture under each class.
        labels: (N,) true classes, 0 to K - 1.

    A class whose log-likelihood is not finite is not chosen; a picture without a finite one is wrong, and counted.

    Raises:
        UserError: shapes that do not fit, or no pictures.

    >>> classify(torch.tensor([[-1.0, -2.0], [-5.0, -3.0], [-1.0, -9.0]]), torch.tensor([0, 1, 1])).confusion
    ((1, 0), (1, 1))
    """
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise UserError(
            f"log-likelihoods {tuple(log_probs.shape)} and labels {tuple(labels.shape)}: expected (N, K) and (N,)"
        )
    classes, kept = log_probs.shape[1], log_probs.isfinite().any(1)
    predicted, true = _as_least_likely(log_probs[kept]).argmax(1), labels[kept].long()
    confusion = torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)
    rows = tuple(tuple(row) for row in confusion.tolist())
    right = int((predicted == true).sum())
    return Classification(right / len(labels), len(labels), rows, int((~kept).sum()))
