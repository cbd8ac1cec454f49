"""Fill a hole in a latent so that the whole is likely under the flow; see `starflow.edit.chains` for what that means.

Every method draws x_M given x_O from the flow's density p under guidance and temperature, in the limit that is named
below, if any; the log p that a filling comes with is the plain conditional one, unguided and at temperature 1.

- paper: STARFlow, arXiv 2506.06276, appendix D.1. It is no exact chain: pasting changes the latent, and its Jacobian's
  ratio is missing. It is kept for comparison.
- resample: K draws y of p, one taken in proportion to w(y) = p(x_O, y_M) q(y_O) / p(y). Exact as K grows.
- chain: prior-preserving steps in the noise, from what resampling gives. Exact as the steps grow.
- hmc: Hamiltonian steps on x_M, from the likeliest draw. Exact as the steps grow.
- auto: of two rounds, the filling that is likeliest under the plain density. A round is K draws of p where the hole is
  wide (`is_wide`), and otherwise a filter of K particles, which draws the hole token by token between the known ones in
  the block next to the noise (`GuidedFlow.particles`). A choice that was measured (docs/log.md), not an exact one: the
  likeliest is no draw, and through the other blocks a filter's known tokens depend on the hole.

Contract: a filling depends on its latent, hole, condition and seed alone, bit for bit, not on its batch: all that is
computed at once belongs to one filling.

Shapes: B fillings, C x H x W latents, K draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from starflow.edit.chains import Adapted, Problem, Step, hamiltonian_step, noise_step
from starflow.edit.density import GuidedFlow, effective_samples
from starflow.edit.masks import is_wide, spread_known
from starflow.errors import UserError
from starflow.flow.finite import NotFiniteError
from starflow.flow.model import Flow

Method = Literal["auto", "resample", "chain", "hmc", "paper"]

PAPER_NOISE = 1.0
"""tau of the paper's proposals."""

ROUNDS = 2
"""Of `auto`, K draws or particles each: the particles of a filter soon descend from a single one."""


@dataclass(frozen=True)
class InpaintSettings:
    """How a hole is filled.

    Raises:
        UserError: a value that no method can have.
    """

    method: Method = "auto"
    guidance: float = 0.0
    temperature: float = 1.0
    candidates: int = 16
    """K, draws that a filling starts from or is chosen of; of `auto` the draws or particles of a round."""
    steps: int = 20
    """Of `chain`, `hmc` and `paper`; the first third adapts its size and is not counted in the acceptance."""
    leapfrogs: int = 3
    """Of a Hamiltonian step."""
    spread: float = 0.3
    """s of q = N(x_O, s^2 I), in the latents' units."""
    keep: Literal["weighted", "likeliest"] = "weighted"
    """Of the draws of `resample`: one in proportion to its weight, or the one of the largest log p."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UserError(f"method is {self.method!r}, expected one of {', '.join(get_args(Method))}")
        if self.keep not in ("weighted", "likeliest"):
            raise UserError(f"keep is {self.keep!r}, expected 'weighted' or 'likeliest'")
        for name, least in (("candidates", 1), ("steps", 0), ("leapfrogs", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("temperature", "spread"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} is {getattr(self, name)}, expected above 0")
        if not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise UserError(f"guidance is {self.guidance}, expected at least 0 (0 is unguided)")


@dataclass(frozen=True)
class Filled:
    """Fillings, one a row."""

    x: Tensor
    """(B, C, H, W), the known part as it was given."""
    log_prob: Tensor
    """(B,) log p(x | condition) in nats, unguided and at temperature 1."""
    acceptance: Tensor
    """(B,) share of the chain's steps, after its warm-up, that were accepted; NaN where there are none."""
    effective_samples: Tensor
    """(B,) (sum w)^2 / sum w^2 of the draws' weights, at most K; NaN for a method without them."""


def inpaint(
    flow: Flow,
    latents: Tensor,
    hole: Tensor,
    condition: Tensor | None = None,
    null_condition: Tensor | None = None,
    *,
    seeds: Sequence[int],
    settings: InpaintSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    show: Callable[[int, Tensor], None] | None = None,
) -> Filled:
    """Fill holes.

    Args:
        flow: STARFlow or TarFlow.
        latents: (B, C, H, W), with the noise that the flow was trained on; their values in the hole count for nothing.
        hole: (B, 1, H, W) of bool, True is to be filled.
        condition: (B, ...), as `flow` takes it, or None.
        null_condition: (B, ...), what "no condition" is; needed where the guidance is above 0.
        seeds: one a row.
        settings: how.
        progress: called with (rows done, rows in all), rows in fractions of a thousandth.
        show: called with a row's number and what it is on the way, (1, C, H, W), its hole filled: once by `auto`, after
            each step of `hmc`.

    Raises:
        UserError: a hole of another shape, an empty one, not one seed a row, or what the flow cannot take.
    """
    settings = settings or InpaintSettings()
    if hole.shape != (len(latents), 1, *latents.shape[2:]) or hole.dtype != torch.bool:
        raise UserError(
            f"the hole is {hole.dtype} of shape {tuple(hole.shape)}, "
            f"expected bool of shape {(len(latents), 1, *latents.shape[2:])}"
        )
    if len(seeds) != len(latents):
        raise UserError(f"{len(seeds)} seeds for {len(latents)} latents: give one each")
    if not bool(hole.flatten(1).any(1).all()):
        raise UserError("a hole is empty, expected at least one latent to fill: leave that picture out")
    rows = []
    for row, seed in enumerate(seeds):
        given = [None if one is None else one[row : row + 1] for one in (condition, null_condition)]
        density = GuidedFlow(flow, given[0], given[1], settings.guidance, settings.temperature)
        known = latents[row : row + 1].to(flow.device, flow.work_dtype)
        problem = Problem(density, known, hole[row : row + 1].to(flow.device), settings.spread)
        part = _part_of(progress, show, row, len(seeds))
        rows.append(_Filling(problem, density, settings, Random(seed, known), part).run())
    parts = zip(*((one.x, one.log_prob, one.acceptance, one.effective_samples) for one in rows), strict=True)
    return Filled(*(torch.cat(part) for part in parts))


Report = Callable[[float, Tensor | None], None]
"""Called with the share of a row that is done, and what it is so far."""


def _part_of(
    progress: Callable[[int, int], None] | None, show: Callable[[int, Tensor], None] | None, row: int, rows: int
) -> Report:
    def report(share: float, x: Tensor | None) -> None:
        if progress is not None:
            progress(round(1000 * (row + share)), 1000 * rows)
        if show is not None and x is not None and bool(x.isfinite().all()):
            show(row, x)

    return report


STREAM = 0x1E3779B97F4A7C15
"""What a seed is combined with, bit by bit, for numbers of its own."""


class Random:
    """Random numbers of one seed, like a latent; other ones than those that a picture of that seed is drawn from.

    A hole in a picture of the model's own would otherwise be filled by the noise that made it: by itself.
    """

    def __init__(self, seed: int, like: Tensor) -> None:
        if not 0 <= seed < 2**63:
            raise UserError(f"the seed is {seed}, expected 0 to {2**63 - 1}")
        self.generator, self.like = torch.Generator("cpu").manual_seed(seed ^ STREAM), like

    def normal(self, rows: int, *shape: int) -> Tensor:
        """Standard normal (rows, *shape), by default of a latent's shape, drawn in float32 on the CPU."""
        shape = shape or tuple(self.like.shape[1:])
        drawn = torch.randn(rows, *shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return drawn.to(self.like.device, self.like.dtype)

    def log_uniform(self, rows: int) -> Tensor:
        """log of uniform numbers (rows,)."""
        drawn = torch.rand(rows, generator=self.generator, dtype=torch.float32, device="cpu")
        return drawn.log().to(self.like.device, self.like.dtype)

    def choose(self, log_weight: Tensor) -> Tensor:
        """An index, in proportion to the weights, of which NaN is 0; (1,).

        Raises:
            NotFiniteError: no weight is above 0.
        """
        log_weight = finite(log_weight)
        weight = (log_weight - log_weight.max()).exp().cpu()
        return torch.multinomial(weight, 1, generator=self.generator)


def finite(nats: Tensor) -> Tensor:
    """What is not a finite number as minus infinity, which nothing chooses.

    Raises:
        NotFiniteError: nothing is finite.
    """
    nats = torch.where(nats.isfinite(), nats, -math.inf)
    if not bool(nats.isfinite().any()):
        raise NotFiniteError("no filling came out finite: lower the guidance, or use another checkpoint")
    return nats


@dataclass
class _Filling:
    """One row at work."""

    problem: Problem
    density: GuidedFlow
    settings: InpaintSettings
    random: Random
    report: Report
    effective: float = math.nan
    probabilities: list[float] = field(default_factory=list)

    def run(self) -> Filled:
        x = {
            "paper": self.paper,
            "resample": self.resample,
            "chain": self.chain,
            "hmc": self.hmc,
            "auto": self.auto,
        }[self.settings.method]()
        nats = self.plain.log_hole(x)
        self.report(1, None)
        accepted = sum(self.probabilities) / len(self.probabilities) if self.probabilities else math.nan
        return Filled(x, nats, nats.new_tensor([accepted]), nats.new_tensor([self.effective]))

    @property
    def plain(self) -> Problem:
        """The same hole, under the density that is neither guided nor tempered."""
        return dataclasses.replace(self.problem, density=GuidedFlow(self.density.flow, self.density.condition))

    def draws(self) -> Tensor:
        """z of K draws."""
        return self.random.normal(self.settings.candidates)

    def resample(self) -> Tensor:
        return self.problem.paste(self.density.decode(self._resampled(self.settings.keep)))

    def _resampled(self, keep: str) -> Tensor:
        """z of the draw that is kept, (1, C, H, W)."""
        z = self.draws()
        y = self.density.decode(z)
        weight = self.problem.log_weight(y)
        self.effective = effective_samples(weight)
        if keep == "weighted":
            return z[self.random.choose(weight)]
        return z[finite(self.problem.log_hole(y)).argmax().view(1)]

    def chain(self) -> Tensor:
        z, size = self._resampled("weighted"), Adapted(0.3, target=0.234, largest=1.0)
        parts = (self.problem.hole, torch.ones_like(self.problem.hole))
        for number in range(self.settings.steps):
            noise, uniform = self.random.normal(1), self.random.log_uniform(1)
            step = noise_step(self.problem, z, parts[number % 2], size.size, noise, uniform)
            z, size = step.x, self.told(number, step, size)
            self.report(number / self.settings.steps, None)
        return self.problem.paste(self.density.decode(z))

    def hmc(self) -> Tensor:
        x, size = self.problem.paste(self.density.decode(self._resampled("likeliest"))), Adapted(0.05, 0.65, 0.5)
        for number in range(self.settings.steps):
            step = self.moved(x, size.size, self.random.log_uniform(1))
            x, size = step.x, self.told(number, step, size)
            self.report(number / self.settings.steps, x)
        return x

    def told(self, number: int, step: Step, size: Adapted) -> Adapted:
        """Adapt while the chain warms up, then count."""
        if number < self.settings.steps // 3:
            return size.after(step)
        self.probabilities.append(float(step.accepted.double().mean()))
        return size

    def auto(self) -> Tensor:
        """Of what the rounds draw the likeliest, unguided and at temperature 1."""
        draw = self.pasted if is_wide(self.problem.hole) else self.filtered
        drawn: list[Tensor] = []
        for number in range(ROUNDS):
            drawn.append(draw())
            self.report((number + 1) / (ROUNDS + 1), drawn[0][:1] if number == 0 else None)
        x = torch.cat(drawn)
        return x[finite(self.plain.log_hole(x)).argmax().view(1)]

    def pasted(self) -> Tensor:
        """K draws, the known part over each, (K, C, H, W)."""
        return self.problem.paste(self.density.decode(self.draws()))

    def filtered(self) -> Tensor:
        """One of K particles by its weight, (1, C, H, W)."""
        known, hole = self.problem.known, self.problem.hole
        uniform = self.random.log_uniform(len(self.density.tokens_of(hole))).exp()
        found = self.density.particles(spread_known(known, ~hole), self.draws(), hole, uniform)
        return self.problem.paste(found.x[self.random.choose(found.log_weight)])

    def moved(self, x: Tensor, size: float, log_uniform: Tensor) -> Step:
        """A Hamiltonian step of every row."""
        momentum = self.random.normal(len(x))
        return hamiltonian_step(self.problem, x, size, self.settings.leapfrogs, momentum, log_uniform)

    def paper(self) -> Tensor:
        x = torch.where(self.problem.hole, self.random.normal(1), self.problem.known)
        nats = self.problem.log_hole(x)
        for _ in range(self.settings.steps):
            z = self.density.encode(x)[0] + torch.where(self.problem.hole, PAPER_NOISE * self.random.normal(1), 0)
            proposal = self.problem.paste(self.density.decode(z))
            found = self.problem.log_hole(proposal)
            accepted = bool(self.random.log_uniform(1) < found - nats)
            self.probabilities.append(float(accepted))
            if accepted:
                x, nats = proposal, found
        return x
