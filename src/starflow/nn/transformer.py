"""A Transformer without a causal mask over the tokens of a grid, with condition tokens or a class before them.

It is the network of what works beside a flow in one parallel pass: a student and a learned denoiser. Every token sees
every other one. Layers come in groups, and the hidden states after each group are returned, so that a loss can reach
into the network. A new one passes its tokens on through its first projection: what a layer adds starts at zero.

Shapes: B batch, N = rows * columns tokens, C token channels, D width, S condition tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from starflow.nn.attention import Layer
from starflow.nn.layers import GatedMLP, LayerSpec
from starflow.nn.rope import condition_positions, grid_positions, rotary_table


@dataclass(frozen=True)
class TransformerSpec:
    """The sizes of a `BidirectionalTransformer`."""

    token_channels: int
    """C"""
    groups: tuple[int, ...]
    """Layers of each group; the hidden states are returned after each."""
    layer: LayerSpec
    """Of each layer; its mask is taken off."""
    span: float
    """Side in tokens that the positions of any grid cover; see `grid_positions`."""
    condition_size: int = 0
    """S; 0 is no condition tokens."""
    condition_dim: int = 0
    """Width of a condition token."""
    num_classes: int = 0
    """Classes; 0 is none. One vector more stands for no class, label -1."""


class BidirectionalTransformer(nn.Module):
    """See the module's docstring.

    >>> layer = LayerSpec(width=32, heads=2, kv_heads=2, head_dim=16, hidden=64)
    >>> network = BidirectionalTransformer(TransformerSpec(4, (1, 2), layer, span=8))
    >>> [hidden.shape for hidden in network(torch.zeros(1, 6, 4), grid=(2, 3), condition=None)]
    [torch.Size([1, 6, 32]), torch.Size([1, 6, 32])]
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec, width = spec, spec.layer.width
        layer = replace(spec.layer, causal=False)
        self.proj_in = nn.Linear(spec.token_channels, width)
        self.proj_condition = nn.Linear(spec.condition_dim, width) if spec.condition_size else None
        self.class_embed = nn.Parameter(1e-2 * torch.randn(spec.num_classes + 1, width)) if spec.num_classes else None
        self.layers = nn.ModuleList(Layer(layer) for _ in range(sum(spec.groups)))
        for one in self.layers:
            assert isinstance(one, Layer)
            last = one.mlp.down_proj if isinstance(one.mlp, GatedMLP) else one.mlp.main[2]
            for module in (one.attention.proj, last):
                assert isinstance(module, nn.Linear)
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens_BNC: Tensor,
        grid: tuple[int, int],
        condition: Tensor | None,
        vector_BD: Tensor | None = None,
    ) -> list[Tensor]:
        """Tokens in raster order to the hidden states (B, N, D) after each group.

        Args:
            tokens_BNC: of any float type.
            grid: (rows, columns).
            condition: tokens (B, S, condition_dim), labels (B,), or None without a condition.
            vector_BD: is added to every token.
        """
        hidden: Tensor = self.proj_in(tokens_BNC.to(self.proj_in.weight.dtype))
        if self.class_embed is not None:
            assert condition is not None
            hidden = hidden + self.class_embed[condition][:, None]  # row -1 is the last one: no class
        if vector_BD is not None:
            hidden = hidden + vector_BD[:, None]
        skipped = 0
        if self.proj_condition is not None:
            assert condition is not None
            prefix = self.proj_condition(condition.to(self.proj_condition.weight.dtype))
            hidden, skipped = torch.cat((prefix, hidden), dim=1), prefix.shape[1]
        rotary, states = self.rotary(grid, hidden.device), []
        layers = iter(self.layers)
        for count in self.spec.groups:
            for _ in range(count):
                hidden = next(layers)(hidden, rotary)
            states.append(hidden[:, skipped:])
        return states

    def rotary(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The rotary table of the condition tokens and the grid; a quarter of the angles is for the condition."""
        spec = self.spec
        positions = grid_positions(*grid, spec.span, dtype=torch.float32, device=device)
        if not spec.condition_size:
            return rotary_table(positions, spec.layer.head_dim, 0)
        places = condition_positions(spec.condition_size, spec.span, dtype=torch.float32, device=device)
        return rotary_table(torch.cat((places, positions)), spec.layer.head_dim, spec.layer.head_dim // 8)
