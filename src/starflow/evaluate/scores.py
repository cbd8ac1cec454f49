"""What log-likelihoods decide: the class of a picture, and whether it belongs at all.

Log-likelihoods are nats, one a picture (and one a class). An outlier score is larger for stranger pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.errors import UserError


@dataclass(frozen=True)
class Classification:
    """Of a classifier argmax_c log p(x | c), with equal prior probabilities."""

    accuracy: float
    count: int
    confusion: tuple[tuple[int, ...], ...]
    """Rows are the true classes, columns the predicted ones."""


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

    Raises:
        UserError: an empty set, or values that are not numbers.
    """
    if not len(training):
        raise UserError("no log-likelihoods of training pictures: typicality needs their mean")
    usual = training.double().mean()
    return Outliers(
        auroc_likelihood=auroc(-inside, -outside),
        auroc_typicality=auroc((inside.double() - usual).abs(), (outside.double() - usual).abs()),
        mean_nats_inside=float(inside.double().mean()),
        mean_nats_outside=float(outside.double().mean()),
        count_inside=len(inside),
        count_outside=len(outside),
    )


def classify(log_probs: Tensor, labels: Tensor) -> Classification:
    """The likelihood classifier's accuracy.

    Args:
        log_probs: (N, K) nats of each picture under each class.
        labels: (N,) true classes, 0 to K - 1.

    Raises:
        UserError: shapes that do not fit, no pictures, or log-likelihoods that are not numbers.
    """
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise UserError(
            f"log-likelihoods {tuple(log_probs.shape)} and labels {tuple(labels.shape)}: expected (N, K) and (N,)"
        )
    if bool(log_probs.isnan().any()):
        bad = int(log_probs.isnan().any(1).sum())
        raise UserError(f"{bad} of {len(labels)} pictures have a log-likelihood that is no number: look at them")
    classes = log_probs.shape[1]
    predicted = log_probs.argmax(1)
    confusion = torch.bincount(labels.long() * classes + predicted, minlength=classes**2).view(classes, classes)
    rows = tuple(tuple(row) for row in confusion.tolist())
    return Classification(float((predicted == labels).double().mean()), len(labels), rows)
