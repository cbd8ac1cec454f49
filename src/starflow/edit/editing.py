"""Latents into others by way of the flow's noise: encode under one condition, change the noise, decode under another.

The noise of a latent is encoded unguided, with the exact density's own map; what is decoded may be guided, which then
moves a latent even under its own condition. At strength 0, guidance 0 and an unchanged condition a latent is itself, up
to rounding. (STARFlow, arXiv 2506.06276, section 3 and appendix D.)

Contract: a row depends on its latent, conditions and seed alone, not on its batch.

Shapes: B latents of C x H x W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from starflow.edit.density import GuidedFlow
from starflow.edit.inpainting import Random
from starflow.errors import UserError
from starflow.flow.model import Flow


@torch.no_grad()
def edit(
    flow: Flow,
    latents: Tensor,
    condition: Tensor | None = None,
    new_condition: Tensor | None = None,
    null_condition: Tensor | None = None,
    *,
    seeds: Sequence[int],
    strength: float = 0.0,
    guidance: float = 0.0,
) -> Tensor:
    """z' = sqrt(1 - s^2) z + s g, from z under `condition` to data under `new_condition`.

    Args:
        flow: STARFlow or TarFlow.
        latents: (B, C, H, W), with the noise that the flow was trained on.
        condition: (B, ...), what the latents show, or None for a flow without a condition.
        new_condition: (B, ...), what they shall show.
        null_condition: (B, ...), needed where the guidance is above 0.
        seeds: one a row, of g; see `starflow.edit.inpainting.Random`.
        strength: s in 0 .. 1; 0 keeps all of the noise, 1 is a new draw.
        guidance: weight of the decoding.

    Returns:
        (B, C, H, W)

    Raises:
        UserError: a strength outside 0 .. 1, or not one seed a row.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength is {strength}, expected 0 (the same picture) to 1 (a new one)")
    if len(seeds) != len(latents):
        raise UserError(f"{len(seeds)} seeds for {len(latents)} latents: give one each")
    made = []
    for row, seed in enumerate(seeds):
        own = slice(row, row + 1)
        given, new, null = (None if one is None else one[own] for one in (condition, new_condition, null_condition))
        z, _ = GuidedFlow(flow, given).encode(latents[own].to(flow.device, flow.work_dtype))
        z = math.sqrt(1 - strength**2) * z + strength * Random(seed, z).normal(1)
        made.append(GuidedFlow(flow, new, null, guidance).decode(z))
    return torch.cat(made)


@torch.no_grad()
def interpolate(
    flow: Flow,
    first: Tensor,
    second: Tensor,
    first_condition: Tensor | None = None,
    second_condition: Tensor | None = None,
    null_condition: Tensor | None = None,
    *,
    steps: int = 8,
    guidance: float = 0.0,
) -> Tensor:
    """The way from one latent to another on the sphere of their noise, their conditions mixed along it.

    Args:
        flow: STARFlow or TarFlow.
        first: (1, C, H, W), and so `second`.
        second: where the way ends.
        first_condition: one row each; conditions that are numbers (labels) change over in the middle.
        second_condition: the other latent's.
        null_condition: one row; needed where the guidance is above 0.
        steps: latents on the way, both ends among them.
        guidance: weight of the decoding.

    Returns:
        (steps, C, H, W)

    Raises:
        UserError: fewer than two steps.
    """
    if steps < 2:
        raise UserError(f"steps is {steps}, expected at least 2: both ends are among them")
    ends = ((first, first_condition), (second, second_condition))
    z_a, z_b = (GuidedFlow(flow, c).encode(x.to(flow.device, flow.work_dtype))[0] for x, c in ends)
    made = []
    for step in range(steps):
        share = step / (steps - 1)
        between = mixed(first_condition, second_condition, share)
        made.append(GuidedFlow(flow, between, null_condition, guidance).decode(slerp(z_a, z_b, share)))
    return torch.cat(made)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point at `share` of the great circle from a to b (Shoemake 1985), rows (B, ...); lengths change evenly."""
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    long_a, long_b = flat_a.norm(dim=1, keepdim=True), flat_b.norm(dim=1, keepdim=True)
    unit_a, unit_b = flat_a / long_a, flat_b / long_b
    angle = (unit_a * unit_b).sum(1, keepdim=True).clamp(-1, 1).arccos()
    sine = angle.sin()
    curved = (((1 - share) * angle).sin() * unit_a + (share * angle).sin() * unit_b) / sine.clamp_min(1e-12)
    unit = torch.where(sine > 1e-6, curved, (1 - share) * unit_a + share * unit_b)
    between: Tensor = ((1 - share) * long_a + share * long_b) * unit
    return between.view_as(a).to(a.dtype)


def mixed(a: Tensor | None, b: Tensor | None, share: float) -> Tensor | None:
    """The condition at `share` of the way between two; of two labels, the nearer one."""
    if a is None or b is None:
        return a
    if not a.is_floating_point():
        return a if share < 0.5 else b
    return (1 - share) * a + share * b
