"""Distances between two sets of feature vectors: Frechet and kernel distance, precision and recall, inception score.

Features are (N, F), one row an image; everything is computed in float64, with the counts that a number rests on. A
distance is named after its features: `kid_mobilenetv2`, `fd_mobilenetv2`; `fid` and `kid` are Inception's alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.io.files import read_tensors, write_tensors

NEIGHBOURS = 5
"""The k of precision and recall: a ball reaches to the k-th nearest neighbour."""

CHUNK = 1024
"""Rows that are compared with a whole set at once, for memory."""


@dataclass(frozen=True)
class Moments:
    """Count, mean (F,) and covariance (F, F), float64, of a set of feature vectors."""

    count: int
    """0 where the file that they were read from does not say."""
    mean: Tensor
    covariance: Tensor


def save_moments(path: Path, found: Moments, name: str) -> None:
    """Write `path` (.safetensors): float64 `mean` and `covariance`; the header has the count and the features' name."""
    tensors = {"mean": found.mean.double(), "covariance": found.covariance.double()}
    write_tensors(path, tensors, {"moments": json.dumps({"count": found.count, "features": name})})


def load_moments(path: Path, name: str) -> Moments:
    """Read what `save_moments` wrote, or a reference file of ADM or of the FID codes (.npz with `mu` and `sigma`).

    Args:
        path: a .npz is read without unpickling; its count is unknown, 0.
        name: the features that they must be of; a .npz does not say.

    Raises:
        UserError: no such file, a foreign one, moments of other features, or shapes that do not fit.
    """
    found = _read_npz(path) if path.suffix == ".npz" else _read_moments(path, name)
    width = found.mean.shape[0] if found.mean.ndim == 1 else -1
    if found.covariance.shape != (width, width):
        shapes = f"mean {tuple(found.mean.shape)} and covariance {tuple(found.covariance.shape)}"
        raise UserError(f"{path} holds a {shapes}, expected (F,) and (F, F)")
    return found


@dataclass(frozen=True)
class Distance:
    """A distance between two sets, and the images that each had: small sets have a floor above zero."""

    value: float
    count_first: int
    count_second: int


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of features (N, F).

    Raises:
        UserError: fewer than two pictures, or features that are not finite.
    """
    features = _checked(features)
    return Moments(len(features), features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))


def frechet_distance(first: Tensor, second: Tensor) -> Distance:
    """Frechet distance between the Gaussians fitted to two sets of features, each (N, F).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); Heusel et al., arXiv 1706.08500, equation 6. It is biased upwards
    where pictures are few against F: compare only numbers of equal counts.

    Raises:
        UserError: see `moments`, or features of two widths.
    """
    _check_widths(first, second)
    one, two = moments(first), moments(second)
    return Distance(frechet_of_moments(one, two), one.count, two.count)


def frechet_of_moments(one: Moments, two: Moments) -> float:
    """The Frechet distance of two Gaussians given by their moments.

    >>> unit = Moments(0, torch.zeros(3).double(), torch.eye(3).double())
    >>> round(frechet_of_moments(unit, Moments(0, torch.ones(3).double(), 4 * torch.eye(3).double())), 6)
    6.0
    """
    gap = (one.mean - two.mean).square().sum()
    # tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): no complex root, and never negative.
    cross = torch.linalg.svdvals(_root(one.covariance) @ _root(two.covariance)).sum()
    return float(gap + one.covariance.trace() + two.covariance.trace() - 2 * cross)


@dataclass(frozen=True)
class InceptionScore:
    """exp of the mean divergence of a picture's classes from the set's: its mean and spread over splits."""

    value: float
    spread: float
    count: int


def inception_score(logits: Tensor, splits: int = 10) -> InceptionScore:
    """exp E KL(p(y|x) || p(y)) of class logits (N, K), in as many parts of the set as `splits`; float64.

    Salimans et al., arXiv 1606.03498, section 4. Parts differ by one picture at most where N is no multiple.

    Raises:
        UserError: fewer pictures than splits.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise UserError(f"logits of shape {tuple(logits.shape)} in {splits} splits: expected (N, K) with N >= splits")
    values = []
    for part in logits.double().log_softmax(1).tensor_split(splits):
        together = part.logsumexp(0) - math.log(len(part))
        values.append((part.exp() * (part - together)).sum(1).mean().exp())
    found = torch.stack(values)
    return InceptionScore(float(found.mean()), float(found.std(correction=0)), len(logits))


def kernel_distance(first: Tensor, second: Tensor) -> Distance:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / F + 1)^3: the "KID", for features (N, F) each.

    Binkowski et al., arXiv 1801.01401, section 4, over all pictures at once rather than averaged over subsets (the
    expectation is the same). Unbiased: around zero, below it too, where both sets are drawn from one distribution.

    Raises:
        UserError: see `moments`, or features of two widths.
    """
    _check_widths(first, second)
    first, second = _checked(first), _checked(second)
    within = _mean_within(first) + _mean_within(second)
    between = _kernel_sum(first, second) / (len(first) * len(second))
    return Distance(float(within - 2 * between), len(first), len(second))


@dataclass(frozen=True)
class PrecisionRecall:
    """Fidelity and variety apart: shares from 0 to 1 (density may exceed 1), and the counts they rest on."""

    precision: float
    recall: float
    density: float
    coverage: float
    samples: int
    references: int
    neighbours: int = NEIGHBOURS


def precision_recall(samples: Tensor, references: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Precision, recall, density and coverage of samples (N, F) against references (M, F).

    Every point's ball reaches to its k-th nearest neighbour in its own set. Precision is the share of samples inside
    some real ball, recall the share of real images inside some sample's ball (Kynkäänniemi et al., arXiv 1904.06991,
    section 2); density counts the real balls around a sample over k, coverage is the share of real balls that hold a
    sample (Naeem et al., arXiv 2002.09797, section 3).

    Raises:
        UserError: features of two widths, values that are not finite, or no more than `neighbours` images in a set.

    >>> points = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> found = precision_recall(points, points)
    >>> found.precision, found.recall, found.coverage
    (1.0, 1.0, 1.0)
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
    return PrecisionRecall(
        precision=float((around > 0).double().mean()),
        recall=float(inside_made.double().mean()),
        density=float(around.mean()) / neighbours,
        coverage=float((nearest <= real_radii).double().mean()),
        samples=len(samples),
        references=len(references),
        neighbours=neighbours,
    )


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix; rounding below zero is cut."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _kernel_sum(first: Tensor, second: Tensor) -> Tensor:
    """Sum of the kernel over all pairs, a chunk of rows at a time."""
    width = first.shape[1]
    return torch.stack([(rows @ second.T / width + 1).pow(3).sum() for rows in first.split(CHUNK)]).sum()


def _mean_within(features: Tensor) -> Tensor:
    """Mean of the kernel over pairs of two different pictures."""
    count, width = features.shape
    with_themselves = (features.square().sum(1) / width + 1).pow(3).sum()
    return (_kernel_sum(features, features) - with_themselves) / (count * (count - 1))


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features have shape {tuple(features.shape)}, expected (N, F) with at least two pictures")
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        raise UserError(f"{bad} of {len(features)} pictures have features that are not finite: look at those pictures")
    return features.double()


def _check_widths(first: Tensor, second: Tensor) -> None:
    if first.shape[1:] != second.shape[1:]:
        raise UserError(f"features of widths {tuple(first.shape[1:])} and {tuple(second.shape[1:])}: use one network")


def _distances(rows: Tensor, points: Tensor) -> Tensor:
    """Euclidean distances; not by the product's expansion, which would not give zero for equal points."""
    return torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance of each point to its k-th nearest other point."""
    return torch.cat([_distances(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(CHUNK)])


def _read_moments(path: Path, name: str) -> Moments:
    from safetensors import safe_open

    tensors = read_tensors(path)
    with safe_open(path, "pt") as header:
        told = json.loads((header.metadata() or {}).get("moments", "{}"))
    if not {"mean", "covariance"} <= tensors.keys() or "count" not in told:
        raise UserError(f"{path} holds no moments of features: expected a file that `save_moments` wrote")
    if told.get("features") != name:
        raise UserError(f"{path} has moments of '{told.get('features')}' features, expected '{name}': use one network")
    return Moments(int(told["count"]), tensors["mean"].double(), tensors["covariance"].double())


def _read_npz(path: Path) -> Moments:
    import zipfile

    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            mean, covariance = arrays["mu"], arrays["sigma"]
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no reference file ({error}): expected a .npz with 'mu' and 'sigma'") from None
    return Moments(0, torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())
