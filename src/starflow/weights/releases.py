"""Repositories of the hub that hold published checkpoints in their authors' layout, and what is known of them.

The options are the released configuration's (STARFlow, arXiv 2506.06276), which the repository itself does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Release:
    """One checkpoint of a repository."""

    file: str
    options: Mapping[str, Any]
    """As `load_published` takes them."""
    terms: str
    """What its licence allows, in words."""
    preset: str = ""
    """Its architecture's name in `starflow.presets`."""


def _arguments(**values: Any) -> dict[str, Any]:
    return {"arguments": [{key: value} for key, value in values.items()]}


RELEASES: dict[str, Release] = {
    "apple/starflow": Release(
        "starflow_3B_t2i_256x256.pth",
        _arguments(
            img_size=256,
            channel_size=4,
            patch_size=1,
            channels=3072,
            blocks=6,
            layers_per_block="2 2 2 2 2 24",
            txt_size=128,
            rope=1,
            sos=1,
            nvp=1,
            use_softplus=1,
            cond_top_only=1,
            use_final_norm=1,
            adaln=0,
            seq_order="L2R",
            soft_clip=4,
            noise_std=0.3,
            vae="stabilityai/sd-vae-ft-ema",
            text="google/flan-t5-xl",
            cfg=2.5,
        ),
        "for research only",
        "starflow-t2i-3b",
    ),
}
"""By repository."""
