"""The memory that sampling and training take, by arithmetic on a configuration, before anything is loaded.

Contract: counts of parameters and cache bytes are exact. Activations are upper estimates of what a pass holds at once;
every figure is in bytes, of one device. Nothing here needs torch.

Shapes: B images, R rows (B, or 2B with guidance), N tokens, S condition tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from starflow.errors import UserError
from starflow.flow.config import ModelConfig, STARFlowConfig
from starflow.nn.quantize import STORED_BYTES, WeightFormat

Precision = Literal["float32", "bfloat16"]

Sharding = Literal["replicated", "sharded", "hybrid"]

"""Whether every GPU holds a whole copy, all GPUs share one, or the GPUs of a host share one."""

BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""

GPUS_PER_HOST = 8

MAPPED_BYTES = 2**30
"""Bytes of a model's weights over which packed copies come from mapped files."""

TEXT_ENCODER_BYTES = {
    "google/flan-t5-xl": 2 * 1_223_527_424,
    "sentence-transformers/all-MiniLM-L6-v2": 4 * 22_713_216,
}
"""Bytes of the weights of text encoders that are known."""

KEPT_ENCODER_BYTES = 10**9
"""Bytes of a text encoder under which it stays in memory; a larger one is released once the prompts are encoded."""

DENOISED_TOKENS = 1024
"""Tokens that one Tweedie step takes at most, or a picture's."""

GIB = 2**30


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a block's layers that memory depends on."""

    layers: int
    """Number of layers."""
    width: int
    """Channels of the hidden states."""
    inner: int
    """Channels of all queries, heads x head_dim."""
    kv: int
    """Channels of all keys, kv_heads x head_dim."""
    hidden: int
    """Hidden channels of the MLP."""
    gated: bool
    """Whether the MLP is a gated one."""
    linear: int
    """Weights of one layer's linear maps, biases aside."""
    outputs: int
    """Output channels of these maps."""
    parameters: int
    """All of one layer."""


@dataclass(frozen=True)
class AutoencoderShape:
    """The sizes of an autoencoder that memory depends on."""

    parameters: int
    """Of encoder and decoder: both are loaded."""
    factor: int
    """Image pixels that a latent pixel stands for, along a side."""
    pixel_bytes: int
    """Bytes of activations per image pixel at the decoder's peak, in float32."""
    reach: int = 0
    """Latent pixels around a tile that are decoded with it."""


AUTOENCODERS = {
    "pixels": AutoencoderShape(0, 1, 3 * 4),
    "small": AutoencoderShape(4_193_332, 8, 3 * 48, 11),  # 48 channels at half the side: three tensors of 48 / 4 floats
    "diffusers_tiny": AutoencoderShape(2_445_063, 8, 3 * 64 * 4, 20),  # TAESD: three tensors of 64 channels
    "diffusers_kl": AutoencoderShape(83_653_863, 8, 4 * 256 * 4),  # sd-vae: 256 channels at full size, in and out
}


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes while a batch is sampled and decoded."""

    weights: int
    """Of the flow, as far as they are on the device at once."""
    cache: int
    """Keys and values."""
    activations: int
    """Of the largest pass: the condition's, or where blocks are iterated a whole sequence's."""
    denoising: int
    """What a Tweedie step keeps for its backward pass, or a learned denoiser's pass holds; 0 with neither."""
    autoencoder: int
    """Its weights."""
    decoding: int
    """The decoder's activations; the flow's are gone by then."""
    text_encoder: int
    """Its weights."""
    packed: int
    """Copies of the weights that a CPU's compiled loop reads; `peak` leaves them out."""
    unpacked: int
    """Weights that a CPU holds beside the packed copies, in their precision; 0 where both are mapped from files."""

    beside_encoder: int
    """Weights that are on the device while prompts are encoded: none that are offloaded."""

    companions: int = 0
    """Weights of a student and a denoiser; `sampling_memory` is of the flow alone and leaves them to its caller."""

    @property
    def peak(self) -> int:
        """The most at any time on a device that computes from `weights`."""
        return self._most(self.weights, self.beside_encoder)

    @property
    def cpu_peak(self) -> int:
        """The most at any time on a CPU. Mapped weights that are not at work count nothing: the system drops them."""
        return self._most(self.unpacked + self.packed, self.unpacked)

    def _most(self, weights: int, beside_encoder: int) -> int:
        """Caches stay while a batch is cleaned and decoded; a large text encoder is gone before there are any."""
        sampling = weights + self.cache + max(self.activations, self.denoising, self.decoding)
        kept = self.autoencoder + self.companions
        if self.text_encoder < KEPT_ENCODER_BYTES:
            return kept + self.text_encoder + sampling
        return kept + max(beside_encoder + self.text_encoder, sampling)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one GPU while the flow is trained."""

    parameters: int
    """The weights that are trained."""
    gradients: int
    moments: int
    """AdamW's two running means."""
    average: int
    """The averaged weights."""
    gathered: int
    """Copies in the network's precision: of all weights, or under sharding of the two largest units."""
    activations: int

    @property
    def peak(self) -> int:
        """All of it, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def layer_shape(config: ModelConfig, block: int) -> LayerShape:
    """Sizes of the layers of one block."""
    if isinstance(config, STARFlowConfig):
        width, hidden = config.width(block), config.hidden(block)
        inner, kv = config.heads(block) * config.head_dim, config.kv_heads(block) * config.head_dim
        gated, bias, norm = config.use_swiglu, config.use_bias, config.norm_type
        extras = 2 * config.head_dim * config.use_qk_norm + 2 * width * config.use_post_norm
    else:
        width, hidden, inner, kv = config.channels, 4 * config.channels, config.channels, config.channels
        gated, bias, norm, extras = False, True, "layer_norm", 0
    linear = width * (inner + 2 * kv) + inner * width + (3 if gated else 2) * width * hidden
    outputs = inner + 2 * kv + width + (2 if gated else 1) * hidden + width
    norms = 2 * width * (2 if norm == "layer_norm" else 1)
    return LayerShape(
        config.layers(block), width, inner, kv, hidden, gated, linear, outputs, linear + outputs * bias + norms + extras
    )


def block_parameter_count(config: ModelConfig, block: int) -> int:
    """Parameters of one block."""
    shape = layer_shape(config, block)
    channels, width, tokens = token_channels(config), shape.width, config.grid_side**2
    count = shape.layers * shape.parameters + (channels + 1) * width + (width + 1) * 2 * channels
    if not isinstance(config, STARFlowConfig):
        return count + tokens * width + config.num_classes * width
    count += width * config.use_final_norm + channels * config.sos + tokens * width * (not config.rope)
    return count + (config.txt_dim + 1) * width * config.conditioned(block)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the flow.

    >>> from starflow.flow.config import preset
    >>> f"{parameter_count(preset('starflow-t2i-3b').config):,}"
    '3,858,281,544'
    """
    return sum(block_parameter_count(config, block) for block in range(config.num_blocks))


def token_channels(config: ModelConfig) -> int:
    """D, the channels of a token."""
    return config.in_channels * config.patch_size**2


def weight_bytes(config: ModelConfig, dtype: Precision, weights: WeightFormat | None = None) -> int:
    """Bytes of the flow's weights, the linear maps of its layers in a format of their own or in `dtype`."""
    return sum(block_bytes(config, block, dtype, weights) for block in range(config.num_blocks))


def block_bytes(config: ModelConfig, block: int, dtype: Precision, weights: WeightFormat | None = None) -> int:
    """Bytes of one block's weights; see `weight_bytes`."""
    total = block_parameter_count(config, block) * BYTES[dtype]
    if weights is not None:
        shape = layer_shape(config, block)
        total += int(shape.layers * shape.linear * (STORED_BYTES[weights] - BYTES[dtype]))
    return total


def packed_bytes(config: ModelConfig, dtype: Precision, weights: WeightFormat | None = None) -> int:
    """Bytes of the packed weights that a CPU's compiled loop reads; of a mapped model those of the largest block."""
    blocks = [_packed_block(config, block, weights or dtype) for block in range(config.num_blocks)]
    return max(blocks) if is_mapped(config, dtype) else sum(blocks)


def is_mapped(config: ModelConfig, dtype: Precision) -> bool:
    """Whether a CPU maps a model's packed weights from files, so that those of one block at a time are in memory."""
    return weight_bytes(config, dtype) > MAPPED_BYTES


def _packed_block(config: ModelConfig, block: int, form: WeightFormat) -> int:
    """Bytes of a packed block: its matrices in their format, everything else in float32, without padding."""
    shape, channels = layer_shape(config, block), token_channels(config)
    ends = (channels + 1) * shape.width + (shape.width + 1) * 2 * channels
    vectors = shape.parameters - shape.linear
    return int(shape.layers * (shape.linear * STORED_BYTES[form] + 4 * vectors)) + 4 * ends


def cache_bytes(config: ModelConfig, batch: int, tokens: int, dtype: Precision, *, guided: bool) -> int:
    """Bytes of keys and values; blocks of one shape use the same cache, one after the other."""
    return BYTES[dtype] * sum(2 * math.prod(shape) for shape in set(_caches(config, batch, tokens, guided)))


def _caches(config: ModelConfig, batch: int, tokens: int, guided: bool) -> list[tuple[int, int, int, int]]:
    """(layers, rows, positions, channels) of every block's cache."""
    found = []
    for block in range(config.num_blocks):
        shape = layer_shape(config, block)
        found.append((shape.layers, _rows(config, block, batch, guided), _inputs(config, block, tokens), shape.kv))
    return found


def _rows(config: ModelConfig, block: int, batch: int, guided: bool) -> int:
    """R, the rows of a block's pass: two an image where guidance acts on the block."""
    acts = not isinstance(config, STARFlowConfig) or config.conditioned(block)
    return batch * (2 if guided and acts else 1)


def _inputs(config: ModelConfig, block: int, tokens: int) -> int:
    """Tokens that a block reads: its condition's and the image's, less the last where there is no start token."""
    if not isinstance(config, STARFlowConfig):
        return tokens - 1
    return tokens - (not config.sos) + config.txt_size * config.conditioned(block)


def sampling_memory(
    config: ModelConfig,
    batch: int,
    *,
    tokens: int | None = None,
    guided: bool = True,
    dtype: Precision = "float32",
    cache_dtype: Precision | None = None,
    weights: WeightFormat | None = None,
    offload: bool = False,
    iterated: bool = True,
    autoencoder: AutoencoderShape | None = None,
    text_encoder: str = "",
    denoised: bool = False,
    tile: int | None = None,
) -> SamplingMemory:
    """Memory of sampling `batch` images at once and decoding them.

    Args:
        config: of the flow.
        batch: images at once.
        tokens: of an image; None is those of a square of the model's own side.
        guided: whether guidance runs a null branch beside the condition's.
        dtype: of the flow's weights.
        cache_dtype: of keys and values; None is `dtype`.
        weights: format of the linear maps of the layers; None is `dtype`.
        offload: whether only the weights of the block at work are on the device.
        iterated: whether blocks other than the last are solved by fixed-point iteration, over whole sequences.
        autoencoder: one of `AUTOENCODERS`, or None for the latents alone.
        text_encoder: where it is from; one that is not in `TEXT_ENCODER_BYTES` counts nothing.
        denoised: whether samples are cleaned by a Tweedie step.
        tile: side in latent pixels of the tiles that are decoded one by one; None is whole images.

    Raises:
        UserError: a batch or a number of tokens below 1.

    >>> from starflow.flow.config import preset
    >>> config = preset("starflow-t2i-3b").config
    >>> needed = sampling_memory(config, 4, dtype="bfloat16", autoencoder=AUTOENCODERS["diffusers_kl"])
    >>> f"{needed.weights / GIB:.1f} GiB of weights, {needed.peak / GIB:.1f} GiB in all"
    '7.2 GiB of weights, 11.1 GiB in all'
    """
    tokens = config.grid_side**2 if tokens is None else tokens
    if batch < 1 or tokens < 1:
        raise UserError(f"{batch} pictures of {tokens} tokens: both must be at least 1")
    activations = 0
    for block in range(config.num_blocks):
        last = block == config.num_blocks - 1
        own = _inputs(config, block, tokens)
        length = max(1, own - tokens) if last or not iterated else own
        activations = max(activations, _pass_bytes(config, block, _rows(config, block, batch, guided) * length))
    coder, decoding = autoencoder, 0
    if coder is not None:
        area = tokens * config.patch_size**2
        area = area if tile is None else min((tile + 2 * coder.reach) ** 2, area)
        decoding = coder.pixel_bytes * area * coder.factor**2 * (batch if tile is None else 1)
    blocks = [block_bytes(config, block, dtype, weights) for block in range(config.num_blocks)]
    return SamplingMemory(
        max(blocks) if offload else sum(blocks),
        cache_bytes(config, batch, tokens, cache_dtype or dtype, guided=guided),
        activations * BYTES[dtype],
        denoising_bytes(config, batch, tokens, dtype) if denoised and not offload else 0,
        4 * coder.parameters if coder else 0,
        decoding,
        TEXT_ENCODER_BYTES.get(text_encoder, 0),
        0 if offload else packed_bytes(config, dtype, weights),
        0 if is_mapped(config, dtype) else weight_bytes(config, dtype),
        0 if offload else sum(blocks),
    )


def denoised_at_once(tokens: int) -> int:
    """Pictures of so many tokens that a Tweedie step takes at once: the products of a large one fill any device."""
    return max(1, DENOISED_TOKENS // max(1, tokens))


def denoising_bytes(config: ModelConfig, batch: int, tokens: int, dtype: Precision) -> int:
    """Bytes that a Tweedie step keeps for its backward pass, of weights without gradients, and one layer's gradients.

    Of every layer and token: what the norms read; queries, keys, values and the result of attention, and queries and
    keys before their rotation (in bfloat16 before their norm too) in float32; the MLP's hidden channels, of a gated one
    both and the gate's GELU.
    """
    low, batch = BYTES[dtype], min(batch, denoised_at_once(tokens))
    rms, post, wide = False, False, 1
    if isinstance(config, STARFlowConfig):
        rms, post = config.norm_type == "rms_norm", config.use_post_norm
        wide = 2 if config.use_qk_norm and low < 4 else 1
    total = back = 0
    for block in range(config.num_blocks):
        shape, count = layer_shape(config, block), batch * _inputs(config, block, tokens)
        norms = 2 * shape.width * ((4 if rms else low) + 4 * post)
        attention = low * (2 * shape.inner + 2 * shape.kv) + wide * 4 * (shape.inner + shape.kv)
        hidden = low * shape.hidden
        total += shape.layers * count * (norms + attention + hidden * (3 if shape.gated else 1))
        back = max(back, count * hidden * (3 if shape.gated else 2))
    return total + back


def _pass_bytes(config: ModelConfig, block: int, tokens: int) -> int:
    """Numbers that a layer holds at once for `tokens` tokens: residual, and its attention's or its MLP's tensors."""
    shape = layer_shape(config, block)
    attention = 3 * shape.inner + 4 * shape.kv  # queries, keys, values, turned queries and keys, result
    return tokens * (2 * shape.width + max(attention, 2 * shape.hidden))


def training_memory(
    config: ModelConfig,
    batch: int,
    *,
    tokens: int | None = None,
    gpus: int = 1,
    sharding: Sharding = "replicated",
    precision: Precision = "bfloat16",
    checkpointing: bool = False,
    averaged: bool = True,
) -> TrainingMemory:
    """Memory of one GPU that trains the flow with AdamW, all states in float32.

    Args:
        config: of the flow.
        batch: images per GPU and pass.
        tokens: of an image; None is those of a square of the model's own side.
        gpus: in all; a host has 8.
        sharding: what the GPUs share; "hybrid" shares within a host.
        precision: of the network's products.
        checkpointing: keep the inputs of each attention and MLP, and compute the rest again in the backward pass.
        averaged: keep an average of the weights.

    Raises:
        UserError: a batch or a number of GPUs below 1.
    """
    if batch < 1 or gpus < 1:
        raise UserError(f"{batch} pictures on {gpus} GPUs: both must be at least 1")
    parts = {"replicated": 1, "sharded": gpus, "hybrid": min(gpus, GPUS_PER_HOST)}[sharding]
    count = parameter_count(config)
    share = 4 * math.ceil(count / parts)
    if parts == 1:
        gathered = 0 if precision == "float32" else BYTES[precision] * count
    else:  # a unit is a layer: its weights, the next one's, and its gradients in float32
        unit = max(layer_shape(config, block).parameters for block in range(config.num_blocks))
        gathered = unit * (2 * BYTES[precision] + 4)
    images = batch, config.grid_side**2 if tokens is None else tokens
    activations = _saved_activation_bytes(config, images, precision, checkpointing=checkpointing)
    return TrainingMemory(share, share, 2 * share, share if averaged else 0, gathered, activations)


def _saved_activation_bytes(
    config: ModelConfig, images: tuple[int, int], precision: Precision, *, checkpointing: bool
) -> int:
    """Bytes that all layers keep for the backward pass, and the gradients of the hidden channels of one layer.

    `images` is their number, and the tokens of each. The logits of attention are computed again (flash attention).
    """
    total = largest = back = 0
    for block in range(config.num_blocks):
        shape = layer_shape(config, block)
        tokens = images[0] * _inputs(config, block, images[1])
        inputs = 2 * BYTES["float32"] * shape.width * tokens  # what layers add to is in float32
        attention, mlp = (kept * tokens for kept in _layer_saved_bytes(shape, BYTES[precision]))
        largest = max(largest, attention, mlp)
        back = max(back, BYTES[precision] * (3 if shape.gated else 2) * shape.hidden * tokens)
        total += shape.layers * (inputs if checkpointing else attention + mlp)
    return total + back + (largest if checkpointing else 0)


def _layer_saved_bytes(shape: LayerShape, low: int) -> tuple[int, int]:
    """Bytes per token that attention and the MLP keep for the backward pass, where a low-precision number has `low`.

    Each keeps its norm's input (float32) and output; then attention keeps queries, keys, values and the result, the MLP
    its hidden channels before and after the activation, of gate and product if it is gated.
    """
    norm = shape.width * (4 + low + (4 if low < 4 else 0))
    attention = low * (2 * shape.inner + 2 * shape.kv) + 4 * (shape.inner + shape.kv)
    return norm + attention, norm + low * (4 if shape.gated else 2) * shape.hidden
