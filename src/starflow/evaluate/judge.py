"""A judge names what a picture shows, so that samples can be counted without a person.

It is a small contrastive model (as CLIP, Radford et al., arXiv 2103.00020) between two frozen networks. MobileNetV2's
features of a picture at 160 px go through one hidden layer, the mean of MiniLM's states of a concept's name through a
matrix; both end as unit vectors, and the name with the largest cosine is the judge's first answer. It learns from the
training pictures of a set in minutes; the set's held-out pictures, on which it is measured, say how far to trust it.

Contract: a judge is not asked for a concept of fewer than three training pictures, as it cannot know it, nor about a
picture that it was trained on. How many held-out pictures that leaves out is part of the report, and every share comes
with its count and standard error. What a model drew and is not finite counts as not named.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.conditioning import TextEncoder
from starflow.conditioning.text import MINILM
from starflow.data.images import to_float
from starflow.data.sources.base import unit_hash
from starflow.errors import UserError
from starflow.evaluate.dataset import (
    BATCH,
    EvaluationSet,
    evenly_spaced,
    image_batches,
    is_first,
    own_rows,
    select_rows,
)
from starflow.evaluate.features import WIDTH, FeatureExtractor, load_mobilenet
from starflow.evaluate.samples import SamplingOptions, draw_samples, gathered_features, reconstruct
from starflow.io.files import check_output_folder, read_tensors, write_tensors
from starflow.pipeline.pipeline import StarFlowPipeline

SIDE = 160
"""Pixels of a side of the pictures that the features are taken of."""

FEATURES = f"mobilenetv2 at {SIDE} px"
"""What a file of weights says that it reads."""

HIDDEN = 1024
"""Width of the hidden layer."""

LEAST_PICTURES = 3
"""Training pictures that a concept needs for the judge to know it: of fewer it learns those pictures."""

PICTURES_A_CONCEPT = 8
"""Training pictures of a concept, at most: more of one thing, such as the views of a model, teach little."""

ANSWERS = 5
"""A picture counts as named where its concept is among so many first answers."""

NAME_TOKENS = 16
"""Tokens of a name that MiniLM reads."""

EPOCHS, BATCH_SIZE, PEAK_RATE, WEIGHT_DECAY, DROPOUT, SCALE = 16, 256, 2e-3, 0.05, 0.3, 30.0
"""Chosen on held-out pictures of the set glyphs2; see docs/log.md."""


class JudgeHead(nn.Module):
    """Features (B, F) to unit vectors (B, E): standardised by the training pictures' statistics, one hidden layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.layers = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(features, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        unit: Tensor = F.normalize(self.layers((features - self.mean) / self.std), dim=1)
        return unit


@dataclass(frozen=True)
class Judge:
    """What was learned: the head, and the unit vectors of all names, one a concept.

    Attributes:
        head: features to unit vectors.
        vectors: (K, E) unit vectors of the names.
        names: K names, as the set's captions have them.
        concepts: K keys of the concepts (`EvaluationSet.groups`).
        trained: hashes of the names of the pictures that it was trained on (`starflow.data.sources.base.unit_hash`).
    """

    head: JudgeHead
    vectors: Tensor
    names: tuple[str, ...]
    concepts: tuple[str, ...]
    trained: frozenset[float]

    @torch.no_grad()
    def answers(self, features: Tensor, count: int = ANSWERS) -> Tensor:
        """Indices (B, count) of the nearest names, the nearest first; of features (B, F) that are not finite, -1."""
        finite = features.isfinite().all(1)
        cosines = self.head(features.float().nan_to_num()) @ self.vectors.T
        best: Tensor = cosines.topk(min(count, len(self.names)), dim=1).indices
        return best.masked_fill(~finite[:, None], -1)

    def hits(self, features: Tensor, concepts: Sequence[str]) -> Tensor:
        """(B, 2) float64: whether a picture's concept is the first answer, and among the first `ANSWERS`.

        Raises:
            UserError: not a concept for each picture, or one that the judge does not know.
        """
        numbers = {concept: number for number, concept in enumerate(self.concepts)}
        if len(concepts) != len(features):
            raise UserError(f"{len(concepts)} concepts for {len(features)} pictures: give one for each")
        unknown = sorted(set(concepts) - numbers.keys())
        if unknown:
            raise UserError(f"the judge does not know {len(unknown)} concepts, such as '{unknown[0]}': leave them out")
        wanted = torch.tensor([numbers[concept] for concept in concepts], dtype=torch.int64, device=features.device)
        right = self.answers(features) == wanted[:, None]
        return torch.stack([right[:, 0], right.any(1)], dim=1).double()


@dataclass(frozen=True)
class JudgeScore:
    """How often a judge named what was meant.

    >>> score = JudgeScore(0.5, 0.8, 100)
    >>> round(score.error(score.top1), 3), round(score.error(score.top5), 3)
    (0.05, 0.04)
    """

    top1: float
    """Share whose concept is the first answer."""
    top5: float
    """Share whose concept is among the first five."""
    count: int
    not_finite: int = 0
    """Pictures that are not finite, which count as not named."""

    def error(self, share: float) -> float:
        """Standard error of a share of `count` pictures."""
        return math.sqrt(share * (1 - share) / self.count)


@dataclass(frozen=True)
class JudgeReport:
    """What a judge says of a pipeline's samples, and of real pictures and reconstructions beside them."""

    names: int
    """Names that it chooses among."""
    scores: dict[str, JudgeScore]
    """By set."""
    ratio: float
    """Top 5 of the samples over top 5 of the reconstructions of the pictures whose prompts they have."""
    ratio_error: float
    """Its standard error, over the prompts."""
    unknown: int
    """Held-out pictures that were left out, as the judge has seen nothing of their concept."""
    trained: int
    """Held-out pictures that were left out, as the judge was trained on them."""


def train_judge(dataset: EvaluationSet, features: FeatureExtractor, log: Callable[[str], None], seed: int = 0) -> Judge:
    """Train a judge on the training pictures of a set; under torchrun each process computes its share of the features.

    Args:
        dataset: whose training pictures it learns from.
        features: from `judge_features`, on the device that computes.
        log: told the next step.
        seed: of the first weights, the order and the dropout.

    Raises:
        UserError: the training pictures show one concept alone, or MiniLM is not installed.
    """
    views, groups = dataset.train, dataset.groups_of(dataset.train)
    named = [row for row, group in enumerate(groups) if group]  # without a caption there is no concept
    rows = [named[row] for row in some_of_each([groups[row] for row in named], LEAST_PICTURES, PICTURES_A_CONCEPT)]
    captions = dataset.concepts_of(views)
    concepts, names = names_of([groups[row] for row in rows], [captions[row] for row in rows])
    if len(concepts) < 2:
        raise UserError(
            f"{len(concepts)} concepts have {LEAST_PICTURES} training pictures: a judge needs at least 2 to tell apart"
        )
    log(f"the judge: features of {len(rows)} training pictures")
    found = _features(features, select_rows(views, rows).images)
    log(f"the judge: {len(concepts)} names")
    numbers = {concept: number for number, concept in enumerate(concepts)}
    labels = torch.tensor([numbers[groups[row]] for row in rows], dtype=torch.int64, device=found.device)
    head, vectors = _learn(found, labels, name_vectors(names), seed)
    trained = frozenset(unit_hash(views.names[row]) for row in rows)
    return Judge(head, vectors, names, concepts, trained)


def judge_features() -> FeatureExtractor:
    """The frozen network that a judge sees with.

    Raises:
        UserError: see `load_mobilenet`.
    """
    return FeatureExtractor(FEATURES, load_mobilenet(side=SIDE))


def some_of_each(concepts: Sequence[str], least: int, most: int) -> list[int]:
    """Rows of at most `most` pictures of each concept that has `least`, evenly over those that there are.

    >>> some_of_each(["cat", "dog", "cat", "cat", "cat"], 2, 3)
    [0, 2, 3]
    """
    rows = defaultdict(list)
    for row, concept in enumerate(concepts):
        rows[concept].append(row)
    enough = [of_one for of_one in rows.values() if len(of_one) >= least]
    return sorted(of_one[number] for of_one in enough for number in evenly_spaced(len(of_one), most))


def names_of(concepts: Sequence[str], captions: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The concepts in their alphabet's order, and the name of each, which is its most frequent caption.

    >>> names_of(["apple", "cat", "apple", "apple"], ["red apple", "cat", "apple", "apple"])
    (('apple', 'cat'), ('apple', 'cat'))
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for concept, caption in zip(concepts, captions, strict=True):
        counts[concept][caption] += 1
    found = sorted(counts)
    return tuple(found), tuple(counts[concept].most_common(1)[0][0] for concept in found)


def name_vectors(names: Sequence[str]) -> Tensor:
    """Unit vectors (K, 384): the mean of MiniLM's token states (arXiv 1908.10084, section 3).

    Raises:
        UserError: MiniLM is not installed.
    """
    encoder = TextEncoder.from_pretrained(MINILM, NAME_TOKENS)
    found = []
    for start in range(0, len(names), BATCH):
        states = encoder.encode(names[start : start + BATCH])
        tokens = (states != 0).any(2).sum(1, keepdim=True).clamp_min(1)
        found.append(F.normalize(states.sum(1) / tokens, dim=1))
    return torch.cat(found)


def _learn(features: Tensor, labels: Tensor, names: Tensor, seed: int) -> tuple[JudgeHead, Tensor]:
    """The head and the names' vectors: every picture against all names, cross-entropy of their scaled cosines.

    Args:
        features: (N, F).
        labels: (N,) numbers of the names.
        names: (K, E) vectors.
        seed: of weights, order and dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = names.shape[1]
        head, matrix = JudgeHead(features.shape[1], width), nn.Linear(width, width, bias=False)
        nn.init.eye_(matrix.weight)
        head.mean, head.std = features.mean(0), features.std(0) + 1e-3
        scale = nn.Parameter(features.new_tensor(SCALE).log())
        optimiser = torch.optim.AdamW([*head.parameters(), *matrix.parameters(), scale], weight_decay=WEIGHT_DECAY)
        steps = EPOCHS * -(-len(features) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps, pct_start=0.1)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(features), device="cpu").split(BATCH_SIZE):
                cosines = head(features[rows]) @ F.normalize(matrix(names), dim=1).T
                optimiser.zero_grad()
                F.cross_entropy(scale.exp() * cosines, labels[rows]).backward()
                optimiser.step()
                schedule.step()
    with torch.no_grad():
        return head.eval().requires_grad_(False), F.normalize(matrix(names), dim=1)


def save_judge(path: Path, judge: Judge) -> None:
    """Write a judge to one safetensors file, whole or not at all, with its sha256 in the header."""
    check_output_folder(path.parent)
    tensors = {f"head.{name}": value for name, value in judge.head.state_dict().items()}
    tensors |= {
        "vectors": judge.vectors,
        "trained": torch.tensor(sorted(judge.trained), dtype=torch.float64, device="cpu"),
    }
    about = {"features": FEATURES, "encoder": MINILM, "names": judge.names, "concepts": judge.concepts}
    about["sha256"] = _digest(tensors, judge.names, judge.concepts)
    write_tensors(path, tensors, {"judge": json.dumps(about, ensure_ascii=False)})


def load_judge(path: Path) -> Judge:
    """Read what `save_judge` wrote.

    Raises:
        UserError: no such file, one that holds no judge of these features, or one that was changed.
    """
    from safetensors import safe_open

    tensors = read_tensors(path)
    try:
        with safe_open(path, "pt") as header:
            about = json.loads((header.metadata() or {}).get("judge", "{}"))
        features, names, concepts = about["features"], tuple(about["names"]), tuple(about["concepts"])
        same = _digest(tensors, names, concepts) == about["sha256"]
    except (ValueError, TypeError, KeyError):
        features, same = None, False
    if features != FEATURES:
        raise UserError(f"{path} holds no judge that sees by {FEATURES}: delete it, or name another file")
    if not same:
        raise UserError(f"{path} is not as it was written (its sha256 differs): delete it, so that it is made again")
    vectors, trained = tensors.pop("vectors"), frozenset(tensors.pop("trained").tolist())
    head = JudgeHead(WIDTH, vectors.shape[1])
    head.load_state_dict({name.removeprefix("head."): value for name, value in tensors.items()})
    return Judge(head.eval().requires_grad_(False), vectors, names, concepts, trained)


def _digest(tensors: Mapping[str, Tensor], names: Sequence[str], concepts: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([list(names), list(concepts)]).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_judge(path: Path, dataset: EvaluationSet, features: FeatureExtractor, log: Callable[[str], None]) -> Judge:
    """The judge in that file, or, where there is none, one that is trained on the set and written there.

    Raises:
        UserError: see `load_judge` and `train_judge`.
    """
    if path.exists():
        return load_judge(path)
    judge = train_judge(dataset, features, log)
    if is_first():
        save_judge(path, judge)
    return judge


def measure_judge(
    pipeline: StarFlowPipeline,
    dataset: EvaluationSet,
    judge: Judge,
    features: FeatureExtractor,
    count: int,
    options: SamplingOptions | None = None,
) -> JudgeReport:
    """What a judge says of held-out pictures, and of `count` of their prompts' pictures, reconstructions and samples.

    Samples are drawn by `options` (None is as the model does by default) at the guidance that the model or its student
    draws at by default, sample i with seed i.

    Raises:
        UserError: no held-out picture that it may judge.
    """
    views = dataset.heldout
    groups, known = dataset.groups_of(views), set(judge.concepts)
    unknown = [row for row, group in enumerate(groups) if group not in known]
    trained = [row for row, name in enumerate(views.names) if unit_hash(name) in judge.trained]
    judged = sorted(set(range(len(views))) - {*unknown, *trained})
    if not judged:
        raise UserError(
            f"of {len(views)} held-out pictures the judge does not know the concepts of {len(unknown)} and was trained "
            f"on {len(trained)}, so that it can judge none: hold pictures out of concepts that stay in training"
        )
    all_views = select_rows(views, judged)
    chosen = select_rows(all_views, evenly_spaced(len(judged), count))
    noise = pipeline.config.noise_std
    own = own_rows(len(chosen))
    made = (
        reconstruct(pipeline, chosen.images, own[start : start + BATCH], noise) for start in range(0, len(own), BATCH)
    )
    example = to_float(chosen.images[:1])
    options = options or SamplingOptions()
    drawn = draw_samples(pipeline, chosen, len(chosen), options.guidance(pipeline), 0, options)
    found = {
        "held-out pictures": _features(features, all_views.images),
        "pictures of the prompts": _features(features, chosen.images),
        f"reconstructions, noise {noise:g}": gathered_features(features, made, len(chosen), example).features.float(),
        "samples": gathered_features(features, drawn, len(chosen), example).features.float(),
    }
    hits = {
        name: judge.hits(rows, dataset.groups_of(all_views if len(rows) == len(all_views) else chosen))
        for name, rows in found.items()
    }
    *_, reconstructed, sampled = hits.values()
    ratio, error = _ratio(sampled[:, 1], reconstructed[:, 1])
    scores = {name: _score(rows, found[name]) for name, rows in hits.items()}
    return JudgeReport(len(judge.names), scores, ratio, error, len(unknown), len(trained))


def _score(hits: Tensor, features: Tensor) -> JudgeScore:
    top1, top5 = hits.mean(0).tolist()
    return JudgeScore(top1, top5, len(hits), int((~features.isfinite().all(1)).sum()))


def _ratio(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The ratio of two means over the same N rows, and its standard error by the delta method; NaN over nothing."""
    below = float(second.mean())
    if not below:
        return math.nan, math.nan
    ratio = float(first.mean()) / below
    return ratio, float((first - ratio * second).std(correction=0)) / (below * math.sqrt(len(first)))


def _features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features (N, F) in float32 of pictures uint8, of which this process computes its share."""
    own = own_rows(len(images))
    device = next(extractor.network.parameters()).device
    batches = image_batches(images[own.start : own.stop], device)
    return gathered_features(extractor, batches, len(images), to_float(images[:1])).features.float()
