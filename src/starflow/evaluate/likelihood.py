"""Likelihoods of a set of images under a pipeline: bits per dimension, classification, and telling outliers apart.

Log-likelihoods are nats, one an image (and one a class). An outlier score is larger for stranger images. Bits per
dimension are averaged over draws of the noise, with a standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from starflow.data.images import png_log_prob, to_float
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.evaluate.dataset import BATCH, EvaluationSet, evenly_spaced, gather_rows, is_first, own_rows, prompts_of
from starflow.flow.model import condition_scores
from starflow.pipeline.inputs import check_prompts, check_range, check_whole, encode_prompts
from starflow.pipeline.likelihood import add_training_noise
from starflow.pipeline.pipeline import StarFlowPipeline


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
    auroc_ratio: float
    """Score log q(x) - log p(x), where q is another density that knows nothing about the model's pictures."""
    auroc_background: float
    """Score log q(x): what the background tells without the model, where simple pictures are the foreign ones."""
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
        UserError: an empty set, scores of several axes, or such as are not numbers (infinities are ranked).

    >>> auroc(inside=torch.tensor([1.0, 2.0]), outside=torch.tensor([2.0, 3.0]))
    0.875
    """
    if inside.ndim != 1 or outside.ndim != 1:
        raise UserError(f"scores of shapes {tuple(inside.shape)} and {tuple(outside.shape)}, expected (N,) and (M,)")
    if not len(inside) or not len(outside):
        raise UserError(f"{len(inside)} and {len(outside)} scores: both sets need at least one")
    scores = torch.cat([inside, outside]).double()
    if bool(scores.isnan().any()):
        raise UserError(f"{int(scores.isnan().sum())} of {len(scores)} scores are not numbers: look at those pictures")
    _, group, sizes = scores.unique(return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum(0) - (sizes - 1) / 2)[group]  # tied scores share their mean rank
    above = ranks[len(inside) :].sum() - len(outside) * (len(outside) + 1) / 2
    return float(above / (len(inside) * len(outside)))


def outliers(inside: Tensor, outside: Tensor, training: Tensor, background: tuple[Tensor, Tensor]) -> Outliers:
    """Likelihood, typicality and likelihood ratios as outlier scores.

    Typicality (Nalisnick et al., arXiv 1906.02994, for one picture) asks whether a picture's log-likelihood is
    near that of training pictures rather than whether it is high: densities of foreign, simpler pictures are often
    higher (Nalisnick et al., arXiv 1810.09136). A likelihood ratio asks whether the model explains a picture better
    than a background does, which finds simple pictures likely too: a compressor (`png_log_prob`; Serra et al., arXiv
    1909.11480), or a flow that was trained on perturbed pictures (Ren et al., arXiv 1906.02845).

    Args:
        inside: (N,) log-likelihoods in nats of held-out pictures of the model's own kind.
        outside: (M,) of foreign pictures of the same size.
        training: (T,) of training pictures.
        background: log-densities (N,) and (M,) in nats of the first two sets under the background.

    A value that is not finite is the strangest there is, and is counted.

    Raises:
        UserError: an empty set, training pictures without one finite log-likelihood, or a background of other sizes.
    """
    if (background[0].shape, background[1].shape) != (inside.shape, outside.shape):
        raise UserError(
            f"a background of {len(background[0])} and {len(background[1])} log-densities for {len(inside)} and "
            f"{len(outside)} pictures: one for each is needed"
        )
    training = training[training.isfinite()]
    if not len(training):
        raise UserError("no finite log-likelihoods of training pictures: typicality needs their mean")
    usual = training.double().mean()
    within, beyond = (_as_least_likely(one.double()) for one in (inside, outside))
    return Outliers(
        auroc_likelihood=auroc(-within, -beyond),
        auroc_typicality=auroc((within - usual).abs(), (beyond - usual).abs()),
        auroc_ratio=auroc(_ratio_scores(background[0], within), _ratio_scores(background[1], beyond)),
        auroc_background=auroc(*background),
        mean_nats_inside=float(within[within.isfinite()].mean()),
        mean_nats_outside=float(beyond[beyond.isfinite()].mean()),
        count_inside=len(within),
        count_outside=len(beyond),
        not_finite=int((~within.isfinite()).sum() + (~beyond.isfinite()).sum()),
    )


def _ratio_scores(background: Tensor, log_probs: Tensor) -> Tensor:
    return (background.double() - log_probs).where(log_probs.isfinite(), torch.inf)


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
        UserError: shapes or labels that do not fit, or no pictures.

    >>> classify(torch.tensor([[-1.0, -2.0], [-5.0, -3.0], [-1.0, -9.0]]), torch.tensor([0, 1, 1])).confusion
    ((1, 0), (1, 1))
    """
    shapes = f"log-likelihoods {tuple(log_probs.shape)} and labels {tuple(labels.shape)}"
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise UserError(f"{shapes}: expected (N, K) and (N,)")
    classes, kept = log_probs.shape[1], log_probs.isfinite().any(1)
    strange = labels[(labels < 0) | (labels >= classes)]
    if len(strange):
        raise UserError(f"{len(strange)} labels such as {strange[0].item()}, expected 0 to {classes - 1}")
    predicted, true = _as_least_likely(log_probs[kept]).argmax(1), labels[kept].long()
    confusion = torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)
    rows = tuple(tuple(row) for row in confusion.tolist())
    right = int((predicted == true).sum())
    return Classification(right / len(labels), len(labels), rows, int((~kept).sum()))


TEXT_MIXTURE = 0.75
"""Share of the prompts' mean, beside the null condition, in the condition that prompts are scored at."""

LogLikelihood = Callable[[Sequence[int], Sequence[int]], Tensor]
"""A function of rows of a set and a seed for each, to log-likelihoods in nats (B,)."""


@dataclass(frozen=True)
class BitsPerDim:
    """The mean negative log-likelihood of a set; `space` names the dimensions that it is of.

    Attributes:
        space: "noised latent", "noised pixels" or "8-bit pixels" (there, dequantisation's bound on log P).
        dimensions: of one picture.
        nats_per_dim: mean over pictures and draws.
        bits_per_dim: the same over ln 2.
        error: standard error of bits_per_dim over pictures, the draws of each averaged first; None for one picture.
        draw_error: standard error of bits_per_dim that the draws alone cause; None for a single draw.
        count: pictures with a finite log-likelihood.
        draws: of the noise.
        not_finite: pictures that are left out because a log-likelihood is not finite.
    """

    space: str
    dimensions: int
    nats_per_dim: float
    bits_per_dim: float
    error: float | None
    draw_error: float | None
    count: int
    draws: int = 1
    not_finite: int = 0


def _check_counts(rows: Sequence[int], draws: int = 1) -> None:
    if not rows or draws < 1:
        raise UserError(f"{len(rows)} pictures with {draws} draws of the noise: both must be at least 1")


@torch.no_grad()
def log_likelihoods(log_likelihood: LogLikelihood, rows: Sequence[int], draws: int, batch: int) -> Tensor:
    """Nats (N, draws) of a set's rows, float64, on the CPU; under torchrun every process computes its share.

    Draw d of row r has the seed r * draws + d, at any batch size and in any number of processes.

    Raises:
        UserError: no rows or no draws.
    """
    _check_counts(rows, draws)
    own = [rows[index] for index in own_rows(len(rows))]
    starts = range(0, len(own), batch)
    shown = tqdm(starts, "likelihoods", unit="batch", disable=None if is_first() else True, leave=False)
    parts = [
        [
            log_likelihood(own[at : at + batch], [row * draws + draw for row in own[at : at + batch]])
            for draw in range(draws)
        ]
        for at in shown
    ]
    found = [torch.stack([nats.double().cpu() for nats in part], dim=1) for part in parts]
    nothing = torch.zeros(0, draws, dtype=torch.float64, device="cpu")
    return gather_rows(torch.cat(found) if found else nothing, len(rows))


def mean_bits_per_dim(nats: Tensor, dimensions: int, space: str) -> BitsPerDim:
    """The mean of log-likelihoods (N, draws) as bits per dimension, with its errors.

    Raises:
        UserError: not one picture has a finite log-likelihood.

    >>> found = mean_bits_per_dim(torch.tensor([[-64.0], [-64.0]]).double(), dimensions=64, space="noised latent")
    >>> round(found.bits_per_dim, 4), found.nats_per_dim, found.count
    (1.4427, 1.0, 2)
    """
    finite = nats.isfinite().all(1)
    kept = nats[finite]
    if not len(kept):
        raise UserError(f"not one of {len(nats)} pictures has a finite log-likelihood: the model is broken")
    unit = dimensions * math.log(2)
    means = -kept.mean(1) / unit
    draws = nats.shape[1]
    draw_error = float((kept.mean(0) / unit).std()) / math.sqrt(draws) if draws > 1 else None
    return BitsPerDim(
        space=space,
        dimensions=dimensions,
        nats_per_dim=float(means.mean()) * math.log(2),
        bits_per_dim=float(means.mean()),
        error=float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else None,
        draw_error=draw_error,
        count=len(kept),
        draws=draws,
        not_finite=int((~finite).sum()),
    )


def measure_likelihoods(
    pipeline: StarFlowPipeline, dataset: EvaluationSet, most: int, draws: int
) -> dict[str, BitsPerDim]:
    """Bits per dimension of the held-out images and of as many training images; prompts are those of the training."""
    heldout = evenly_spaced(len(dataset.heldout), most)
    train = evenly_spaced(len(dataset.train), min(len(heldout), len(dataset.train)))
    return {
        split: _split_bits_per_dim(pipeline, views, rows, draws)
        for split, views, rows in (("train", dataset.train, train), ("heldout", dataset.heldout, heldout))
    }


def _split_bits_per_dim(
    pipeline: StarFlowPipeline, views: TrainingViews, rows: Sequence[int], draws: int
) -> BitsPerDim:
    def density(some: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return _nats(pipeline, views.images, some, seeds, prompts_of(pipeline, views, some))

    nats = log_likelihoods(density, rows, draws, BATCH)
    return mean_bits_per_dim(nats, _dimensions(pipeline, views.images), pipeline.density_space)


def check_classes(pipeline: StarFlowPipeline, views: TrainingViews, rows: Sequence[int]) -> tuple[str, ...]:
    """The names of a model's classes.

    Raises:
        UserError: it has none, or a picture's label is not among them.
    """
    conditioner = pipeline.conditioner
    if conditioner is None or conditioner.spec.kind != "class":
        raise UserError(f"'{pipeline.config.name}' has no classes to tell apart: leave out --classify")
    names = conditioner.spec.names
    if without := sum(views.labels[row] is None for row in rows):
        raise UserError(f"{without} of {len(rows)} pictures have no label: leave out --classify, or give them labels")
    unknown = sorted({str(views.labels[row]) for row in rows} - set(names))
    if unknown:
        raise UserError(f"the model has no class '{unknown[0]}': its classes are {', '.join(names[:8])}")
    return names


def measure_classification(pipeline: StarFlowPipeline, views: TrainingViews, most: int, draws: int) -> Classification:
    """Accuracy of argmax_c log p(x | c) on labelled pictures; each class meets the same draws of the noise.

    Raises:
        UserError: the model has no classes, a picture has no label that it knows, or there are no pictures or draws.
    """
    rows = evenly_spaced(len(views), most)
    names = check_classes(pipeline, views, rows)
    _check_counts(rows, draws)
    own = [rows[index] for index in own_rows(len(rows))]
    found = torch.empty(len(own), len(names), dtype=torch.float64, device="cpu")
    for start in range(0, len(own), BATCH):
        some = own[start : start + BATCH]
        for number, name in enumerate(names):
            several = [
                _nats(pipeline, views.images, some, [row * draws + draw for row in some], [name] * len(some)).cpu()
                for draw in range(draws)
            ]
            found[start : start + len(some), number] = torch.stack(several).double().mean(0)
    return classify(gather_rows(found, len(rows)), _labels(views, rows, names))


def _labels(views: TrainingViews, rows: Sequence[int], names: Sequence[str]) -> Tensor:
    return torch.tensor([names.index(str(views.labels[row])) for row in rows], dtype=torch.long, device="cpu")


def measure_one_pass(pipeline: StarFlowPipeline, views: TrainingViews, most: int, draws: int) -> Classification:
    """As `measure_classification`, by `condition_scores` at equal weights: one pass there and back for all classes.

    Raises:
        UserError: the model has no classes, a picture has no label that it knows, or there are no pictures or draws.
    """
    rows = evenly_spaced(len(views), most)
    names = check_classes(pipeline, views, rows)
    _check_counts(rows, draws)
    own = [rows[index] for index in own_rows(len(rows))]
    found = torch.zeros(len(own), len(names), dtype=torch.float64, device="cpu")
    for start in range(0, len(own), BATCH):
        some = own[start : start + BATCH]
        batch = to_float(views.images[some]).to(pipeline.device)
        for draw in range(draws):
            seeds = [row * draws + draw for row in some]
            found[start : start + len(some)] += prompt_scores(pipeline, batch, names, seeds)
    return classify(gather_rows(found, len(rows)), _labels(views, rows, names))


def rank_prompts(
    pipeline: StarFlowPipeline, images: Tensor, prompts: Sequence[str], seeds: Sequence[int], *, exact: int = 0
) -> Tensor:
    """Which of K prompts fits each picture: the prompts' numbers (B, K), the best first.

    One forward and one backward pass order all of them (`prompt_scores`). The first `exact` of
    each picture are then ordered by log p(picture | prompt), with as many passes: the first order is a guess.

    Args:
        pipeline: whose model takes prompts.
        images: (B, 3, H, W) in [-1, 1].
        prompts: K of them.
        seeds: of the noise that is added to each picture, the same for every prompt.
        exact: how many of the first guesses to compare exactly.

    What is not finite comes last.

    Raises:
        UserError: a model without prompts, no such tensor, no prompts, or not a seed for each picture.
    """
    prompts, exact = check_prompts(prompts, least=1), check_whole("exact", exact, 0)
    scores = _as_least_likely(prompt_scores(pipeline, images, prompts, seeds))
    order = scores.argsort(dim=1, descending=True)
    kept = order[:, : min(exact, len(prompts))]
    if not kept.numel():
        return order
    nats = [pipeline.log_probs(images, [prompts[k] for k in column.tolist()], seeds)[0].cpu() for column in kept.T]
    best = _as_least_likely(torch.stack(nats, 1)).argsort(dim=1, descending=True)
    return torch.cat([kept.gather(1, best), order[:, kept.shape[1] :]], 1)


def prompt_scores(pipeline: StarFlowPipeline, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """The scores (B, K) of `condition_scores` for K prompts, on the CPU.

    They are taken at the mean of the K for classes, and for text at 3/4 of that mean and 1/4 of the null condition: of
    23 pictures of the bundled model and 1,000 names of emoji, the right name is then 50th at the median, 119th at the
    mean alone, and 191st at the null condition alone.

    Raises:
        UserError: a model without prompts, no such tensor, no prompts, or not a seed for each picture.
    """
    prompts = check_prompts(prompts, least=1)
    if pipeline.conditioner is None:
        raise UserError(f"'{pipeline.config.name}' takes no prompts, so none can be ranked: name another model")
    with torch.no_grad():
        latents = pipeline.autoencoder.encode(check_range(images, pipeline.device))
        noised = add_training_noise(latents, pipeline.config, seeds)
        given, null = encode_prompts(prompts, pipeline.conditioner, pipeline.flow, pipeline.config, noised.shape)
    assert given is not None
    text = null is not None and pipeline.conditioner.spec.kind != "class"
    at = torch.lerp(null[:1], given.mean(0, keepdim=True), TEXT_MIXTURE) if null is not None and text else None
    return condition_scores(pipeline.flow, noised, given, at).cpu()


def measure_bits_map(pipeline: StarFlowPipeline, views: TrainingViews, most: int) -> Tensor:
    """Where in a picture the bits lie: (h, w), the mean of -log2 p of each token, float64, on the CPU.

    It estimates the conditional entropy of a token given what the blocks have read before it, and sums to the bits of a
    whole picture, `bits_per_dim` times `dimensions` of `measure_likelihoods`. Prompts are those of the training.
    Pictures without a finite log-likelihood are left out, as there.

    Raises:
        UserError: no picture, or none is left.
    """
    rows = evenly_spaced(len(views), most)
    _check_counts(rows)
    total, count = torch.zeros(1, dtype=torch.float64, device="cpu"), 0
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        batch = to_float(views.images[list(some)]).to(pipeline.device)
        maps = pipeline.log_prob_maps(batch, prompts_of(pipeline, views, some), some).double().cpu()
        kept = maps[maps.isfinite().flatten(1).all(1)]
        total, count = total + kept.sum(0), count + len(kept)
    if not count:
        raise UserError(f"not one of {len(rows)} pictures has a finite log-likelihood: the model is broken")
    return -total / (count * math.log(2))


def measure_outliers(pipeline: StarFlowPipeline, dataset: EvaluationSet, unknown: Tensor, most: int) -> Outliers:
    """How well likelihood, typicality and ratios to PNG, without condition, tell images (N, 3, H, W) uint8 apart."""
    most = most or len(dataset.heldout)

    def unconditional(images: Tensor) -> Tensor:
        def nats(rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
            return _nats(pipeline, images, rows, seeds, [""] * len(rows))

        return log_likelihoods(nats, evenly_spaced(len(images), most), 1, BATCH)[:, 0]

    kinds = (dataset.heldout.images, unknown)
    inside, outside = (png_log_prob(images[evenly_spaced(len(images), most)]) for images in kinds)
    usual = unconditional(dataset.train.images)
    return outliers(unconditional(kinds[0]), unconditional(kinds[1]), usual, background=(inside, outside))


def _nats(
    pipeline: StarFlowPipeline, images: Tensor, rows: Sequence[int], seeds: Sequence[int], prompts: Sequence[str]
) -> Tensor:
    batch = to_float(images[list(rows)]).to(pipeline.device)
    return pipeline.log_probs(batch, prompts, seeds)[0]


def _dimensions(pipeline: StarFlowPipeline, images: Tensor) -> int:
    spec = pipeline.config.autoencoder
    return int(spec.channels * (images.shape[-2] // spec.factor) * (images.shape[-1] // spec.factor))
