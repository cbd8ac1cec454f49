"""The density that an edited picture is drawn from: the flow's own, guided and tempered, exactly as its sampler draws.

Guidance turns the Gaussian N(mu, sigma^2) of every token, given the tokens before it, into N(mu_w, sigma_w^2), and a
temperature t turns that into N(mu_w, t^2 sigma_w^2). The result is an autoregressive flow again, with its own noise
z = (x - mu_w) / (t sigma_w) in every guided block, so that its density has a closed form,

    log p_wt(x) = log N(z; 0, I) - sum over blocks and tokens of log sigma_w - D log t,

and one parallel pass of both branches evaluates it: the tokens so far are given. At guidance 0 and temperature 1 it is
`flow.log_prob` (STARFlow, arXiv 2506.06276, eq. 3 to 5 and section 3.5).

Shapes: B rows, C x H x W latents, N tokens, D token channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from starflow.flow import block as affine
from starflow.flow.block import AutoregressiveBlock, run_offloaded
from starflow.flow.model import Flow
from starflow.flow.tokens import Grid, in_order, patchify
from starflow.sampling import guidance as rules
from starflow.sampling.guidance import Guidance
from starflow.sampling.policy import SampleSettings
from starflow.sampling.predictor import Predictor, SolverOptions, SolverResult, select_pictures
from starflow.sampling.sampler import branch_conditions, run, solve_blocks
from starflow.sampling.solvers import solve_sequential


class Density(Protocol):
    """A density with an invertible map to standard normal noise; all that most chains need to know."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data (B, C, H, W) to noise z of that shape, and log |det dz/dx| (B,) in nats."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Noise to data, the inverse of `encode`."""
        ...


def log_density(density: Density, x: Tensor) -> Tensor:
    """log p(x) of each row in nats, (B,)."""
    z, logdet = density.encode(x)
    return affine.log_normal(z) + logdet


@dataclass(frozen=True)
class Particles:
    """Weighted fillings, as `GuidedFlow.particles` draws them."""

    x: Tensor
    """(K, C, H, W)"""
    log_weight: Tensor
    """(K,), up to a constant."""


@dataclass(frozen=True)
class GuidedFlow:
    """The density of one condition, which any number of rows share.

    Args:
        flow: STARFlow or TarFlow.
        condition: one row, as `flow` takes it, or None.
        null_condition: one row, what "no condition" is; needed where the guidance is above 0 and the flow has none.
        guidance: weight w >= 0 of the gaussian rule.
        temperature: t > 0, the factor on the noise.
    """

    flow: Flow
    condition: Tensor | None = None
    null_condition: Tensor | None = None
    guidance: float = 0.0
    temperature: float = 1.0

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data (B, C, H, W) to this density's noise, and log |det dz/dx| (B,) in nats; gradients reach x."""
        tokens_BND, grid = self.flow.to_tokens(x)
        logdet = tokens_BND.new_zeros(len(x))
        for number, block in enumerate(self.flow.iter_blocks()):
            tokens_BND, log_sigma = self._forward(number, block, tokens_BND, grid)
            logdet = logdet - log_sigma.sum((1, 2))
        prior_ND = self.flow.prior_log_std()
        if prior_ND is not None:
            tokens_BND, logdet = tokens_BND * torch.exp(-prior_ND), logdet - prior_ND.sum()
        z = self.flow.from_tokens(tokens_BND, grid) / self.temperature
        return z, logdet - z[0].numel() * math.log(self.temperature)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Noise (B, C, H, W) to data token by token: a draw, where z is standard normal."""
        given, null = self._rows(len(z))
        settings = SampleSettings(self.guidance, "sequential")
        return run(self.flow, self.temperature * z, given, null, settings).x

    @torch.no_grad()
    def particles(self, x: Tensor, z: Tensor, hole: Tensor, uniform: Tensor) -> Particles:
        """Draw the hole's tokens of the last block, the one next to the noise, given the known ones before and after.

        This is sequential Monte Carlo (Doucet and Johansen, "A tutorial on particle filtering and smoothing", 2009).
        Token after token, what a particle has in the hole is drawn from this density, and what is known is imposed on
        it; the particle's weight is multiplied by the plain density of what is known, unguided and at temperature 1,
        as real pictures have next to no density under guidance. Where the effective number of particles falls below
        half, they are drawn anew in proportion to their weights. At guidance 0 and temperature 1 the weighted particles
        are draws of p(u_M | u_O) of the last block's tokens u as their number grows.

        Args:
            x: (1, C, H, W), a first filling: through the other blocks the known tokens u_O depend on it a little.
            z: noise (K, C, H, W) of K particles, of which that of the hole's tokens is used.
            hole: (1, 1, H, W) of bool.
            uniform: (N,), uniform numbers for drawing anew, one a token.

        Returns:
            The particles: their tokens, drawn and known, taken through the other blocks, and their weights.
        """
        u_BND, grid = self.flow.to_tokens(x)
        last = len(self.flow.blocks) - 1
        for number, block in enumerate(self.flow.iter_blocks()):
            if number < last:
                u_BND, _ = self._forward(number, block, u_BND, grid)
        prior_ND = self.flow.prior_log_std()
        tokens = (
            u_BND,
            self.tokens_of(hole)[None, :, None],
            torch.zeros_like(u_BND) if prior_ND is None else prior_ND[None],
        )
        log_weight_K = z.new_zeros(len(z))

        def solve_block(number: int, predictor: Predictor, noise_BNC: Tensor) -> SolverResult:
            nonlocal log_weight_K
            if number < last:
                return solve_sequential(predictor, noise_BNC, SolverOptions(), lambda _: None)
            own_u, own_hole, own_prior = (in_order(one, backwards=predictor.block.spec.backwards) for one in tokens)
            known = _Known(own_u, own_hole.flatten().tolist(), own_prior, uniform)
            x_BNC, log_weight_K = _filter(predictor, noise_BNC, known)
            return SolverResult(x_BNC, predictor.tokens - predictor.first, x_BNC.new_zeros(len(x_BNC)))

        given, null = self._rows(len(z))
        settings = SampleSettings(self.guidance, "sequential")
        made = solve_blocks(self.flow, self.temperature * z, given, null, settings, solve_block).x
        return Particles(made, log_weight_K)

    def tokens_of(self, hole: Tensor) -> Tensor:
        """(1, 1, H, W) of latents to (N,) of tokens: those that hold any latent of the hole."""
        return patchify(hole.float(), self.flow.config.patch_size)[0].amax(-1) > 0

    def _rows(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        def expand(one: Tensor | None) -> Tensor | None:
            return None if one is None else one.expand(batch, *one.shape[1:])

        return expand(self.condition), expand(self.null_condition) if self.guidance else None

    def _guidance(self, like: Tensor) -> Guidance | None:
        return SampleSettings(self.guidance).guidance_for(like)

    def _conditions(self, like: Tensor) -> list[Tensor | None]:
        given, null = self._rows(len(like))
        return branch_conditions(self.flow, given, null, len(like), self._guidance(like))

    def _last_log_scale(self, like: Tensor) -> Tensor:
        """log of what standard normal noise is multiplied by before the last block: temperature and prior."""
        prior_ND = self.flow.prior_log_std()
        scale = like.new_tensor(math.log(self.temperature))
        return scale if prior_ND is None else prior_ND + scale

    def _forward(self, number: int, block: AutoregressiveBlock, x_BND: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """One block from data to noise: z in raster order and log sigma in the block's own, both guided."""
        rotary = self.flow.block_rotary(block, self.flow.rotary(grid))
        guidance = self._guidance(x_BND) if self.flow.guided_blocks[number] else None
        conditions = self._conditions(x_BND)
        if guidance is None:
            return self._pass(block, x_BND, conditions[0], rotary)
        x_2BND = torch.cat((x_BND, x_BND))
        both = None if conditions[0] is None else torch.cat([one for one in conditions if one is not None])
        z_2BND, log_sigma = self._pass(block, x_2BND, both, rotary)
        backwards = block.spec.backwards
        x_2BNC, z_2BNC = in_order(x_2BND, backwards=backwards), in_order(z_2BND, backwards=backwards)
        (mu_c, mu_u), (log_c, log_u) = (x_2BNC - log_sigma.exp() * z_2BNC).chunk(2), log_sigma.chunk(2)
        weight = guidance.weights(0, x_BND.shape[1], x_BND.shape[1])
        mu, log_sigma = rules.gaussian(mu_c, log_c, mu_u, log_u, weight)
        z_BNC = affine.forward(in_order(x_BND, backwards=backwards), mu, log_sigma)
        return in_order(z_BNC, backwards=backwards), log_sigma

    def _pass(
        self, block: AutoregressiveBlock, x_BND: Tensor, condition: Tensor | None, rotary: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = (x_BND, condition, rotary)
        passed: tuple[Tensor, Tensor]
        passed = (
            block(*given)
            if self.flow.offloaded_to is None
            else run_offloaded(block, self.flow.weights_on_device, *given)
        )
        return passed


@dataclass(frozen=True)
class _Known:
    """What a filter of particles is given of a block's tokens, in the block's own order."""

    u_1NC: Tensor
    hole: list[bool]
    prior_1NC: Tensor
    """log of what standard normal noise is multiplied by before the block."""
    uniform_N: Tensor


def _filter(predictor: Predictor, noise_BNC: Tensor, known: _Known) -> tuple[Tensor, Tensor]:
    """A block's tokens (B, N, C), those in the hole from their noise, the others known; and log weights (B,)."""
    x_BNC, log_weight_B = known.u_1NC.expand_as(noise_BNC).clone(), noise_BNC.new_zeros(len(noise_BNC))
    predictor.prefill()
    if predictor.first and known.hole[0]:
        x_BNC[:, :1] = noise_BNC[:, :1]  # without a start token the first one is the noise itself
    for start, stop in _runs(known.hole, predictor.first):
        run = slice(start, stop)
        hidden_RTD = predictor.hidden_states(predictor.inputs(x_BNC, start, stop), start)
        if known.hole[start]:
            weight = None if predictor.guidance is None else predictor.guidance.weights(start, 1, predictor.tokens)
            x_BNC[:, run] = affine.inverse(noise_BNC[:, run], *predictor.gaussian(hidden_RTD, weight))
            continue
        plain_BTC, log_sigma = predictor.block.gaussian(predictor.block.outputs(hidden_RTD[: len(x_BNC)]))
        log_scale = log_sigma + known.prior_1NC[:, run]
        z_BTC = affine.forward(x_BNC[:, run], plain_BTC, log_scale)
        log_weight_B = log_weight_B + (-0.5 * z_BTC.square() - log_scale).sum((1, 2))
        log_weight_B = torch.where(log_weight_B.isfinite(), log_weight_B, -math.inf)
        if effective_samples(log_weight_B) < len(x_BNC) / 2:
            drawn_B = systematic(log_weight_B, known.uniform_N[start])
            x_BNC, log_weight_B = x_BNC[drawn_B], torch.zeros_like(log_weight_B)
            predictor = select_pictures(predictor, drawn_B, predictor.prefix_length + stop - predictor.first)
    return x_BNC, log_weight_B


def effective_samples(log_weight: Tensor) -> float:
    """(sum w)^2 / sum w^2: how many of the draws the weights rest on, 1 to their number."""
    weight = (log_weight.double() - log_weight.max()).exp()
    return float(weight.sum().square() / weight.square().sum())


def systematic(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """As many indices as there are weights (K,), index i about K w_i times: those below (k + uniform) / K of the sum.

    >>> systematic(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), torch.tensor(0.5)).tolist()
    [0, 0, 1, 2]
    """
    weight = (log_weight.double() - log_weight.max()).exp()
    place = (torch.arange(len(weight), device=weight.device) + uniform.double()) / len(weight)
    return torch.searchsorted(weight.cumsum(0) / weight.sum(), place).clamp(max=len(weight) - 1)


def _runs(hole: list[bool], first: int) -> Iterator[tuple[int, int]]:
    """Tokens first, .. in spans that one pass predicts: a run of known ones, or a single one of the hole."""
    start = first
    while start < len(hole):
        stop = start + 1
        while not hole[start] and stop < len(hole) and not hole[stop]:
            stop += 1
        yield start, stop
        start = stop
