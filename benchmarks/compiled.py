"""Time a decoder of our own models by torch.compile: a static cache, one compiled step a block, frozen weights.

What one writes for speed without writing kernels: keys and values in a cache of fixed size, written where a
tensor says, so that one graph serves every token; the step compiled once a block with its weights as constants
(`freezing`, which lets the compiler pack them). Every token attends to the whole cache under a mask. It draws the
pictures that `starflow.sample` draws, which a test checks.

    python benchmarks/compiled.py        # seconds of a batch of 4 of the model that `starflow bench sample` times

Shapes: B pictures, N tokens, C token channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from starflow.bench.limits import Baseline, DrawTask
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.tokens import in_order
from starflow.nn.attention import CachePool
from starflow.sampling.policy import SampleSettings
from starflow.sampling.predictor import Predictor
from starflow.sampling.sampler import branch_conditions
from starflow.sampling.solvers import solve_token_at

Step = Callable[[Tensor, Tensor, Tensor], None]
"""Solves the token whose index a tensor (1,) holds, in place in x (B, N, C), from noise (B, N, C)."""


def baselines(task: DrawTask) -> list[Baseline]:
    """The same batch, by this file; what is compiled in the first call serves the others."""
    decoder = CompiledDecoder(task)
    note = "torch.compile with frozen weights, one token at a time, a static cache under a mask; the same pictures"
    return [Baseline("compiled static-cache decoder", decoder.decode, 1.0, note)]


@dataclass
class CompiledDecoder:
    """The compiled steps of a task's blocks, and the caches that they write."""

    task: DrawTask
    compile: bool = True
    """Whether steps are compiled; without, they run as they are written."""
    _steps: dict[AutoregressiveBlock, tuple[Predictor, Step]] = field(default_factory=dict)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Noise to latents (B, C, H, W), block after block."""
        model = self.task.model
        tokens, grid = model.to_tokens(self.task.noise)
        rotary, prior = model.rotary(grid), model.prior_log_std()
        if prior is not None:
            tokens = tokens * prior.exp()
        for number, block in reversed(list(enumerate(model.iter_blocks()))):
            predictor, step = self._step(number, block, tokens, model.block_rotary(block, rotary))
            noise_BNC = in_order(tokens, backwards=block.spec.backwards).contiguous()
            x_BNC = noise_BNC.clone()
            predictor.prefill()
            for token in range(predictor.first, predictor.tokens):
                step(x_BNC, noise_BNC, torch.tensor([token], device=tokens.device))
            tokens = in_order(x_BNC, backwards=block.spec.backwards)
        return model.from_tokens(tokens, grid)

    def _step(
        self, number: int, block: AutoregressiveBlock, tokens_BNC: Tensor, rotary: Tensor | None
    ) -> tuple[Predictor, Step]:
        if block not in self._steps:
            model, task = self.task.model, self.task
            guided = task.guidance > 0 and model.guided_blocks[number]
            guidance = SampleSettings(task.guidance).guidance_for(tokens_BNC) if guided else None
            batch, count = tokens_BNC.shape[:2]
            conditions = branch_conditions(model, task.condition, task.null_condition, batch, guidance)
            predictor = Predictor.of(block, batch, count, conditions, rotary, guidance, CachePool())
            length = predictor.cache.layers[0].keys_BNLH.shape[2]

            def step(x_BNC: Tensor, noise_BNC: Tensor, index_1: Tensor) -> None:
                solve_token_at(predictor, x_BNC, noise_BNC, index_1, length)

            made = torch.compile(step, dynamic=False, options={"freezing": True}) if self.compile else step
            self._steps[block] = predictor, made
        return self._steps[block]


def main() -> None:
    from starflow.bench.sample import load_model

    decoder = CompiledDecoder(load_model("57m", torch.device("cpu"), torch.float32).task(4, 3.0))
    for _ in range(3):
        started = time.perf_counter()
        decoder.decode()
        print(f"{time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
