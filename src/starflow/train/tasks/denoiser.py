"""Training of a learned denoiser, and the stages that it shares with the training of a student.

Flow-score matching (STARFlow-V, arXiv 2511.20462): of noised latents x, the frozen flow's own backward pass gives
t = -sigma grad_x log p(x | c), and a small network s(x) without a causal mask learns it by the squared error, summed
over a latent. x - sigma s(x) is then the clean latent (Tweedie's formula), without the pass through the flow.

RUN/recipe.json   the settings          RUN/index/ or views.safetensors, RUN/latents/   as any training
RUN/log.jsonl, samples/, checkpoints/, best/, model/   model/ is the denoiser alone
RUN/pipeline/     the flow's pipeline with the denoiser in it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from starflow.conditioning import Conditioner
from starflow.config import to_dict
from starflow.data.images import save_grid
from starflow.data.latent_cache import CachedLatents
from starflow.errors import UserError
from starflow.flow.model import Flow
from starflow.latents import Autoencoder
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.denoise import Denoiser, DenoiserConfig, score_of
from starflow.sampling.student import Companion, Student, inputs_of
from starflow.train.distributed import World
from starflow.train.loop import fit
from starflow.train.recipe import CompanionRecipe, ConditioningRecipe, Objective, Recipe
from starflow.train.recipe_keys import check_idle_keys
from starflow.train.run import Run, keep_recipe
from starflow.train.settings import TrainSettings, network_precision
from starflow.train.stages import DEFAULT_PROMPTS, Stages
from starflow.train.tasks.flow import FlowTask, own_batches

FREE = ("name", "prompts", "guidance", "train", "loss", "temperature")
"""Keys and sections of a recipe that may change in a run that has begun."""


class CompanionStages(Stages):
    """The stages up to the latents, with the autoencoder and the conditioner of the teacher."""

    def __init__(self, recipe: CompanionRecipe, folder: Path, world: World, *, progress: bool) -> None:
        """Prepare the run's folder, and load the teacher.

        Raises:
            UserError: no such model, a folder of another run, or a key of the data that does nothing.
        """
        self.companion = recipe
        self.teacher = StarFlowPipeline.from_pretrained(recipe.teacher, world.device)
        config = self.teacher.config
        kind = config.conditioner.kind if config.conditioner else "none"
        inner = Recipe(
            recipe.name,
            recipe.train,
            recipe.data,
            conditioning=ConditioningRecipe(kind="class" if kind == "class" else "none" if kind == "none" else "text"),
            objective=Objective(noise=config.noise, noise_std=config.noise_std),
        )
        check_idle_keys(inner)
        keep_recipe(recipe, FREE, folder, world)
        super().__init__(Run(inner, folder, world.device, progress and world.is_main, world))

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The teacher's."""
        return self.teacher.autoencoder

    @cached_property
    def conditioner(self) -> Conditioner | None:
        """The teacher's."""
        return self.teacher.conditioner

    def _size_multiple(self) -> int:
        return self.teacher.size_multiple

    def cached_latents(self) -> CachedLatents:
        """The latents to train from, encoded where they are missing.

        Raises:
            UserError: a cache of other latents or other conditions than the teacher's.
        """
        if not self.companion.latents:
            self.cache_latents()
        cache = CachedLatents(Path(self.companion.latents or self.run.folder / "latents").expanduser())
        channels, spec = self.teacher.autoencoder.spec.channels, self.teacher.config.conditioner
        mean, _ = cache.posterior(torch.cat(cache.indices("train"))[:1])
        expected = (channels, None if spec is None else (spec.size, spec.dim))
        found = (mean.shape[1], None if cache.null is None else tuple(cache.null.shape))
        if found != expected:
            raise UserError(
                f"{cache.folder} holds latents of {found[0]} channels with conditions of shape {found[1]}, the model "
                f"'{self.companion.teacher}' reads {expected[0]} and {expected[1]}: name a cache that it was trained on"
            )
        return cache

    def start(self, network: Companion) -> None:
        """Give a new network the weights that `train.init_from` names, RUN/model of another training of its kind.

        Raises:
            UserError: a folder of another network, or of other sizes or another teacher than this one's.
        """
        source = self.companion.train.init_from
        if not source:
            return
        found = type(network).from_pretrained(Path(source).expanduser())
        ours, theirs = to_dict(network.config), to_dict(found.config)
        wrong = [key for key in ours if key not in ("temperature", "guidance") and ours[key] != theirs[key]]
        if wrong:
            raise UserError(
                f"train.init_from: {source} has another {', '.join(wrong)} ({theirs[wrong[0]]}) than the recipe "
                f"({ours[wrong[0]]}): give the recipe its sizes and its teacher, or leave init_from out"
            )
        network.load_state_dict(found.state_dict())

    def prompts(self) -> list[str]:
        """The prompts of the sample grids."""
        if self.conditioner is None:
            return [""] * 8
        return list(self.companion.prompts or self.conditioner.spec.names[:8] or DEFAULT_PROMPTS)


def with_companions(
    teacher: StarFlowPipeline, student: Student | None = None, denoiser: Denoiser | None = None
) -> StarFlowPipeline:
    """A pipeline of the teacher's parts, and what stands beside its flow: what is given, or else the teacher's own.

    With a denoiser it is what samples are cleaned by.
    """
    config = teacher.config if denoiser is None else dataclasses.replace(teacher.config, cleaning="denoiser")
    pipeline = StarFlowPipeline(teacher.flow, teacher.autoencoder, teacher.conditioner, config)
    pipeline.student, pipeline.denoiser = student or teacher.student, denoiser or teacher.denoiser
    return pipeline


def save_pipeline(stages: CompanionStages, student: Student | None = None, denoiser: Denoiser | None = None) -> Path:
    """Write RUN/pipeline, the teacher's pipeline with what was trained beside its flow; the main process does."""
    folder = stages.run.folder / "pipeline"
    stages.run.world.run_on_main(lambda: with_companions(stages.teacher, student, denoiser).save_pretrained(folder))
    return folder


def save_companion(model: nn.Module, folder: Path) -> None:
    """Write a network that stands beside a flow."""
    assert isinstance(model, Companion)
    model.save_pretrained(folder)


@dataclass(frozen=True)
class DenoiserRecipe(CompanionRecipe):
    """A denoiser's training.

    Example:
        >>> DenoiserRecipe("mine", "glyphs", TrainSettings(steps=100)).drop_condition
        0.1
    """

    drop_condition: float = 0.1
    """Share of the conditions that are replaced by none."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_condition <= 1:
            raise UserError(f"drop_condition is {self.drop_condition}, expected a share from 0 to 1")


class DenoiserBatch(NamedTuple):
    """What the loss of one update reads."""

    x: Tensor
    """Noised latents (B, C, H, W)."""
    target: Tensor
    """-sigma grad_x log p(x | c), of the same shape."""
    condition: Tensor | None


class DenoiserTask(FlowTask):
    """Flow-score matching; see the module's docstring and `starflow.train.loop.Task`."""

    def __init__(
        self,
        teacher: StarFlowPipeline,
        denoiser: Denoiser,
        cache: CachedLatents,
        drop_condition: float,
        settings: TrainSettings,
        world: World,
    ) -> None:
        """Train this denoiser of the teacher's flow, which stays as it is.

        Args:
            teacher: whose flow gives the scores.
            denoiser: real and equal in every process.
            cache: latents and conditions by index.
            drop_condition: share of the conditions that are replaced by none.
            settings: see `TrainSettings`.
            world: the processes that train together.
        """
        objective = Objective("gaussian", teacher.config.noise_std, drop_condition)
        super().__init__(teacher.flow, cache, objective, settings, _do_nothing, _do_nothing, world)
        self.teacher, self.model, self.flops = teacher, denoiser, 0.0

    def _scored(self, indices: Tensor, seed: int, step: int, rows: range, condition: Tensor | None) -> DenoiserBatch:
        x = self._noised(indices, seed, step, rows)
        with network_precision(self.settings, self._device):
            target = -self.objective.noise_std * score_of(self.teacher.flow, x, condition)
        return DenoiserBatch(x, target.to(x.dtype), condition)

    def batch(self, step: int, rows: range) -> DenoiserBatch:  # type: ignore[override]
        """Noised latents and the scores that the flow gives them."""
        indices, seed = self._indices(step, rows), self.settings.seed
        return self._scored(indices, seed, step, rows, self._conditions(indices, self._dropped(step, rows)))

    def loss(self, model: nn.Module, batch: DenoiserBatch) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """The squared error summed over a latent, the mean over pictures; and its share of the target's square."""
        with network_precision(self.settings, self._device):
            error = model(batch.x, batch.condition) - batch.target
        loss = error.square().flatten(1).sum(1).mean()
        return loss, {"unexplained": loss.detach() / batch.target.square().flatten(1).sum(1).mean()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The loss of held-out latents, the share of the target's square that is missed, and errors to clean latents.

        The errors are mean squares: of the network's clean latents, of Tweedie's step, and of the noised ones.
        """
        total = torch.zeros(5, device=self._device)
        sigma = self.objective.noise_std
        for start, indices, weight in own_batches(self.heldout, self.world):
            batch = self._scored(indices, 0, 0, range(start, start + len(indices)), self._conditions(indices, None))
            with network_precision(self.settings, self._device):
                out = model(batch.x, batch.condition)
            clean = self.cache.posterior(indices)[0].to(batch.x)
            ways = [batch.x - sigma * one for one in (out, batch.target)]
            pairs = [(out, batch.target), (0 * out, batch.target), *((way, clean) for way in (*ways, batch.x))]
            total += weight * torch.stack([(one - other).square().mean() for one, other in pairs]).float()
        count = sum(map(len, self.heldout))
        missed, square, own, tweedie, noised = (value / count for value in self.world.all_reduce(total))
        return {
            "loss": missed,
            "unexplained": missed / max(square, 1e-12),
            "error": own,
            "error_tweedie": tweedie,
            "error_noised": noised,
        }

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Rows: held-out latents decoded clean, noised, after a Tweedie step, and after the network."""
        assert isinstance(model, Denoiser)
        some = max(self.heldout, key=len)[:8]
        batch = self._scored(some, 0, 0, range(len(some)), self._conditions(some, None))
        tweedie = batch.x - self.objective.noise_std * batch.target
        rows = (self.cache.posterior(some)[0].to(batch.x), batch.x, tweedie, model.clean(batch.x, batch.condition))
        save_grid(torch.cat([self.teacher.autoencoder.decode(one) for one in rows]), path, columns=len(some))

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the denoiser."""
        save_companion(model, folder)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """The share of the target's square that is missed."""
        return {"unexplained": f"{terms['unexplained']:.4f}"}


def _do_nothing(flow: Flow, path: Path) -> None:
    """The flow is neither drawn from nor saved."""


def train_denoiser(recipe: DenoiserRecipe, folder: Path, world: World, *, progress: bool = True) -> Path:
    """Train a denoiser; what is in the folder already is not done again. Returns the pipeline's folder. Collective.

    Raises:
        UserError: the recipe cannot be carried out; the message says what is wrong.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    stages = CompanionStages(recipe, folder, world, progress=progress)
    teacher, sizes = stages.teacher, recipe.network
    if not teacher.config.noise_std:
        raise UserError(f"'{recipe.teacher}' was trained without Gaussian noise: it needs no denoiser")
    cache = stages.cached_latents()
    torch.manual_seed(recipe.train.seed)
    config = DenoiserConfig(
        **inputs_of(teacher.flow),
        channels=sizes.channels,
        layers=(sizes.layers,) if isinstance(sizes.layers, int) else sizes.layers,
        head_dim=sizes.head_dim,
        noise_std=teacher.config.noise_std,
    )
    denoiser = Denoiser(config).to(world.device)
    stages.start(denoiser)
    task = DenoiserTask(teacher, denoiser, cache, recipe.drop_condition, recipe.train, world)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    stages.run.notify(f"denoiser: {count / 1e6:.1f} M parameters, {recipe.train.steps} steps")
    fit(task, recipe.train, folder, progress, world)
    return save_pipeline(stages, denoiser=Denoiser.from_pretrained(folder / "model"))
