"""How well an autoencoder gives pictures back, in dB, with and without noise on its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from starflow.errors import UserError

FLOOR = 1e-10  # mean square error that stands for "exact": 100 dB


@dataclass(frozen=True)
class Reconstruction:
    """Mean over pictures of each picture's PSNR, and how many there were."""

    psnr: float
    """dB."""
    count: int


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB, of pictures (B, 3, H, W) in [-1, 1]; images are clamped first.

    10 log10(2^2 / mean square error), the peak being the range's width. At most 100 dB, for an exact copy.

    Raises:
        UserError: two shapes.
    """
    if images.shape != references.shape:
        raise UserError(f"pictures of shapes {tuple(images.shape)} and {tuple(references.shape)}: expected equal ones")
    error = ((images.double().clamp(-1, 1) - references.double()) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp_min(FLOOR).log10()


@torch.no_grad()
def measure_reconstruction(batches: Iterable[Tensor], reconstruct: Callable[[Tensor], Tensor]) -> Reconstruction:
    """Mean PSNR of `reconstruct` over pictures (B, 3, H, W) in [-1, 1] that come in batches.

    Raises:
        UserError: no pictures, or a reconstruction of another shape.
    """
    found = [psnr(reconstruct(batch), batch).cpu() for batch in batches]
    if not found:
        raise UserError("no pictures to measure: expected at least one batch")
    values = torch.cat(found)
    return Reconstruction(float(values.mean()), len(values))


def through_noise(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], noise_std: float, generator: Generator
) -> Callable[[Tensor], Tensor]:
    """Encode, add noise of `noise_std` to the latents, decode: what the flow's samples meet.

    The noise is drawn on the generator's device, so one on the CPU gives the same numbers anywhere.
    """

    def reconstruct(images: Tensor) -> Tensor:
        latents = encode(images)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
        return decode(latents + noise_std * noise)

    return reconstruct
