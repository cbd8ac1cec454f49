"""Values that several commands read: sizes, aspect ratios, devices, precisions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from starflow.errors import UserError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16"]
CacheDtype = Literal["network", "bfloat16"]

LARGEST_SEED = 2**63 - 1


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "64x48", in pixels.

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text.strip())
    if not found:
        raise UserError(f"--size is '{text}', expected WIDTHxHEIGHT in pixels, e.g. 64x64")
    return int(found[1]), int(found[2])


def check_seed(seed: int) -> None:
    """Raises UserError: a seed that no generator takes."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed is {seed}, expected 0 to {LARGEST_SEED}")


def pick_device(name: Device) -> torch.device:
    """The device of that name; "auto" is the first there is of cuda, mps and cpu.

    Raises:
        UserError: this machine, or this torch, has no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, usable in there.items() if usable))
    if not there[name]:
        usable = ", ".join(device for device, found in there.items() if found)
        raise UserError(f"--device is {name}, but torch {torch.__version__} finds none here: it can use {usable}")
    return torch.device(name)


def pick_dtype(name: Precision) -> torch.dtype:
    """The precision of that name."""
    import torch

    return torch.bfloat16 if name == "bfloat16" else torch.float32
