"""Training of a student, which learns to draw in one pass what its flow draws token by token.

Source: BiFlow, arXiv 2512.10953. The flow is frozen. For noised latents x its parallel pass gives the states x = x^0,
.., x^K = z of all blocks; the student starts at z and is to come by every state, and to the clean latent. With D the
mean square over a picture's latent, in units of the state's own mean square, the loss of a picture is the sum over
clean latent and states of D (D + c)^-p, the second factor detached, and of the decoded pictures the distance of
features and the score of a critic of those features, which learns beside the student to tell its pictures from the
decoded clean latents, and prompts that fit a picture from others (Sauer et al., arXiv 2111.01007; the projection of the
prompt is Miyato and Koyama's, arXiv 1802.05637). Mean squares alone give the mean of what a student cannot tell: blobs.

Guidance is trained in: with a weight w, what is compared is (g(h | c) + w g(h | none)) / (1 + w), the second term
without a gradient, so that g(h | c) learns to lie as far beyond g(h | none) as w says. At w = 0 it is the plain loss.

RUN/recipe.json   the settings          RUN/index/ or views.safetensors, RUN/latents/   as any training
RUN/log.jsonl, samples/, checkpoints/, best/, model/   model/ is the student alone
RUN/pipeline/     the flow's pipeline with the student in it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from starflow.data.images import from_pil, save_grid
from starflow.data.latent_cache import CachedLatents
from starflow.errors import UserError
from starflow.evaluate.features import load_mobilenet
from starflow.flow.model import Flow
from starflow.latents import Autoencoder, DecoderModule, TrainableAutoencoder
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.student import Student, StudentConfig, StudentOutput, group_sizes, inputs_of
from starflow.train.distributed import World
from starflow.train.loader import uniform
from starflow.train.loop import fit
from starflow.train.recipe import CompanionRecipe, Objective
from starflow.train.settings import TrainSettings, network_precision
from starflow.train.tasks.decoder import FeatureCritic, MobileNetDistance, feature_critic_terms
from starflow.train.tasks.denoiser import CompanionStages, save_companion, save_pipeline, with_companions
from starflow.train.tasks.flow import FlowTask, own_batches

SCALED_BY = 64
"""Training latents whose states say what the mean square of a state is, at most."""


@dataclass(frozen=True)
class StudentLoss:
    """What a student is trained for; see the module.

    Raises:
        UserError: a number that cannot be.
    """

    power: float = 1.0
    """p of the weight (D + c)^-p of a term."""
    floor: float = 0.01
    """c of that weight."""
    alignment: float = 1.0
    """Weight of the flow's states beside the clean latent."""
    perceptual: float = 2.0
    """Weight of the distance of decoded pictures; 0 leaves it out."""
    adversarial: float = 1.0
    """Weight of the critic's mean score of decoded pictures; 0 leaves it out."""
    adversarial_from: int = 1500
    """Update at which the critic starts, once there is something to judge."""
    decode_every: int = 2
    """Of so many pictures of a batch one is decoded for both."""
    guidance: float = 4.0
    """The largest guidance weight, below which weights are drawn evenly; 0 trains no guidance."""
    guided: float = 0.5
    """Share of the pictures that are trained with a weight above 0."""
    drop_condition: float = 0.1
    """Share of the conditions that are replaced by none."""

    def __post_init__(self) -> None:
        numbers = (self.power, self.floor, self.alignment, self.perceptual, self.adversarial, self.adversarial_from)
        if min(*numbers, self.guidance) < 0 or self.decode_every < 1:
            raise UserError(
                "expected power, floor, alignment, perceptual, adversarial, adversarial_from and guidance >= 0 and "
                "decode_every >= 1"
            )
        if not (0 <= self.guided <= 1 and 0 <= self.drop_condition <= 1):
            raise UserError("expected guided and drop_condition in [0, 1]")

    @property
    def reads_pictures(self) -> bool:
        """Whether a term is of decoded pictures."""
        return self.perceptual > 0 or self.adversarial > 0


@dataclass(frozen=True)
class StudentRecipe(CompanionRecipe):
    """A student's training.

    Example:
        >>> StudentRecipe("mine", "glyphs", TrainSettings(steps=100)).loss.guidance
        4.0
    """

    temperature: float = 1.0
    """Factor on the noise that the student draws at by default, stored with it."""
    guidance: float | None = None
    """Guidance weight that the student draws at by default, stored with it, and of the guided row of the sample grids;
    empty is the model's own."""
    loss: StudentLoss = field(default_factory=StudentLoss)
    """What it is trained for."""


class StudentBatch(NamedTuple):
    """What the loss of one update reads."""

    z: Tensor
    """(B, C, H, W)"""
    clean: Tensor
    """(B, C, H, W)"""
    states: list[Tensor]
    """The flow's x^0 .. x^(K-1), each (B, N, D)."""
    condition: Tensor | None
    null: Tensor | None
    """The condition of no prompt for each picture, or None where no guidance is trained."""
    guidance_B: Tensor
    decoded: list[int]
    """Rows that are compared as pictures."""
    use_critic: bool


class StudentObjective(nn.Module):
    """Student and critic with one loss for both, in which each term has gradients for one of them alone."""

    def __init__(
        self,
        student: Student,
        weights: StudentLoss,
        scales: Sequence[float],
        decode: Callable[[Tensor], Tensor] | None = None,
        distance: MobileNetDistance | None = None,
        critic: FeatureCritic | None = None,
    ) -> None:
        """Put them together.

        Args:
            student: what is trained.
            weights: see `StudentLoss`.
            scales: mean squares of the clean latents and of the flow's states x^0 .. x^(K-1).
            decode: latents (B, C, H, W) to pictures, with a gradient; None compares no pictures.
            distance: of those pictures.
            critic: of those pictures' features.
        """
        super().__init__()
        self.student, self.critic = student, critic
        self._weights, self._scales = weights, list(scales)
        # Not submodules: their weights are not trained, averaged or saved.
        self._frozen = (decode, distance)

    def forward(self, batch: StudentBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and each distance by itself, in units of the target's mean square."""
        weights, out = self._weights, self.guided(batch)
        distances = self.distances(out, batch)
        terms = {name: one.mean() for name, one in distances.items()}
        weighted = [
            (1.0 if name == "clean" else weights.alignment)
            * (one * (one.detach() + weights.floor) ** -weights.power).mean()
            for name, one in distances.items()
        ]
        loss = torch.stack(weighted).sum()
        if self._frozen[0] is not None:
            pictures = self.picture_terms(out.clean, batch)
            share = len(batch.decoded) * weights.decode_every / len(batch.z)  # as they stand for the whole batch
            factors = {"perceptual": weights.perceptual, "adversarial": weights.adversarial, "critic": 1.0}
            loss = loss + share * sum(factors[name] * term for name, term in pictures.items())
            terms |= pictures
        return loss, {name: term.detach() for name, term in terms.items()}

    def guided(self, batch: StudentBatch) -> StudentOutput:
        """What is compared: (g(h | c) + w g(h | none)) / (1 + w), which is g(h | c) itself where w is 0."""
        out: StudentOutput = self.student(batch.z, batch.condition, batch.guidance_B)
        if batch.null is None:
            return out
        with torch.no_grad():
            null: StudentOutput = self.student(batch.z, batch.null, None)

        def combined(own: Tensor, other: Tensor) -> Tensor:
            w = batch.guidance_B.view(-1, *[1] * (own.ndim - 1))
            return (own + w * other) / (1 + w)

        states = [combined(own, other) for own, other in zip(out.states, null.states, strict=True)]
        return StudentOutput(combined(out.clean, null.clean), states)

    def distances(self, out: StudentOutput, batch: StudentBatch) -> dict[str, Tensor]:
        """D of each picture (B,), of the clean latent and of every state."""
        pairs = [("clean", out.clean, batch.clean)]
        states = zip(out.states, batch.states, strict=True)
        pairs += [(f"state_{number}", *pair) for number, pair in enumerate(states)]
        return {
            name: (own - wanted).square().flatten(1).mean(1) / scale
            for (name, own, wanted), scale in zip(pairs, self._scales, strict=True)
        }

    def picture_terms(self, clean: Tensor, batch: StudentBatch) -> dict[str, Tensor]:
        """Of the rows that are decoded: "perceptual", and with a critic "adversarial", the student's, and "critic"."""
        decode, distance = self._frozen
        assert decode is not None
        assert distance is not None
        use_critic = self.critic is not None and batch.use_critic
        if not batch.decoded:
            names = ("perceptual", "adversarial", "critic") if use_critic else ("perceptual",)
            return dict.fromkeys(names, clean.new_zeros(()))
        with torch.no_grad():
            theirs = distance.features(decode(batch.clean[batch.decoded]).float())
        ours = distance.features(decode(clean[batch.decoded]).float())
        terms = {"perceptual": distance.between(ours, theirs)}
        if use_critic:
            assert self.critic is not None
            condition = None if batch.condition is None else batch.condition[batch.decoded]
            terms |= feature_critic_terms(self.critic, ours, theirs, condition)
        return terms


class StudentTask(FlowTask):
    """Alignment of a student with its flow; see the module's docstring and `starflow.train.loop.Task`."""

    def __init__(
        self,
        teacher: StarFlowPipeline,
        student: Student,
        cache: CachedLatents,
        loss: StudentLoss,
        settings: TrainSettings,
        draw: Callable[[Student, Path], None],
        world: World,
    ) -> None:
        """Train this student of the teacher's flow.

        Args:
            teacher: whose flow and decoder stay as they are.
            student: real and equal in every process.
            cache: latents and conditions by index.
            loss: see `StudentLoss`.
            settings: see `TrainSettings`.
            draw: writes a sample grid of the student that it is handed.
            world: the processes that train together.
        """
        config = teacher.config
        objective = Objective(config.noise, config.noise_std, loss.drop_condition)
        super().__init__(teacher.flow, cache, objective, settings, _do_nothing, _do_nothing, world)
        self.teacher, self.weights, self._draw_student, self.flops = teacher, loss, draw, 0.0
        self.model = self._objective(student)

    def _objective(self, student: Student) -> StudentObjective:
        """The student with what its loss reads."""
        scales, weights = self._mean_squares(), self.weights
        if not weights.reads_pictures:
            return StudentObjective(student, weights, scales)
        decode, distance = _decoder(self.teacher.autoencoder), MobileNetDistance(load_mobilenet(), self._device)
        critic = None
        if weights.adversarial:
            some, _ = self.cache.posterior(max(self.train, key=len)[:1])
            with torch.no_grad():
                shapes = [one.shape for one in distance.features(decode(some.to(self._device)).float())]
            sizes = student.config
            with torch.random.fork_rng(devices=[]):  # the critic's first weights, equal in every process
                torch.manual_seed(self.settings.seed)
                critic = FeatureCritic(
                    [shape[1] for shape in shapes],
                    [min(shape[2:]) for shape in shapes],
                    sizes.num_classes,
                    sizes.txt_dim if sizes.txt_size else 0,
                ).to(self._device)
        return StudentObjective(student, weights, scales, decode, distance, critic)

    @torch.no_grad()
    def _traced(
        self, indices: Tensor, seed: int, step: int, rows: range, condition: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Clean latents, noise z, and the flow's states of noised latents."""
        mean, std = self.cache.posterior(indices)
        x = self._add_noise(mean, std, seed, step, rows)
        with network_precision(self.settings, self._device):
            trace = self.teacher.flow.trace(x, condition)
        return mean.to(x), trace.z, trace.states[:-1]

    def _mean_squares(self) -> list[float]:
        """The mean square of the clean latents and of every state, over some of the training latents."""
        some = max(self.train, key=len)[:SCALED_BY]
        clean, _, states = self._traced(some, 0, 0, range(len(some)), self._conditions(some, None))
        return [max(float(one.square().mean()), 1e-8) for one in (clean, *states)]

    def batch(self, step: int, rows: range) -> StudentBatch:  # type: ignore[override]
        """Noise and what the student is to make of it."""
        indices, seed, weights = self._indices(step, rows), self.settings.seed, self.weights
        dropped = self._dropped(step, rows)
        condition = self._conditions(indices, dropped)
        clean, z, states = self._traced(indices, seed, step, rows, condition)
        draws = uniform(rows, (2,), seed, "guidance", step)
        strength = weights.guidance if condition is not None else 0.0
        guidance_B = torch.where((draws[:, 0] < weights.guided) & ~dropped, strength * draws[:, 1], 0.0)
        decoded = [place for place, row in enumerate(rows) if row % weights.decode_every == 0]
        null = self._null(len(z)) if strength else None
        return StudentBatch(
            z, clean, states, condition, null, guidance_B.to(z), decoded, step >= weights.adversarial_from
        )

    def loss(self, model: nn.Module, batch: StudentBatch) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """The loss of student and critic, and its terms; see `StudentObjective`."""
        with network_precision(self.settings, self._device):
            loss: tuple[Tensor, dict[str, Tensor]] = model(batch)
        return loss

    def _null(self, count: int) -> Tensor | None:
        """The condition of no prompt, for so many pictures."""
        assert self.cache.null is not None
        if self.reads_labels:
            return torch.full((count,), -1, device=self._device)
        return self.cache.null.to(self._device, torch.float32).expand(count, -1, -1)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Distances of held-out latents, unguided; the loss is that of the clean latent."""
        assert isinstance(model, StudentObjective)
        names = ["clean", *(f"state_{number}" for number in range(len(self.teacher.flow.blocks)))]
        total = torch.zeros(len(names), device=self._device)
        for start, indices, weight in own_batches(self.heldout, self.world):
            condition = self._conditions(indices, None)
            clean, z, states = self._traced(indices, 0, 0, range(start, start + len(indices)), condition)
            none = torch.zeros(len(z), device=z.device)
            batch = StudentBatch(z, clean, states, condition, None, none, [], use_critic=False)
            with network_precision(self.settings, self._device):
                out = model.guided(batch)
            total += weight * torch.stack([one.mean() for one in model.distances(out, batch).values()])
        count = sum(map(len, self.heldout))
        found = {name: value / count for name, value in zip(names, self.world.all_reduce(total), strict=True)}
        return {"loss": found["clean"], **found}

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Write a sample grid of the student."""
        assert isinstance(model, StudentObjective)
        self._draw_student(model.student, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the student."""
        assert isinstance(model, StudentObjective)
        save_companion(model.student, folder)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """The distances of clean latent and of the state next to the noise."""
        return {"clean": f"{terms['clean']:.4f}", "last": f"{terms[f'state_{len(self.teacher.flow.blocks) - 1}']:.4f}"}


def _do_nothing(flow: Flow, path: Path) -> None:
    """The flow is neither drawn from nor saved."""


def _decoder(autoencoder: Autoencoder) -> Callable[[Tensor], Tensor]:
    """What turns latents into pictures with a gradient to the latents, and none to its weights."""
    if isinstance(autoencoder, TrainableAutoencoder):
        return DecoderModule(autoencoder).requires_grad_(False)
    return autoencoder.decode


def train_student(recipe: StudentRecipe, folder: Path, world: World, *, progress: bool = True) -> Path:
    """Train a student; what is in the folder already is not done again. Returns the pipeline's folder. Collective.

    Raises:
        UserError: the recipe cannot be carried out; the message says what is wrong.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    stages = CompanionStages(recipe, folder, world, progress=progress)
    cache, teacher = stages.cached_latents(), stages.teacher
    torch.manual_seed(recipe.train.seed)
    sizes = recipe.network
    config = StudentConfig(
        **inputs_of(teacher.flow),
        channels=sizes.channels,
        layers=group_sizes(sizes.layers, len(teacher.flow.blocks)),
        head_dim=sizes.head_dim,
        temperature=recipe.temperature,
        largest_guidance=recipe.loss.guidance if teacher.conditioner else 0.0,
        guidance=recipe.guidance if teacher.conditioner else None,
    )
    student = Student(config).to(world.device)
    stages.start(student)
    weight = teacher.config.guidance if recipe.guidance is None else recipe.guidance
    prompts = stages.prompts()

    def draw(trained: Student, path: Path) -> None:
        weights = (0.0, weight) if teacher.conditioner else (0.0,)
        draw_grid(with_companions(teacher, student=trained.eval()), prompts, weights, path)

    task = StudentTask(teacher, student, cache, recipe.loss, recipe.train, draw, world)
    count = sum(parameter.numel() for parameter in student.parameters())
    stages.run.notify(f"student: {count / 1e6:.1f} M parameters, {recipe.train.steps} steps")
    fit(task, recipe.train, folder, progress, world)
    return save_pipeline(stages, student=Student.from_pretrained(folder / "model"))


def draw_grid(pipeline: StarFlowPipeline, prompts: Sequence[str], weights: Sequence[float], path: Path) -> None:
    """One image a prompt by the student, seeds counting from 0, one row a guidance weight."""
    rows = [pipeline(prompts, guidance=weight, sampler="student", not_finite="keep").images for weight in weights]
    save_grid(torch.cat([from_pil(image) for row in rows for image in row]), path, columns=len(prompts))
