"""STARFlow and TarFlow: stacks of autoregressive blocks that map data to noise with exact log-determinants.

Contract: `model(x, condition)` returns z of x's shape and the log-determinant of dz/dx per image in nats, summed over
tokens and channels, both at least float32. `blocks[0]` is next to the data. Under the model z is standard normal, so
log p(x) = log N(z; 0, I) + logdet. `forward` is data to noise only; the other direction is `starflow.sample`.
(STARFlow, arXiv 2506.06276; TarFlow, arXiv 2412.06329.)

Shapes: B batch, C x H x W input, S condition tokens, N = h * w tokens, D token channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow import block as affine
from starflow.flow import checkpoint
from starflow.flow.block import (
    AutoregressiveBlock,
    BlockSpec,
    moved_to,
    run_offloaded,
    starflow_block_spec,
    tarflow_block_spec,
)
from starflow.flow.config import CONDITION_ANGLES, ModelConfig, STARFlowConfig, TarFlowConfig
from starflow.flow.tokens import Grid, check_tensor, grid_of, in_order, patchify, unpatchify
from starflow.io.hub import HubOptions
from starflow.io.weights import SHARD_BYTES
from starflow.nn.layers import condition_positions, grid_positions, rotary_table


class Trace(NamedTuple):
    """The result of one pass, data to noise, with every block's states."""

    z: Tensor
    """(B, C, H, W)"""
    logdet: Tensor
    """(B,), nats"""
    states: list[Tensor]
    """Block i's input is states[i] and its output states[i + 1], each (B, N, D) in raster order."""
    log_sigmas: list[Tensor]
    """(B, N, D) of each block, in that block's own token order."""


class Flow(nn.Module, ABC):
    """The base class of STARFlow and TarFlow: all that samplers, training and pipelines may rely on."""

    config: ModelConfig
    channel_first = False
    """Whether a token's channels are ordered (channel, row, column) rather than (row, column, channel)."""
    has_null_condition = False
    """Whether the model itself knows what "no condition" is."""

    def __init__(self, specs: Sequence[BlockSpec]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AutoregressiveBlock(spec) for spec in specs)
        self.policy: dict[str, Any] | None = None
        """How to sample the model, as policy.json beside the weights says; `starflow.sampling.policy` reads it."""
        self.offloaded_to: torch.device | None = None
        """The device that each block is moved to while it works, or None; see `offload`."""
        self.runtime_cache: dict[str, object] = {}
        """Objects that callers derive from the weights and keep as long as the model lives, by name; never saved."""

    @property
    @abstractmethod
    def condition_help(self) -> str:
        """A phrase for error messages: what to pass as a condition."""

    @property
    @abstractmethod
    def guided_blocks(self) -> list[bool]:
        """For every block, whether guidance acts on it."""

    @abstractmethod
    def check_condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        """The condition as the blocks take it.

        Raises:
            UserError: wrong shape or type, missing, or given to a model that has none.
        """

    @abstractmethod
    def rotary(self, grid: Grid) -> Tensor | None:
        """Rotary table (S + N, 1, head_dim / 2, 2) of condition and inputs, or None without RoPE."""

    @abstractmethod
    def prior_log_std(self) -> Tensor | None:
        """log of the prior's standard deviation (N, D) before it is divided out, or None where it is 1."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise.

        Args:
            x: (B, C, H, W), latents or pixels.
            condition: STARFlow: (B, S, txt_dim), or None for a model without a condition.
                TarFlow: labels (B,) with -1 for "no class", None for no class at all, or weights (B, K) of K classes,
                floats, for a mixture of the classes' vectors.

        Returns:
            z (B, C, H, W) and logdet (B,) in nats, float32 (float64 when the model is float64).

        Raises:
            UserError: a shape that the model cannot take.
        """
        trace = self.trace(x, condition)
        return trace.z, trace.logdet

    def trace(self, x: Tensor, condition: Tensor | None = None) -> Trace:
        """As `forward`, with every block's input, output and log sigma; `forward` returns its first two fields."""
        tokens, grid = self.to_tokens(x)
        condition, rotary = self.check_condition(condition, len(x)), self.rotary(grid)
        states: list[Tensor] = [tokens]
        log_sigmas: list[Tensor] = []
        for block in self.iter_blocks():
            given = (tokens, condition, self.block_rotary(block, rotary))
            passed = (
                block(*given) if self.offloaded_to is None else run_offloaded(block, self.weights_on_device, *given)
            )
            tokens, log_sigma = passed
            states.append(tokens)
            log_sigmas.append(log_sigma)
        logdet = -torch.stack([log_sigma.sum((1, 2)) for log_sigma in log_sigmas]).sum(0)
        prior = self.prior_log_std()
        if prior is not None:
            tokens, logdet = tokens * torch.exp(-prior), logdet - prior.sum()
        return Trace(self.from_tokens(tokens, grid), logdet, states, log_sigmas)

    def log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """log p(x | condition) of each image in nats, (B,), the Gaussian's constant included.

        Raises:
            UserError: a shape that the model cannot take.
        """
        z, logdet = self(x, condition)  # a call, so that hooks on the flow act
        log_prob: Tensor = affine.log_normal(z) + logdet
        return log_prob

    def iter_blocks(self) -> Iterator[AutoregressiveBlock]:
        """The blocks in order, from the data to the noise."""
        for block in self.blocks:
            assert isinstance(block, AutoregressiveBlock)
            yield block

    @property
    def work_dtype(self) -> torch.dtype:
        """Precision of the affine steps: at least float32 whatever the network's."""
        return torch.promote_types(self.network_dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.offloaded_to or next(self.parameters()).device

    def offload(self, device: str | torch.device) -> Self:
        """Leave the blocks where they are, and from now on move each to `device` while it works; returns the model.

        For a device whose memory does not hold the whole model. Every pass over a block, and every block of a batch
        that is sampled, costs the transfer of its weights.
        """
        self.offloaded_to = torch.device(device)
        return self

    def weights_on_device(self, part: nn.Module) -> AbstractContextManager[None]:
        """A context in which the weights of a block, or of a part of it, are where the model computes."""
        return nullcontext() if self.offloaded_to is None else moved_to(part, self.offloaded_to)

    @property
    def network_dtype(self) -> torch.dtype:
        """Precision of the parameters, and so of the Transformer layers."""
        return next(self.parameters()).dtype

    def to_tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, N, D) in raster order, in the working precision, and their grid."""
        grid = self.check_grid(grid_of(x, self.config.in_channels, self.config.patch_size))
        tokens = patchify(x.to(self.work_dtype), self.config.patch_size, channel_first=self.channel_first)
        return tokens, grid

    def from_tokens(self, tokens_BND: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, D) in raster order to (B, C, H, W)."""
        return unpatchify(tokens_BND, grid, self.config.patch_size, channel_first=self.channel_first)

    def check_grid(self, grid: Grid) -> Grid:
        """The grid itself; a model with a learned table has one size only.

        Raises:
            UserError: the model cannot take this size.
        """
        side = self.config.grid_side
        if next(self.iter_blocks()).pos_embed is not None and grid != (side, side):
            patch, size = self.config.patch_size, self.config.img_size
            raise UserError(
                f"the input is {grid[0] * patch} x {grid[1] * patch}, but this model's learned positions are for "
                f"{size} x {size} alone: resize it, or take a model with rotary positions"
            )
        return grid

    def block_rotary(self, block: AutoregressiveBlock, rotary: Tensor | None) -> Tensor | None:
        """A block's part of the model's rotary table: without the condition tokens it does not read."""
        if rotary is None:
            return None
        skipped = 0 if block.proj_txt is not None else self.condition_length
        return rotary[skipped : len(rotary) - block.first_predicted]

    @property
    def condition_length(self) -> int:
        """S, the condition tokens that a conditioned block prepends."""
        return 0

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write config.json and the weights, which `from_pretrained` reads.

        Args:
            folder: made where it is missing.
            dtype: of the stored weights; None is their own.
            shard_bytes: size that a file stays under; see `starflow.io.weights`.

        Raises:
            UserError: the folder cannot be written.
        """
        stored = ((name, tensor.to(dtype)) for name, tensor in self.state_dict().items())
        checkpoint.save(Path(folder), self.config, stored, shard_bytes)
        if self.policy is not None:
            checkpoint.write_policy(Path(folder), self.policy)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        cache: str | Path | None = None,
        offline: bool = False,
    ) -> Self:
        """The model that `save_pretrained`, training or conversion wrote, on the CPU, in the precision that was saved.

        Args:
            folder_or_hub_id: the folder of a flow, a pipeline or a run, or a hub repository of one of the first two.
            revision: of the repository, a branch, tag or commit; it may also follow the name, "owner/name@revision".
            cache: folder of downloads; None is huggingface_hub's own.
            offline: take only what is cached.

        Raises:
            UserError: no such folder or repository, another kind of model, a damaged file, missing or unexpected keys.
        """
        folder = checkpoint.find(folder_or_hub_id, HubOptions(revision, cache, offline))
        config, tensors = checkpoint.load(folder)
        with torch.device("meta"):
            model = build(config)
        if not isinstance(model, cls):
            kind = type(model).__name__
            raise UserError(f"{folder_or_hub_id} holds a {kind}, expected a {cls.__name__}: load it as a {kind}")
        checkpoint.assign_weights(model, tensors, str(folder))
        model.policy = checkpoint.read_policy(folder)
        return model


class STARFlow(Flow):
    """A latent flow, deep next to the noise, on the condition tokens of a prompt; a new one is the identity.

    >>> config = STARFlowConfig(in_channels=4, img_size=4, channels=64, num_blocks=2, layers_per_block=1)
    >>> x = torch.ones(2, 4, 4, 4)
    >>> z, logdet = STARFlow(config)(x)
    >>> z.shape, logdet.shape, bool((z - x).abs().max() < 1e-6)
    (torch.Size([2, 4, 4, 4]), torch.Size([2]), True)
    """

    config: STARFlowConfig

    def __init__(self, config: STARFlowConfig) -> None:
        super().__init__([starflow_block_spec(config, block) for block in range(config.num_blocks)])
        self.config = config

    @property
    def condition_help(self) -> str:
        if not self.config.txt_size:
            return "no condition (None)"
        return f"a condition of shape (batch, {self.config.txt_size}, {self.config.txt_dim})"

    @property
    def guided_blocks(self) -> list[bool]:
        return [block.conditioned for block in self.iter_blocks()]

    @property
    def condition_length(self) -> int:
        return self.config.txt_size

    def check_condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        expected = (batch, self.config.txt_size, self.config.txt_dim) if self.config.txt_size else None
        if condition is not None:
            check_tensor("the condition", condition)
        received = None if condition is None else tuple(condition.shape)
        if received != expected:
            raise UserError(f"the condition's shape is {received}, expected {expected}: pass {self.condition_help}")
        return condition

    def rotary(self, grid: Grid) -> Tensor | None:
        config = self.config
        if not config.rope:
            return None
        dtype, device = self.work_dtype, self.device
        positions = grid_positions(*grid, config.span, dtype=dtype, device=device)
        if config.txt_size:
            places = condition_positions(config.txt_size, config.span, dtype=dtype, device=device)
            positions = torch.cat((places, positions))
        return rotary_table(positions, config.head_dim, CONDITION_ANGLES if config.txt_size else 0)

    def prior_log_std(self) -> None:
        return None


class TarFlow(Flow):
    """A flow on pixels with a learned position table and class vectors; a new one is the identity.

    >>> config = TarFlowConfig(in_channels=1, img_size=4, patch_size=2, channels=64, num_blocks=2, layers_per_block=1)
    >>> nats = TarFlow(config).log_prob(torch.zeros(1, 1, 4, 4))  # 16 zeros under a standard normal
    >>> round(nats.item(), 3), round(-8 * math.log(2 * math.pi), 3)
    (-14.703, -14.703)
    """

    config: TarFlowConfig
    channel_first = True
    has_null_condition = True
    var: Tensor

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__([tarflow_block_spec(config, block) for block in range(config.num_blocks)])
        self.config = config
        token_channels = config.in_channels * config.patch_size**2
        self.register_buffer("var", torch.ones(config.grid_side**2, token_channels))

    @property
    def condition_help(self) -> str:
        if not self.config.num_classes:
            return "no label (None)"
        last = self.config.num_classes - 1
        return f"labels of shape (batch,) from 0 to {last}, -1 for no class, weights (batch, {last + 1}), or None"

    @property
    def guided_blocks(self) -> list[bool]:
        return [True] * self.config.num_blocks

    def check_condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        classes = self.config.num_classes
        if condition is None:
            return torch.full((batch,), -1, dtype=torch.long, device=self.device) if classes else None
        if not isinstance(condition, Tensor):
            raise UserError(f"the label is a {type(condition).__name__}: pass {self.condition_help}")
        if classes and condition.is_floating_point() and condition.shape == (batch, classes):
            return condition
        if not classes or condition.shape != (batch,) or condition.is_floating_point() or condition.dtype == torch.bool:
            shape, dtype = tuple(condition.shape), condition.dtype
            raise UserError(f"the label is {dtype} of shape {shape} for a batch of {batch}: pass {self.condition_help}")
        on_host = condition.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would wait
        if on_host and bool(((condition < -1) | (condition >= classes)).any()):
            raise UserError(f"the labels are {condition.tolist()}: pass {self.condition_help}")
        return condition.long()

    def rotary(self, grid: Grid) -> None:
        return None

    def prior_log_std(self) -> Tensor:
        return 0.5 * self.var.to(self.device, self.work_dtype).log()


def build(config: ModelConfig) -> STARFlow | TarFlow:
    """A new model with random weights, of the kind that the config is for."""
    return STARFlow(config) if isinstance(config, STARFlowConfig) else TarFlow(config)


def token_log_prob(model: Flow, x: Tensor, condition: Tensor | None = None) -> Tensor:
    """The part of log p(x | condition) that each token contributes: where in an image its likelihood lies.

    The log-density is a sum over tokens: log p(x) = sum_n [log N(z_n; 0, I) - sum over blocks of sum_D log sigma_n]
    (STARFlow, arXiv 2506.06276, eq. 3 to 5, read token by token). A block that reads backwards conditions on what
    follows, so a token's part is its surprise given what the blocks had read, not its marginal density.

    Args:
        model: the flow.
        x: (B, C, H, W), as for `model.forward`.
        condition: as for `model.forward`.

    Returns:
        (B, h, w) in nats, which sums to `model.log_prob(x, condition)`.

    Raises:
        UserError: a shape that the model cannot take.
    """
    trace = model.trace(x, condition)
    z_BND = patchify(trace.z, model.config.patch_size, channel_first=model.channel_first)
    nats_BN = -0.5 * (z_BND.square().sum(-1) + z_BND.shape[-1] * math.log(2 * math.pi))
    for block, log_sigma in zip(model.iter_blocks(), trace.log_sigmas, strict=True):
        nats_BN = nats_BN - in_order(log_sigma, backwards=block.spec.backwards).sum(-1)
    prior_ND = model.prior_log_std()
    if prior_ND is not None:
        nats_BN = nats_BN - prior_ND.sum(-1)
    patch = model.config.patch_size
    return nats_BN.reshape(len(x), x.shape[2] // patch, x.shape[3] // patch)


def condition_scores(model: Flow, x: Tensor, conditions: Tensor, at: Tensor | None = None) -> Tensor:
    """How much each of K conditions would raise log p(x), to first order, by one forward and one backward pass.

    With weights w of the conditions, c(w) = c_0 + sum_k w_k (c_k - c_0), the score of condition k is
    d log p(x | c(w)) / d w_k at w = 0 (arXiv 2511.22345 classifies by it). The largest score is a guess of the largest
    log p(x | c_k), whose K passes it saves; it is exact only where log p is linear in the condition.

    Args:
        model: the flow.
        x: (B, C, H, W), as for `model.forward`.
        conditions: tokens (K, S, E) of STARFlow; labels (K,), -1 for no class, or weights (K, classes) of TarFlow.
        at: c_0, one condition (1, ...), for instance the null condition; None is the mean of the K.

    Returns:
        (B, K), nats for each unit of weight.

    Raises:
        UserError: a shape that the model cannot take, or labels that it has not.

    >>> config = TarFlowConfig(1, 4, patch_size=2, channels=64, num_blocks=2, layers_per_block=1, num_classes=3)
    >>> condition_scores(TarFlow(config), torch.zeros(2, 1, 4, 4), torch.arange(3)).shape
    torch.Size([2, 3])
    """
    if isinstance(model, TarFlow) and not conditions.is_floating_point():
        labels = model.check_condition(conditions, len(conditions))
        weights = torch.eye(model.config.num_classes, dtype=model.work_dtype, device=conditions.device)
        conditions = torch.cat((weights, weights.mean(0, keepdim=True)))[labels]  # no class is the mean of all
    start = conditions.mean(0, keepdim=True) if at is None else at
    with torch.enable_grad():
        given = start.expand(len(x), *conditions.shape[1:]).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.log_prob(x, given).sum(), given)
    return gradient.flatten(1) @ (conditions - start).flatten(1).to(gradient.dtype).mT
