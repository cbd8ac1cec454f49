"""Noise to data, token by token with a static cache: x_n = mu_n + sigma_n z_n (STARFlow, arXiv 2506.06276, eq. 4).

Contract: exact up to rounding, whatever the effort. The loop never waits for the device. On a CPU it runs in compiled
code where the predictor's engine covers the block, on a CUDA device as recorded graphs; what is written here is the
reference, and goes everywhere.

Shapes: B batch, N tokens, C token channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starflow.flow import affine
from starflow.sampling.graphs import solve_in_graphs
from starflow.sampling.predictor import Effort, Predictor, Report, Solution


def solve_sequential(predictor: Predictor, noise_BNC: Tensor, _effort: Effort, report: Report) -> Solution:
    """Invert one block; one pass a token."""
    noise_BNC = noise_BNC.contiguous()
    x_BNC = noise_BNC.clone()  # without a start token the first one stays the noise itself
    predictor.prefill()
    report(predictor.first)
    engine = predictor.engine
    if engine is not None and noise_BNC.dtype == torch.float32 and engine.ready(predictor):
        engine.solve(predictor, x_BNC, noise_BNC, report)
    elif noise_BNC.device.type == "cuda":
        solve_in_graphs(predictor, x_BNC, noise_BNC, report)
    else:
        for index in range(predictor.first, predictor.tokens):
            advance(predictor, x_BNC, noise_BNC, index)
            report(1)
    return Solution(x_BNC, predictor.tokens - predictor.first, noise_BNC.new_zeros(len(noise_BNC)))


def advance(predictor: Predictor, x_BNC: Tensor, noise_BNC: Tensor, index: int) -> None:
    """Solve token `index` in place, given those before it."""
    after = index + 1
    mu, log_sigma = predictor.predict(predictor.before(x_BNC, index, after), index)
    x_BNC[:, index:after] = affine.inverse(noise_BNC[:, index:after], mu, log_sigma)
