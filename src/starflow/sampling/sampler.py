"""Noise to data through all blocks of a flow: `sample`, and `run`, which also says what the solvers did.

`noise_from_seeds` draws the noise: a picture's is a function of its seed alone, the same on every device and in every
batch. `best_candidates` samples several candidates of each picture and keeps the one that the flow itself finds the
likeliest, by its exact density log p(x | condition). A temperature under 1 moves every token towards its mode; this
looks at the whole picture.

Contract: deterministic, as all randomness is in the noise that the caller drew. A picture, its candidates, and which of
them is kept depend on nothing else in the batch. Needs no autograd.

Shapes: B pictures, K candidates of each, C x H x W data, N tokens, D token channels, R rows of a guided batch.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow.finite import broken_block, broken_rows, check_finite
from starflow.flow.model import Flow
from starflow.flow.tokens import Grid, check_tensor, in_order
from starflow.nn.attention import CachePool
from starflow.nn.layers import is_hooked
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.sampling.guidance import Guidance, Rule, Schedule
from starflow.sampling.policy import BlockPolicy, CacheDtype, SampleSettings, SolverChoice, block_policies
from starflow.sampling.predictor import Predictor, Solver, SolverOptions, SolverResult, TokenEngine, TokenProgress
from starflow.sampling.solvers import solve_jacobi, solve_sequential

SOLVERS: dict[str, Solver] = {"sequential": solve_sequential, "jacobi": solve_jacobi}

ProgressCallback = Callable[[int, int], None]
"""Called with the tokens that are solved so far and in all, over every block."""


def sample(
    model: Flow,
    noise: Tensor,
    condition: Tensor | None = None,
    null_condition: Tensor | None = None,
    guidance: float | Tensor = 0.0,
    solver: SolverChoice = "sequential",
    guidance_rule: Rule = "gaussian",
    guidance_schedule: Schedule = "constant",
    attention_temperature: float = 1.0,
    tolerance: float = 1e-3,
    segment: int | None = None,
    progress: ProgressCallback | None = None,
    cache_dtype: CacheDtype = "network",
) -> Tensor:
    """Map noise to data; the inverse of `model(x, condition)` when unguided (STARFlow, arXiv 2506.06276, eq. 4).

    Args:
        model: STARFlow or TarFlow.
        noise: (B, C, H, W), standard normal; one seed a picture makes it independent of its batch.
        condition: as for `model(x, condition)`.
        null_condition: what "no condition" is, as `condition` or one row for all; STARFlow needs it where
            guidance is above 0; TarFlow has its own and takes None.
        guidance: weight w >= 0, one for all or (B,); 0 is unguided.
        solver: "sequential" (exact), "jacobi", "auto" (what the model was calibrated for, and without that
            "sequential"; see `starflow.sampling.policy`), or a BlockPolicy for each block from the data to the noise.
        guidance_rule: "gaussian" (STARFlow) or "linear" (TarFlow).
        guidance_schedule: "constant", or "linear": annealed, w n / (N - 1) for token n.
        attention_temperature: divides the null branch's attention logits; under 1 it guides TarFlow without a label.
        tolerance: bound on the residual ||x - F(x)|| / ||x|| that every block leaves of every sequence; 0 is the
            sequential answer.
        segment: tokens that "jacobi" solves at once; None is all of them.
        progress: called with the tokens solved so far and in all.
        cache_dtype: precision of keys and values: the "network"'s, or "bfloat16" to halve a float32 cache.

    Returns:
        (B, C, H, W), float32 (float64 when the model is float64).

    Raises:
        UserError: shapes or values that the model or the solver cannot take.

    >>> from starflow.flow.config import STARFlowConfig
    >>> from starflow.flow.model import STARFlow
    >>> model = STARFlow(STARFlowConfig(2, 4, 32, num_blocks=2, layers_per_block=1, head_dim=16))
    >>> noise = noise_from_seeds([0, 1, 2], (2, 4, 4))
    >>> x = sample(model, noise)
    >>> z, logdet = model(x)
    >>> torch.allclose(z, noise, atol=1e-5)
    True
    """
    settings = SampleSettings(
        guidance, solver, guidance_rule, guidance_schedule, attention_temperature, tolerance, segment, cache_dtype
    )
    result = run(model, noise, condition, null_condition, settings, progress)
    given = {"noise": noise, "condition": condition, "null condition": null_condition}
    check_finite(model, result.x, given, result.broken_blocks(), _remedy(settings))
    return result.x


def _remedy(settings: SampleSettings) -> str:
    highest = float(torch.as_tensor(settings.guidance, dtype=torch.float64, device="cpu").max())
    return f"guidance is {highest:g}, lower it" if highest else "the model is broken, use another checkpoint"


@dataclass(frozen=True)
class SamplingResult:
    """Pictures, and what the solver of each block did."""

    x: Tensor
    """(B, C, H, W)"""
    solutions: list[SolverResult]
    """`solutions[i]` is that of `model.blocks[i]`."""

    def broken_blocks(self) -> dict[int, int]:
        """For each picture that is not finite, the first block that made it so, counted from the data."""
        last = len(self.solutions) - 1
        states = [solution.x_BNC for solution in self.solutions[::-1]]
        first = {row: broken_block(states, row) for row in broken_rows(self.x)}
        return {row: last - place for row, place in first.items() if place is not None}


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape) of B seeds, on the CPU in float32.

    Raises:
        UserError: a seed outside 0 .. 2^63 - 1.

    >>> noise = noise_from_seeds([0, 1, 7], (3, 8, 8))
    >>> torch.equal(noise[2:], noise_from_seeds([7], (3, 8, 8)))
    True
    """
    return candidate_noise(seeds, shape, 1)[:, 0]


def candidate_noise(seeds: Sequence[int], shape: tuple[int, ...], count: int) -> Tensor:
    """`count` draws of each seed's generator, (B, count, *shape); the first is what `noise_from_seeds` gives.

    Raises:
        UserError: a seed outside 0 .. 2^63 - 1.
    """
    seeds = [operator.index(seed) for seed in seeds]  # of numpy and torch too, which no generator takes
    wrong = [seed for seed in seeds if not 0 <= seed < 2**63]
    if wrong:
        raise UserError(f"the seed is {wrong[0]}, expected 0 to {2**63 - 1}")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if not generators:
        return torch.zeros(0, count, *shape, dtype=torch.float32, device="cpu")
    draws = [torch.stack([_draw_normal(shape, one) for _ in range(count)]) for one in generators]
    return torch.stack(draws)


def _draw_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@torch.no_grad()
def best_candidates(
    model: Flow,
    noise: Tensor,
    condition: Tensor | None,
    null_condition: Tensor | None,
    settings: SampleSettings,
    batch_size: int,
    progress: ProgressCallback | None = None,
    *,
    keep: bool = False,
) -> Tensor:
    """Map each picture's candidates of noise to data, and keep the one of the largest log p(x | condition).

    Args:
        model: STARFlow or TarFlow.
        noise: (B, K, C, H, W).
        condition: of each picture, as for `starflow.sample`.
        null_condition: (B, ...), or None for a model that has its own, or without guidance.
        settings: of the sampler.
        batch_size: candidates that are sampled at once; changes memory, not pictures.
        progress: called with the tokens solved so far and in all.
        keep: return pictures of which no candidate is finite, rather than refuse them.

    Returns:
        (B, C, H, W). With K = 1 it is what `starflow.sample` gives.

    Raises:
        UserError: see `starflow.sample`.
    """
    pictures, candidates = noise.shape[:2]
    weight_B = torch.as_tensor(settings.guidance, dtype=torch.float64, device="cpu").expand(pictures)
    batches = torch.arange(pictures * candidates, device="cpu").split(batch_size)
    drawn, scores = [], []
    broken: dict[int, int] = {}
    for number, rows in enumerate(batches):
        of = rows // candidates
        given, null = _select_rows(condition, of), _select_rows(null_condition, of)
        own = dataclasses.replace(settings, guidance=weight_B[of])
        told = offset_progress(progress, number, len(batches))
        result = run(model, noise.flatten(0, 1)[rows], given, null, own, told)
        broken |= {int(of[row]): block for row, block in result.broken_blocks().items()}
        x = result.x
        drawn.append(x)
        scores.append(model.log_prob(x, given) if candidates > 1 else x.new_zeros(len(x)))
    x_BKCHW = torch.cat(drawn).unflatten(0, (pictures, candidates))
    best_B = torch.cat(scores).view(pictures, candidates).nan_to_num(nan=-torch.inf).argmax(1)
    kept: Tensor = x_BKCHW[torch.arange(pictures, device=best_B.device), best_B]
    if not keep:
        inputs = {"noise": noise, "condition": condition, "null condition": null_condition}
        check_finite(model, kept, inputs, broken, _remedy(settings))
    return kept


SolveBlock = Callable[[int, Predictor, Tensor], SolverResult]
"""Inverts a block, given its index from the data, its predictor, and its noise (B, N, C) in its own order."""


def run(
    model: Flow,
    noise: Tensor,
    condition: Tensor | None,
    null_condition: Tensor | None,
    settings: SampleSettings,
    progress: ProgressCallback | None = None,
    caches: CachePool | None = None,
) -> SamplingResult:
    """As `sample`, and what the solvers did.

    Args:
        model: STARFlow or TarFlow.
        noise: (B, C, H, W), as `condition` and `null_condition` as for `sample`.
        condition: of each picture.
        null_condition: what guidance moves away from.
        settings: the options of `sample`.
        progress: called with the tokens solved so far and in all.
        caches: where caches are taken from; a caller that samples again may keep them.
    """
    check_tensor("the noise", noise)
    policies = block_policies(model, settings, noise.device)
    count = _count_tokens(progress, model.to_tokens(noise)[0].shape[1] * len(model.blocks))

    def solve_block(number: int, predictor: Predictor, noise_BNC: Tensor) -> SolverResult:
        return solve_by_policy(predictor, noise_BNC, policies[number], settings.tolerance, count)

    return solve_blocks(model, noise, condition, null_condition, settings, solve_block, caches)


@torch.no_grad()
def solve_blocks(
    model: Flow,
    noise: Tensor,
    condition: Tensor | None,
    null_condition: Tensor | None,
    settings: SampleSettings,
    solve_block: SolveBlock,
    caches: CachePool | None = None,
) -> SamplingResult:
    """Map noise to data, block after block, each by `solve_block`; what it is given holds for that call alone."""
    tokens_BND, grid = model.to_tokens(noise)
    if not len(tokens_BND):
        return SamplingResult(model.from_tokens(tokens_BND, grid), [])
    shared = _Shared.of(model, tokens_BND, grid, condition, null_condition, settings, caches, cpu_engine_of(model))
    solutions = []
    for number in reversed(range(len(model.blocks))):
        tokens_BND, solution = _solve_one(model, number, tokens_BND, shared, solve_block)
        solutions.append(solution)
    return SamplingResult(model.from_tokens(tokens_BND, grid), solutions[::-1])


@torch.no_grad()
def sample_block(
    model: Flow,
    number: int,
    x: Tensor,
    condition: Tensor | None,
    null_condition: Tensor | None,
    settings: SampleSettings,
    engine: TokenEngine | None,
    progress: TokenProgress,
) -> Tensor:
    """The part of `sample` that one block does, for a caller whose batch changes between blocks.

    From the last block, which takes the noise, down to block 0, which gives the data, it is `sample`.

    Args:
        model: STARFlow or TarFlow.
        number: of the block, counted from the data.
        x: (B, C, H, W), what the block after it gave; for the last block, the noise.
        condition: as `null_condition` and `settings` those of `sample`, of this batch.
        null_condition: what guidance moves away from.
        settings: the options of `sample`.
        engine: compiled code, from `cpu_engine_of`; None goes without.
        progress: told the number of tokens solved since the last call.

    Raises:
        UserError: see `sample`.
    """
    policy = block_policies(model, settings, x.device)[number]
    tokens_BND, grid = model.to_tokens(x)
    shared = _Shared.of(model, tokens_BND, grid, condition, null_condition, settings, None, engine)

    def solve_block(_number: int, predictor: Predictor, noise_BNC: Tensor) -> SolverResult:
        return solve_by_policy(predictor, noise_BNC, policy, settings.tolerance, progress)

    return model.from_tokens(_solve_one(model, number, tokens_BND, shared, solve_block)[0], grid)


@dataclass(frozen=True)
class _Shared:
    """What the blocks of one batch share."""

    conditions: list[Tensor | None]
    guidance: Guidance | None
    rotary: Tensor | None
    caches: CachePool
    engine: TokenEngine | None

    @staticmethod
    def of(
        model: Flow,
        tokens_BND: Tensor,
        grid: Grid,
        condition: Tensor | None,
        null_condition: Tensor | None,
        settings: SampleSettings,
        caches: CachePool | None,
        engine: TokenEngine | None,
    ) -> _Shared:
        warn_of_hooks(model)
        guidance = settings.guidance_for(tokens_BND)
        conditions = branch_conditions(model, condition, null_condition, len(tokens_BND), guidance)
        caches = caches or CachePool(None if settings.cache_dtype == "network" else torch.bfloat16)
        return _Shared(conditions, guidance, model.rotary(grid), caches, engine)


def _solve_one(
    model: Flow, number: int, tokens_BND: Tensor, shared: _Shared, solve_block: SolveBlock
) -> tuple[Tensor, SolverResult]:
    """Tokens through one block, both in raster order; the noise gets the model's prior before the last block."""
    block, prior = list(model.iter_blocks())[number], model.prior_log_std()
    if prior is not None and number == len(model.blocks) - 1:
        tokens_BND = tokens_BND * prior.exp()
    guided = model.guided_blocks[number]
    rows = shared.conditions if guided else shared.conditions[:1]
    rotary, rule = model.block_rotary(block, shared.rotary), shared.guidance if guided else None
    noise_BNC = in_order(tokens_BND, backwards=block.spec.backwards)
    batch, tokens = tokens_BND.shape[:2]
    with model.weights_on_device(block):
        predictor = Predictor.of(block, batch, tokens, rows, rotary, rule, shared.caches, shared.engine)
        solution = solve_block(number, predictor, noise_BNC)
    return in_order(solution.x_BNC, backwards=block.spec.backwards), solution


def solve_by_policy(
    predictor: Predictor, noise_BNC: Tensor, policy: BlockPolicy, tolerance: float, progress: TokenProgress
) -> SolverResult:
    """Invert one block by a policy."""
    options = SolverOptions(tolerance, policy.segment, policy.max_iterations, policy.guess, policy.draft)
    return SOLVERS[policy.solver](predictor, noise_BNC, options, progress)


def warn_of_hooks(model: Flow) -> None:
    """Warn of hooks on the flow or on whole blocks, which act on densities and not on samples.

    A block is sampled token by token, by calling its layers and projections, and never as a whole; what a hook would
    make of a block's whole output has no inverse either.
    """
    wholes = {"the flow": model, **{f"blocks.{number}": block for number, block in enumerate(model.iter_blocks())}}
    for name, module in wholes.items():
        if is_hooked(module):
            warnings.warn(
                f"{name} has a forward hook (or a forward of its own), which sampling never calls, as it calls the "
                "parts of blocks, token by token: remove it, or hook parts such as blocks.0.attn_blocks.0, which act "
                "on samples and densities alike",
                stacklevel=2,
            )


def branch_conditions(
    model: Flow, condition: Tensor | None, null_condition: Tensor | None, batch: int, guidance: Guidance | None
) -> list[Tensor | None]:
    """The conditions of the branches, as the blocks take them: the given one, and with guidance the null one after it.

    Raises:
        UserError: a condition that the model cannot take, or guidance without what it needs.
    """
    given = model.check_condition(condition, batch)
    if guidance is None:
        return [given]
    if not any(model.guided_blocks):
        raise UserError("guidance is above 0, but this model has no condition to guide with: use guidance 0")
    if null_condition is None and not model.has_null_condition:
        raise UserError(
            "guidance is above 0, but null_condition is None: pass what the model was trained with for no condition "
            f"(the empty caption's encoding, or the class for none), {model.condition_help}"
        )
    if condition is None and guidance.temperature == 1:
        raise UserError("guidance is above 0, but there is no label: pass one, or an attention_temperature under 1")
    if null_condition is not None and len(null_condition) == 1:
        null_condition = null_condition.expand(batch, *null_condition.shape[1:])
    return [given, model.check_condition(null_condition, batch)]


def _count_tokens(progress: ProgressCallback | None, total: int) -> TokenProgress:
    """What sums the tokens that solvers report, and tells `progress` of them."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return count


def offset_progress(progress: ProgressCallback | None, batch: int, batches: int) -> ProgressCallback | None:
    """The progress of one batch as that of all batches, which are equally large."""
    if progress is None:
        return None
    return lambda done, total: progress(batch * total + done, batches * total)


def _select_rows(condition: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if condition is None else condition[rows.to(condition.device)]
