"""Model configurations as frozen dataclasses, and the presets: named architectures of the papers.

Field names and defaults follow the published constructor ("STARFlow", arXiv 2506.06276; "TarFlow", arXiv 2412.06329),
so a published configuration reads as it stands. Values are checked on construction; whoever holds a config may rely on
it. Presets carry their source, these papers or the published configurations, and the figure that it reports.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal

from starflow.config import from_dict, to_dict
from starflow.errors import UserError

CONDITION_ANGLES = 8
"""Rotary angles of a head that are kept for the third axis, the place of a condition token."""

SeqOrder = Literal["L2R", "R2L"]

NormType = Literal["layer_norm", "rms_norm"]


@dataclass(frozen=True)
class STARFlowConfig:
    """The options of STARFlow, a flow on latents, deep next to the noise and shallow next to the data.

    Raises:
        UserError: a value that no model can have; the message names the option.

    >>> config = STARFlowConfig(in_channels=4, img_size=32, channels=128, layers_per_block=(1, 1, 6), num_blocks=3)
    >>> config.layers(2), config.heads(2), config.reversed(2)
    (6, 2, True)
    >>> STARFlowConfig(in_channels=4, img_size=32, channels=100)
    Traceback (most recent call last):
    starflow.errors.UserError: width 100 is no multiple of head_dim 64: change one, or give num_heads
    """

    in_channels: int
    """C, channels of the flow's input."""
    img_size: int
    """Side of the flow's input (of the latent, not of the image) in training."""
    channels: int
    """Width of the blocks."""
    patch_size: int = 1
    """Side of the square of latent pixels that a token is."""
    top_block_channels: int | None = None
    """Width of the last block only; None is `channels`."""
    num_blocks: int = 6
    """Number of autoregressive blocks."""
    layers_per_block: int | tuple[int, ...] = (2, 2, 2, 2, 2, 24)
    """One number for every block, or one each; the first is next to the data."""
    head_dim: int = 64
    """Width of an attention head."""
    num_heads: int | None = None
    """Query heads of every layer; None is width / head_dim."""
    num_kv_heads: int | None = None
    """Key and value heads, which groups of query heads share; None is num_heads."""
    rope: bool = True
    """Rotary positions; otherwise a learned table, which fixes the size to img_size x img_size."""
    pt_seq_len: int | None = None
    """Side in tokens that the positions span; None is img_size / patch_size."""
    sos: bool = True
    """A learned start token; otherwise the first token passes unchanged."""
    seq_order: SeqOrder = "L2R"
    """Which blocks read the raster backwards: with "L2R" the even ones, with "R2L" the odd ones."""
    txt_size: int = 0
    """S, condition tokens; 0 is a model without a condition."""
    txt_dim: int = 0
    """Width of a condition token."""
    cond_top_only: bool = True
    """Only the last block sees the condition; otherwise every block."""
    use_softplus: bool = True
    """sigma = softplus, otherwise exp."""
    soft_clip: float = 4.0
    """c of c tanh(o / c) on the outputs; 0 is no clip."""
    use_final_norm: bool = True
    """An RMSNorm before the last projection of a block."""
    norm_type: NormType = "layer_norm"
    """The norms before attention and MLP."""
    use_swiglu: bool = False
    """A gated MLP with a tanh-GELU gate."""
    mlp_hidden: tuple[int, ...] | None = None
    """Hidden width of the MLPs, one number a block; None is 4 x width."""
    use_qk_norm: bool = False
    """RMSNorm of every head's queries and keys."""
    use_post_norm: bool = False
    """RMSNorm after attention and after the MLP too."""
    use_bias: bool = True
    """Biases of the linear layers inside attention and MLP."""
    hf_style_rope: bool = False
    """Rotate the pairs (i, i + head_dim / 2) instead of adjacent ones."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "in_channels", "img_size", "channels", "patch_size", "num_blocks", "head_dim")
        _at_least(self, 1, "top_block_channels", "num_heads", "num_kv_heads", "pt_seq_len")
        _at_least(self, 0, "txt_size", "txt_dim", "soft_clip")
        _check_patches(self.img_size, self.patch_size)
        _one_each("layers_per_block", self.layers_per_block, self.num_blocks)
        _one_each("mlp_hidden", self.mlp_hidden, self.num_blocks)
        if self.txt_size and not self.txt_dim:
            raise UserError(f"txt_dim is 0 with txt_size {self.txt_size}: give the width of a condition token")
        for block in range(self.num_blocks):
            _check_heads(self.heads(block), self.kv_heads(block))
        if self.rope:
            _check_rotary(self.head_dim, self.txt_size)

    @property
    def grid_side(self) -> int:
        """Side of the token grid in training."""
        return self.img_size // self.patch_size

    @property
    def span(self) -> int:
        """L, the side in tokens that positions span."""
        return self.pt_seq_len or self.grid_side

    def width(self, block: int) -> int:
        """D, the width of a block's hidden states."""
        return self.top_block_channels or self.channels if block == self.num_blocks - 1 else self.channels

    def layers(self, block: int) -> int:
        """Number of Transformer layers of a block."""
        return _of_block(self.layers_per_block, block)

    def heads(self, block: int) -> int:
        """Query heads of a block's layers."""
        return self.num_heads or _heads_of(self.width(block), self.head_dim)

    def kv_heads(self, block: int) -> int:
        """Key and value heads of a block's layers."""
        return self.num_kv_heads or self.heads(block)

    def hidden(self, block: int) -> int:
        """Hidden width of a block's MLPs."""
        return 4 * self.width(block) if self.mlp_hidden is None else self.mlp_hidden[block]

    def without_default_hidden(self) -> STARFlowConfig:
        """The same model; hidden widths that are all 4 x width are left to the default."""
        default = replace(self, mlp_hidden=None)
        same = all(self.hidden(block) == default.hidden(block) for block in range(self.num_blocks))
        return default if same else self

    def reversed(self, block: int) -> bool:
        """Whether a block reads the raster backwards: with L2R the even ones, with R2L the odd ones."""
        return block % 2 == (0 if self.seq_order == "L2R" else 1)

    def conditioned(self, block: int) -> bool:
        """Whether a block sees the condition."""
        return self.txt_size > 0 and (block == self.num_blocks - 1 or not self.cond_top_only)


@dataclass(frozen=True)
class TarFlowConfig:
    """The options of TarFlow, a flow on pixels: equal blocks with a learned position table and no start token.

    Raises:
        UserError: a value that no model can have; the message names the option.
    """

    in_channels: int
    """Channels of the image."""
    img_size: int
    """Side of the image in pixels; the model has this size only."""
    patch_size: int
    """Side of the square of pixels that a token is."""
    channels: int
    """Width of the blocks."""
    num_blocks: int
    """Number of autoregressive blocks."""
    layers_per_block: int | tuple[int, ...]
    """One number for every block, or one each; the first is next to the data."""
    num_classes: int = 0
    """Classes with a learned vector each; 0 is a model without classes."""
    head_dim: int = 64
    """Width of an attention head."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "in_channels", "img_size", "patch_size", "channels", "num_blocks", "head_dim")
        _at_least(self, 0, "num_classes")
        _check_patches(self.img_size, self.patch_size)
        _one_each("layers_per_block", self.layers_per_block, self.num_blocks)
        _heads_of(self.channels, self.head_dim)

    @property
    def grid_side(self) -> int:
        """Side of the token grid."""
        return self.img_size // self.patch_size

    def layers(self, block: int) -> int:
        """Number of Transformer layers of a block."""
        return _of_block(self.layers_per_block, block)

    def reversed(self, block: int) -> bool:
        """Whether a block reads the raster backwards: the odd ones."""
        return block % 2 == 1


ModelConfig = STARFlowConfig | TarFlowConfig

KINDS: dict[str, type[STARFlowConfig] | type[TarFlowConfig]] = {"starflow": STARFlowConfig, "tarflow": TarFlowConfig}


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """JSON-ready options of a model with their `kind`, "starflow" or "tarflow"; `config_from_dict` reads them back."""
    kind = next(name for name, cls in KINDS.items() if isinstance(config, cls))
    return {"kind": kind, **to_dict(config)}


def config_from_dict(options: dict[str, Any], where: str = "") -> ModelConfig:
    """Options of a model, with an optional `kind` ("starflow" by default), as a checked config.

    `where` stands before an option's name in messages, as in "flow.".

    Raises:
        UserError: unknown kind or option, wrong type, or values that no model can have.

    >>> config = config_from_dict({"in_channels": 4, "img_size": 8, "channels": 64})
    >>> config_to_dict(config)["kind"], config == config_from_dict(config_to_dict(config))
    ('starflow', True)
    """
    values = dict(options)
    kind = values.pop("kind", "starflow")
    if kind not in KINDS:
        raise UserError(f"the kind of model is {kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    return from_dict(KINDS[kind], values, where)


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{name} is {value}, expected at least {least}")


def _check_patches(img_size: int, patch_size: int) -> None:
    if img_size % patch_size:
        raise UserError(f"img_size {img_size} is no multiple of patch_size {patch_size}: change one of them")


def _one_each(name: str, values: int | tuple[int, ...] | None, num_blocks: int) -> None:
    if isinstance(values, tuple) and len(values) != num_blocks:
        raise UserError(f"{name} has {len(values)} numbers for num_blocks {num_blocks}: give one a block")
    for value in values if isinstance(values, tuple) else () if values is None else (values,):
        if value < 1:
            raise UserError(f"{name} holds {value}, expected at least 1")


def _of_block(values: int | tuple[int, ...], block: int) -> int:
    return values if isinstance(values, int) else values[block]


def _heads_of(width: int, head_dim: int) -> int:
    if width % head_dim:
        raise UserError(f"width {width} is no multiple of head_dim {head_dim}: change one, or give num_heads")
    return width // head_dim


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise UserError(f"num_heads {heads} is no multiple of num_kv_heads {kv_heads}: change one of them")


def _check_rotary(head_dim: int, txt_size: int) -> None:
    least = 2 * CONDITION_ANGLES if txt_size else 4
    if head_dim % 4 or head_dim < least:
        raise UserError(f"head_dim is {head_dim}, expected a multiple of 4 from {least} up for rotary positions")


IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Preset:
    """A published architecture, its autoencoder and text encoder, and the result that its source reports."""

    config: ModelConfig
    latents: str
    """Name of the autoencoder whose latents the model is trained on, or "pixels"."""
    noise_std: float | None
    """Standard deviation of the noise that it is trained with; None where the source gives a range only."""
    source: str
    """The paper, and which of its models this is."""
    expected: str
    """What the source reports for it."""
    text: str = ""
    """Name of the text encoder whose tokens the model is conditioned on, or ""."""


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UserError: no such preset; names the nearest.

    >>> preset("starflow-xl").config.num_blocks
    6
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
        source="published text-to-image configuration; arXiv 2506.06276, section 4",
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
        source="published AFHQ checkpoint, arXiv 2412.06329",
        expected="see the paper's figures; noise between 0.05 and 0.15",
    ),
}
