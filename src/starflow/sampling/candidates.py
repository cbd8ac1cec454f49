"""Several candidates for a picture, and the one kept that shows its condition best: `best_candidates`.

A flow knows the exact density of what it drew, with the condition and without, and so what the picture says about
the condition: log p(x | c) - log p(x), which by Bayes' rule is log p(c | x) but for a constant of c. Of a prompt's
candidates it is largest where the model itself, read as a classifier, is surest of the prompt. It is not the
likeliest picture, which is a plain one.

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
    """Map each picture's candidates of noise to data, and keep the one that says most about its condition.

    Args:
        model: STARFlow or TarFlow.
        noise: (B, K, C, H, W).
        condition: of each picture, as for `starflow.sample`; without one the first candidate is kept.
        null_condition: (B, ...), or None for a model that has its own.
        settings: of the sampler.
        at_once: candidates that are sampled at once; changes memory, not pictures.
        progress: called with the tokens solved so far and in all.

    Returns:
        (B, C, H, W). With K = 1 it is what `starflow.sample` gives.

    Raises:
        UserError: see `starflow.sample`.
    """
    if condition is None:
        noise = noise[:, :1]
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
        scores.append(information(model, x, given, null) if candidates > 1 else x.new_zeros(len(x)))
    x_BKCHW = torch.cat(drawn).unflatten(0, (pictures, candidates))
    best_B = torch.cat(scores).view(pictures, candidates).nan_to_num(nan=-torch.inf).argmax(1)
    kept: Tensor = x_BKCHW[torch.arange(pictures, device=best_B.device), best_B]
    return kept


def information(model: Flow, x: Tensor, condition: Tensor | None, null_condition: Tensor | None) -> Tensor:
    """log p(x | condition) - log p(x | null condition) of each picture, (B,), in nats.

    Raises:
        UserError: a condition that the model cannot take.
    """
    return model.log_prob(x, condition) - model.log_prob(x, null_condition)


def shifted(progress: Progress | None, batch: int, batches: int) -> Progress | None:
    """A batch's progress as that of all batches."""
    if progress is None:
        return None
    return lambda done, total: progress(batch * total + done, batches * total)


def _rows(condition: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if condition is None else condition[rows.to(condition.device)]
