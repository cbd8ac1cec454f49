"""One autoregressive affine block, a causal Transformer that gives mu and log sigma of every token.

The affine map itself is a few pure functions in float32 or float64, without a network: sigma is a standard deviation
and travels as log sigma, and forward is data to noise, z = (x - mu) / sigma, with log|det| = -sum log sigma (STARFlow,
arXiv 2506.06276, eq. 3 to 5). Tensors that meet there have one shape, or broadcast.

Contract: between blocks, tokens are in raster order; inside, in the block's own order (raster, or backwards).
Token n's mu and sigma depend on the tokens before it in that order and on the condition. The input that
predicts token n is token n - 1; token 0 is predicted from the start token where there is one, and has
mu = 0, sigma = 1 otherwise. (STARFlow, arXiv 2506.06276, section 3; TarFlow, arXiv 2412.06329, section 2.)

With sequential offload a block's weights lie on another device only for as long as the block works there. What it
holds is put back as it was, the very same tensors, so nothing is copied the other way. The copies live as long as the
context, and what autograd keeps of them.

Shapes: B batch, N tokens, T some of them, C token channels, D width, S condition tokens.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.tokens import in_order
from starflow.nn.attention import CachePosition, Layer, computes_in_float32, float32_copy
from starflow.nn.layers import LayerSpec, RMSNorm, runs_as_written
from starflow.nn.quantize import RoundedLinear, WeightFormat

SOFTPLUS_SHIFT = 0.541324854612918  # softplus(shift) = 1: a network that says 0 leaves x unchanged

_LINEAR_BELOW = -30.0  # log softplus(y) = y to 5e-14 there, where softplus itself would underflow

_LINEAR_ABOVE = 40.0


def forward(x: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Data to noise, z = (x - mu) / sigma.

    >>> x, mu, log_sigma = torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([2.0]).log()
    >>> z = forward(x, mu, log_sigma)
    >>> z, inverse(z, mu, log_sigma)
    (tensor([2.]), tensor([5.]))
    """
    return (x - mu) * torch.exp(-log_sigma)


def inverse(z: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Noise to data, x = mu + sigma z."""
    return mu + torch.exp(log_sigma) * z


def log_sigma_of(a: Tensor, *, softplus: bool) -> Tensor:
    """log sigma of the network's scale output a: sigma = softplus(a + shift), which is 1 at a = 0, or exp(a).

    Finite, with a finite gradient, at every finite a.
    """
    if not softplus:
        return a
    y = a + SOFTPLUS_SHIFT
    return torch.where(y < _LINEAR_BELOW, y, F.softplus(y.clamp(min=_LINEAR_BELOW), threshold=_LINEAR_ABOVE).log())


def soft_clip(o: Tensor, limit: float) -> Tensor:
    """limit * tanh(o / limit), which stays within the limit; a limit of 0 is no clip.

    >>> soft_clip(torch.tensor([0.0, 100.0]), 4.0)
    tensor([0., 4.])
    """
    return limit * torch.tanh(o / limit) if limit else o


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each row, constant included, in nats: (B, ...) to (B,).

    >>> log_normal(torch.zeros(1, 2))
    tensor([-1.8379])
    """
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


WeightMover = Callable[[nn.Module], AbstractContextManager[object]]

"""Given a module, a context in which its weights are where it computes; see `starflow.flow.memory`."""


@dataclass(frozen=True)
class BlockSpec:
    """The sizes and options of one block."""

    token_channels: int
    """C"""
    layers: int
    """Number of Transformer layers."""
    layer: LayerSpec
    """Sizes and options of each of them."""
    backwards: bool
    """Whether the block reads the raster from its end."""
    start_token: bool
    """Whether a learned token predicts the first one; otherwise the first token passes unchanged."""
    table_tokens: int
    """Rows of the learned position table; 0 is rotary positions."""
    condition_dim: int
    """Width of the condition tokens to prepend; 0 is none."""
    num_classes: int
    """Rows of the table of class vectors to add to every token; 0 is none."""
    final_norm: bool
    """Whether an RMSNorm stands before the last projection."""
    softplus: bool
    """sigma = softplus, otherwise exp."""
    clip: float
    """c of c tanh(o / c) on the outputs; 0 is no clip."""


def starflow_block_spec(config: STARFlowConfig, block: int) -> BlockSpec:
    """The sizes and options of block number `block` of a STARFlow."""
    layer = LayerSpec(
        width=config.width(block),
        heads=config.heads(block),
        kv_heads=config.kv_heads(block),
        head_dim=config.head_dim,
        hidden=config.hidden(block),
        norm_type=config.norm_type,
        swiglu=config.use_swiglu,
        qk_norm=config.use_qk_norm,
        post_norm=config.use_post_norm,
        bias=config.use_bias,
        half_split_rope=config.hf_style_rope,
    )
    return BlockSpec(
        token_channels=config.in_channels * config.patch_size**2,
        layers=config.layers(block),
        layer=layer,
        backwards=config.reversed(block),
        start_token=config.sos,
        table_tokens=0 if config.rope else config.grid_side**2,
        condition_dim=config.txt_dim if config.conditioned(block) else 0,
        num_classes=0,
        final_norm=config.use_final_norm,
        softplus=config.use_softplus,
        clip=config.soft_clip,
    )


def tarflow_block_spec(config: TarFlowConfig, block: int) -> BlockSpec:
    """The sizes and options of block number `block` of a TarFlow."""
    width, heads = config.channels, config.channels // config.head_dim
    return BlockSpec(
        token_channels=config.in_channels * config.patch_size**2,
        layers=config.layers(block),
        layer=LayerSpec(width=width, heads=heads, kv_heads=heads, head_dim=config.head_dim, hidden=4 * width),
        backwards=config.reversed(block),
        start_token=False,
        table_tokens=config.grid_side**2,
        condition_dim=0,
        num_classes=config.num_classes,
        final_norm=False,
        softplus=False,
        clip=0.0,
    )


class AutoregressiveBlock(nn.Module):
    """One block of a flow; a new one is the identity. Parameter names are those of the published checkpoints.

    >>> from starflow.flow.config import STARFlowConfig
    >>> from starflow.flow.model import STARFlow
    >>> config = STARFlowConfig(in_channels=2, img_size=4, channels=64, num_blocks=1, layers_per_block=1, rope=False)
    >>> block = next(STARFlow(config).iter_blocks())
    >>> z, log_sigma = block(torch.ones(1, 16, 2), condition=None, rotary=None)
    >>> z.shape, bool((z - 1).abs().max() < 1e-6), log_sigma.shape
    (torch.Size([1, 16, 2]), True, torch.Size([1, 16, 2]))
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        width, channels = spec.layer.width, spec.token_channels
        self.proj_in = nn.Linear(channels, width)
        self.attn_blocks = nn.ModuleList(Layer(spec.layer) for _ in range(spec.layers))
        self.final_norm = RMSNorm(width) if spec.final_norm else nn.Identity()
        self.proj_out = nn.Linear(width, 2 * channels)
        self.proj_txt = nn.Linear(spec.condition_dim, width) if spec.condition_dim else None
        self.sos_embed = nn.Parameter(torch.randn(1, 1, channels)) if spec.start_token else None
        self.pos_embed = _small_table(spec.table_tokens, width) if spec.table_tokens else None
        self.class_embed = _small_table(spec.num_classes, 1, width) if spec.num_classes else None
        nn.init.zeros_(self.proj_out.weight)  # a new model is the identity
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, x_BNC: Tensor, condition: Tensor | None, rotary: Tensor | None, move_weights: WeightMover | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data to noise in one parallel pass.

        Args:
            x_BNC: tokens in raster order, float32 or float64.
            condition: what `prefix` or `class_vector` takes; ignored by a block without a condition.
            rotary: table of the S condition tokens and the inputs, or None with a learned table.
            move_weights: moves a layer's weights to where it computes, if they are not there. Where gradients are
                wanted, only the layers' inputs are kept then, and the backward pass moves each layer again and
                computes the rest anew.

        Returns:
            z (B, N, C) in raster order, and log sigma (B, N, C) in the block's own order.
        """
        x_BNC = in_order(x_BNC, backwards=self.spec.backwards)
        hidden = self.embed(self.first_inputs(x_BNC), 0)
        if self.class_embed is not None:
            hidden = hidden + self.class_vector(condition)
        prefix = self.prefix(condition)
        if prefix is not None:
            hidden = torch.cat((prefix, hidden), dim=1)
        hidden = self.run_layers(hidden, rotary, move_weights)
        mu, log_sigma = self.gaussian(self.outputs(hidden if prefix is None else hidden[:, prefix.shape[1] :]))
        if not self.spec.start_token:
            mu, log_sigma = F.pad(mu, (0, 0, 1, 0)), F.pad(log_sigma, (0, 0, 1, 0))  # the first token: x = 0 + 1 z
        return in_order(forward(x_BNC, mu, log_sigma), backwards=self.spec.backwards), log_sigma

    @property
    def conditioned(self) -> bool:
        """Whether the block sees the condition."""
        return self.proj_txt is not None or self.class_embed is not None

    @property
    def first_predicted(self) -> int:
        """Index of the first token that the network predicts: input k predicts token k + this."""
        return 0 if self.spec.start_token else 1

    def first_inputs(self, x_BNC: Tensor) -> Tensor:
        """What the Transformer reads of the tokens in the block's order; the last token predicts nothing."""
        if self.sos_embed is None:
            return x_BNC[:, :-1]
        start = self.sos_embed.to(x_BNC.dtype).expand(x_BNC.shape[0], -1, -1)
        return torch.cat((start, x_BNC[:, :-1]), dim=1)

    def embed(self, inputs_BTC: Tensor, first: int) -> Tensor:
        """Inputs number first, first + 1, .. to hidden states (B, T, D), without condition."""
        with torch.autocast(inputs_BTC.device.type, enabled=False):  # so that layers add to float32
            hidden: Tensor = self.proj_in(inputs_BTC.to(self.proj_in.weight.dtype))
        if self.pos_embed is None:
            return hidden
        count = inputs_BTC.shape[1]
        if self.spec.backwards:
            last = self.pos_embed.shape[0] - first
            return hidden + self.pos_embed[last - count : last].flip(0)
        return hidden + self.pos_embed[first : first + count]

    def embed_at(self, inputs_B1C: Tensor, number_1: Tensor) -> Tensor:
        """As `embed`, of the one input whose number a tensor (1,) holds."""
        hidden: Tensor = self.proj_in(inputs_B1C.to(self.proj_in.weight.dtype))
        if self.pos_embed is None:
            return hidden
        row_1 = len(self.pos_embed) - 1 - number_1 if self.spec.backwards else number_1
        return hidden + self.pos_embed.index_select(0, row_1)

    def prefix(self, condition: Tensor | None) -> Tensor | None:
        """Condition tokens (B, S, condition_dim) to hidden states to prepend, (B, S, D)."""
        if self.proj_txt is None:
            return None
        assert condition is not None
        hidden: Tensor = self.proj_txt(condition.to(self.proj_txt.weight.dtype))
        return hidden

    def class_vector(self, label: Tensor | None) -> Tensor:
        """Labels (B,) to vectors (B, 1, D) to add to every token; label -1, no class, is the classes' mean.

        Weights (B, K) of the classes, which are floats, give the sum of their vectors by weight.
        """
        assert self.class_embed is not None
        assert label is not None
        if label.is_floating_point():
            return torch.einsum("bk,kod->bod", label.to(self.class_embed.dtype), self.class_embed)
        return torch.cat((self.class_embed, self.class_embed.mean(0, keepdim=True)))[label]

    @property
    def weight_form(self) -> WeightFormat:
        """The format of the layers' matrices: what they are rounded to, or else their precision."""
        for part in self.attn_blocks.modules():
            if isinstance(part, RoundedLinear):
                return part.form
        return "bfloat16" if self.proj_in.weight.dtype == torch.bfloat16 else "float32"

    @property
    def as_built(self) -> bool:
        """Whether it has the parts and the parameters of a new block of its spec, and nothing is hooked into them.

        Code that computes a block in another way than by calling its parts is for such blocks alone.
        """
        return runs_as_written(self) and _describe_parts(self) == _parts_of(self.spec)

    def extend(self, hidden_BTD: Tensor, rotary: Tensor | None, position: CachePosition) -> Tensor:
        """The layers, for hidden states (B, T, D) that continue a cache."""
        wide = computes_in_float32(self, hidden_BTD) and self.as_built
        out_BTD = hidden_BTD.float() if wide else hidden_BTD
        for layer, cache in zip(self.attn_blocks, position.cache.layers, strict=True):
            assert isinstance(layer, Layer)
            out_BTD = (float32_copy(layer, self.spec.layer) if wide else layer)(out_BTD, rotary, cache, position)
        return out_BTD.to(hidden_BTD.dtype)

    def run_layers(self, hidden_BTD: Tensor, rotary: Tensor | None, move_weights: WeightMover | None = None) -> Tensor:
        """The layers over a whole sequence (B, T, D); `move_weights` as in `forward`."""
        wide = computes_in_float32(self, hidden_BTD) and self.as_built
        again = (wide or move_weights is not None) and torch.is_grad_enabled() and hidden_BTD.requires_grad
        place: WeightMover = move_weights if again and move_weights is not None else contextlib.nullcontext
        out_BTD = hidden_BTD.float() if wide else hidden_BTD
        for layer in self.attn_blocks:

            def work(hidden: Tensor, layer: nn.Module = layer) -> Tensor:
                with place(layer):
                    one = float32_copy(layer, self.spec.layer) if wide else layer
                    done: Tensor = one(hidden, rotary)
                return done

            out_BTD = checkpoint(work, out_BTD, use_reentrant=False) if again else work(out_BTD)
        return out_BTD.to(hidden_BTD.dtype)

    def outputs(self, hidden_BTD: Tensor) -> Tensor:
        """Final norm, projection and soft clip: (B, T, 2C), the scale's half first, at least float32."""
        hidden_BTD = self.final_norm(hidden_BTD)
        with torch.autocast(hidden_BTD.device.type, enabled=False):  # mu rounded to 8 bits costs nats (docs/log.md)
            out: Tensor = self.proj_out(hidden_BTD.to(self.proj_out.weight.dtype))
        return soft_clip(out.to(torch.promote_types(out.dtype, torch.float32)), self.spec.clip)

    def gaussian(self, outputs_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma, (B, T, C) each, of the network's outputs."""
        scale, mu = outputs_BTO.chunk(2, dim=-1)
        return mu, log_sigma_of(scale, softplus=self.spec.softplus)


WRAPPER = "_checkpoint_wrapped_module"
"""The name under which activation checkpointing keeps a part that it wraps."""


@functools.lru_cache(maxsize=64)
def _parts_of(spec: BlockSpec) -> dict[str, tuple[type, str, tuple[tuple[str, torch.Size], ...]]]:
    """The parts of a new block."""
    with torch.device("meta"):
        return _describe_parts(AutoregressiveBlock(spec))


def _describe_parts(block: AutoregressiveBlock) -> dict[str, tuple[type, str, tuple[tuple[str, torch.Size], ...]]]:
    """The type, the options and the parameters' shapes of every part, by its name; rounding is no other type."""
    return {
        name.replace(f".{WRAPPER}", ""): (
            nn.Linear if type(part) is RoundedLinear else type(part),
            part.extra_repr(),
            tuple((key, held.shape) for key, held in part._parameters.items() if held is not None),
        )
        for name, part in block.named_modules()
        if not hasattr(part, WRAPPER)
    }


def _small_table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 1e-2)


@contextmanager
def moved_to(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which the module's parameters and buffers are copies on `device`, without gradients.

    >>> linear = nn.Linear(2, 2)
    >>> with moved_to(linear, torch.device("meta")):
    ...     linear.weight.device
    device(type='meta')
    >>> linear.weight.device
    device(type='cpu')
    """
    places = [(part, name, held) for part in module.modules() for name, held in part._parameters.items()]
    buffers = [(part, name, held) for part in module.modules() for name, held in part._buffers.items()]
    try:
        for part, name, held in places:
            if held is not None:
                there = held.detach().to(device, copy=True)
                part._parameters[name] = nn.Parameter(there, requires_grad=False)
        for part, name, buffer in buffers:
            if buffer is not None:
                part._buffers[name] = buffer.to(device, copy=True)
        yield
    finally:
        for part, name, held in places:
            part._parameters[name] = held
        for part, name, buffer in buffers:
            part._buffers[name] = buffer


def run_offloaded(
    block: AutoregressiveBlock,
    move_weights: WeightMover,
    tokens: Tensor,
    condition: Tensor | None,
    rotary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A block's `forward` with its weights moved; where gradients are wanted, the backward pass moves them again.

    Only the block's inputs are kept for that, so that no copy outlives the pass.
    """

    def work(tokens: Tensor) -> tuple[Tensor, Tensor]:
        with move_weights(block):
            passed: tuple[Tensor, Tensor] = block(tokens, condition, rotary, move_weights)
        return passed

    if not torch.is_grad_enabled():
        return work(tokens)
    passed: tuple[Tensor, Tensor] = checkpoint(work, tokens, use_reentrant=False)
    return passed
