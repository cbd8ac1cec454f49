"""Named architectures of the papers, each with its source and the figure that the paper reports for it.

Sources: STARFlow (arXiv 2506.06276), TarFlow (arXiv 2412.06329), and the released configurations.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from starflow.errors import UserError
from starflow.model_config import ModelConfig, STARFlowConfig, TarFlowConfig

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Preset:
    """An architecture and what is known of it."""

    config: ModelConfig
    latents: str
    """The autoencoder whose latents the model is of, or "pixels"."""
    noise_std: float | None
    """Standard deviation of the noise that it is trained with; None where the source gives a range only."""
    source: str
    expected: str
    """What the source reports for it."""
    text: str = ""
    """The text encoder that it reads, if any."""


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UserError: no such preset; names the nearest.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"expected one of {', '.join(PRESETS)}"
        raise UserError(f"no preset '{name}': {hint}")
    return PRESETS[name]


def _on_imagenet_256(layers: tuple[int, ...], patch_size: int, *, cond_top_only: bool) -> STARFlowConfig:
    """Width 2048 on the 32 x 32 x 4 latents of 256 px, with the class as one condition token."""
    return STARFlowConfig(
        in_channels=4,
        img_size=32,
        patch_size=patch_size,
        channels=2048,
        num_blocks=len(layers),
        layers_per_block=layers,
        txt_size=1,
        txt_dim=IMAGENET_CLASSES + 1,
        cond_top_only=cond_top_only,
    )


PRESETS: dict[str, Preset] = {
    "starflow-t2i-3b": Preset(
        STARFlowConfig(in_channels=4, img_size=32, channels=3072, txt_size=128, txt_dim=2048),
        latents="stabilityai/sd-vae-ft-ema",
        noise_std=0.3,
        source="released text-to-image configuration; arXiv 2506.06276, section 4",
        expected="COCO zero-shot FID 9.1, GenEval 0.56",
        text="google/flan-t5-xl",
    ),
    "starflow-xl": Preset(
        _on_imagenet_256((2, 2, 2, 2, 2, 18), 1, cond_top_only=True),
        latents="stabilityai/sd-vae-ft-ema",
        noise_std=0.3,
        source="XL v2, 1.4B, arXiv 2506.06276",
        expected="ImageNet-256 FID-50K 2.40 with the fine-tuned decoder",
    ),
    "starflow-xl-p2": Preset(
        _on_imagenet_256((2, 2, 2, 2, 10, 10), 2, cond_top_only=False),
        latents="stabilityai/sd-vae-ft-ema",
        noise_std=0.3,
        source="XL with patches of 2, arXiv 2506.06276; two deep blocks, every block sees the class",
        expected="not reported apart",
    ),
    "tarflow-imagenet-64": Preset(
        TarFlowConfig(
            in_channels=3,
            img_size=64,
            patch_size=2,
            channels=768,
            num_blocks=8,
            layers_per_block=8,
            num_classes=IMAGENET_CLASSES,
        ),
        latents="pixels",
        noise_std=None,
        source="arXiv 2412.06329, ImageNet 64 x 64 (num_classes 0 for the unconditional one)",
        expected="see the paper's tables; noise between 0.05 and 0.15",
    ),
    "tarflow-afhq-256": Preset(
        TarFlowConfig(
            in_channels=3, img_size=256, patch_size=8, channels=768, num_blocks=8, layers_per_block=8, num_classes=3
        ),
        latents="pixels",
        noise_std=None,
        source="released AFHQ checkpoint, arXiv 2412.06329",
        expected="see the paper's figures; noise between 0.05 and 0.15",
    ),
}
