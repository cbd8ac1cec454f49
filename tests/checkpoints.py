"""A tiny checkpoint as the released model is published: a `.pth` of tensors, and options in the YAML's dialect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from tests.registry import randomised

FILE = "starflow_3B_t2i_256x256.pth"
TEXT, WIDTH = 8, 16
RELEASED: dict[str, Any] = {
    "img_size": 32, "channel_size": 4, "patch_size": 1, "channels": 64, "blocks": 2, "layers_per_block": "1 2",
    "txt_size": TEXT, "rope": 1, "sos": 1, "nvp": 1, "use_softplus": 1, "cond_top_only": 1, "use_final_norm": 1,
    "adaln": 0, "seq_order": "L2R", "soft_clip": 4, "noise_std": 0.3, "vae": "stabilityai/sd-vae-ft-ema",
    "text": "google/flan-t5-xl", "cfg": 2.5, "drop_label": 0.1, "latent_norm_regularization": 1e-4, "no_flip": 1,
    "fsdp": 1, "lr": 6.4e-5, "wds": 1,
}  # fmt: skip
DEPRECATED = ("var", "blocks.0.attn_mask", "feat_rope.freqs")


def arguments(**changes: Any) -> dict[str, Any]:
    """The YAML's content."""
    return {"arguments": [{key: value} for key, value in {**RELEASED, **changes}.items()]}


def model() -> STARFlow:
    built = randomised(
        STARFlowConfig(in_channels=4, img_size=4, channels=64, num_blocks=2, layers_per_block=(1, 2), txt_size=TEXT,
                       txt_dim=WIDTH), 0,
    )  # fmt: skip
    assert isinstance(built, STARFlow)
    return built.requires_grad_(False)


def write_checkpoint(folder: Path, **more: torch.Tensor) -> Path:
    """The file, with the deprecated keys that published ones carry."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = {name: torch.ones(3, 3) for name in DEPRECATED}
    torch.save({**model().state_dict(), **extra, **more}, folder / FILE)
    return folder / FILE
