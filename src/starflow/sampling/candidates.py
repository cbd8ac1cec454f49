"""Several candidates for a picture, and the likeliest of them kept: `best_candidates`.

A flow knows the exact density of what it drew, log p(x | condition), and so which of several candidates its condition
makes likeliest. A temperature under 1 goes the same way token by token; this looks at the whole.

Contract: a picture's candidates and which of them is kept depend on nothing else in the batch.

Shapes: B pictures, K candidates each, C x H x W data.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from starflow.flow.model import Flow
from starflow.sampling.sampler import Progress, run
from starflow.sampling.settings import SampleSettings


@torch.no_grad()
def best_candidates(
    model: Flow,
    noise: Tensor,
    condition: Tensor | None,
    null_condition: Tensor | None,
    settings: SampleSettings,
    at_once: int,
    progress: Progress | None = None,
) -> Tensor:
    """Map each picture's candidates of noise to data, and keep the one of the largest log p(x | condition).

    Args:
        model: STARFlow or TarFlow.
        noise: (B, K, C, H, W).
        condition: of each picture, as for `starflow.sample`.
        null_condition: (B, ...), or None for a model that has its own, or without guidance.
        settings: of the sampler.
        at_once: candidates that are sampled at once; changes memory, not pictures.
        progress: called with the tokens solved so far and in all.

    Returns:
        (B, C, H, W). With K = 1 it is what `starflow.sample` gives.

    Raises:
        UserError: see `starflow.sample`.
    """
    pictures, candidates = noise.shape[:2]
    weight_B = torch.as_tensor(settings.guidance).expand(pictures)
    batches = torch.arange(pictures * candidates).split(at_once)
    drawn, scores = [], []
    for number, rows in enumerate(batches):
        of = rows // candidates
        given, null = _rows(condition, of), _rows(null_condition, of)
        own = dataclasses.replace(settings, guidance=weight_B[of.to(weight_B.device)])
        x = run(model, noise.flatten(0, 1)[rows], given, null, own, shifted(progress, number, len(batches))).x
        drawn.append(x)
        scores.append(model.log_prob(x, given) if candidates > 1 else x.new_zeros(len(x)))
    x_BKCHW = torch.cat(drawn).unflatten(0, (pictures, candidates))
    best_B = torch.cat(scores).view(pictures, candidates).nan_to_num(nan=-torch.inf).argmax(1)
    kept: Tensor = x_BKCHW[torch.arange(pictures, device=best_B.device), best_B]
    return kept


def shifted(progress: Progress | None, batch: int, batches: int) -> Progress | None:
    """A batch's progress as that of all batches."""
    if progress is None:
        return None
    return lambda done, total: progress(batch * total + done, batches * total)


def _rows(condition: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if condition is None else condition[rows.to(condition.device)]
