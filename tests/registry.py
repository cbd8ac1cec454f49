"""The one registry of models that the properties are proved on: every option of the config classes, drawn.

Strategies are derived from the dataclass fields, so an option that is added to a config is drawn here by
itself: booleans and choices over all their values, numbers over `SIZES` (or their default).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from starflow.errors import UserError
from starflow.flow.config import KINDS, ModelConfig, STARFlowConfig
from starflow.flow.model import Flow, build

# Small sizes that reach every case: widths of several heads, grids of several patches.
SIZES: dict[str, list[Any]] = {
    "in_channels": [1, 2],
    "img_size": [4],
    "patch_size": [1, 2],
    "channels": [48],
    "top_block_channels": [None, 96],
    "num_blocks": [1, 2, 3],
    "layers_per_block": [1, 2],
    "head_dim": [16, 24],
    "num_heads": [None, 2, 4],
    "num_kv_heads": [None, 1, 2],
    "pt_seq_len": [None, 3],
    "txt_size": [0, 1, 3],
    "txt_dim": [5],
    "soft_clip": [0.0, 2.5],
    "num_classes": [0, 3],
}
PER_BLOCK = {"mlp_hidden": [32, 40]}


@dataclass(frozen=True)
class Case:
    """A model with random weights and inputs for it, B = 2."""

    model: Flow
    x: Tensor
    condition: Tensor | None
    null_condition: Tensor | None

    def to(self, device: torch.device) -> Case:
        """The same on another device."""
        moved = [None if tensor is None else tensor.to(device) for tensor in (self.condition, self.null_condition)]
        return Case(self.model.to(device), self.x.to(device), *moved)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """A failing example is read by its config; weights and inputs follow from the seed."""
        printer.text(f"Case({self.model.config}, x of {tuple(self.x.shape)})")


def field_strategy(name: str, hint: Any, default: Any) -> st.SearchStrategy[Any]:
    """Values of one option; one that has neither a finite type nor sizes above keeps its default."""
    if name in SIZES:
        return st.sampled_from(SIZES[name])
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    finite = [value for option in options for value in _values(option)]
    if not finite:
        assert default is not dataclasses.MISSING, f"give sizes for the new option {name}"
        return st.just(default)
    return st.sampled_from(finite)


def _values(hint: Any) -> list[Any]:
    if hint is bool:
        return [False, True]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []


@st.composite
def configs(draw: st.DrawFn, /, **fixed: Any) -> ModelConfig:
    """Any config of any kind that is valid; `fixed` options keep their value where the kind has them."""
    cls = draw(st.sampled_from(list(KINDS.values())))
    hints = typing.get_type_hints(cls)
    values = {
        field.name: fixed[field.name] if field.name in fixed else
        draw(field_strategy(field.name, hints[field.name], field.default))
        for field in dataclasses.fields(cls)
    }  # fmt: skip
    for name in PER_BLOCK.keys() & values.keys():
        if draw(st.booleans()):
            values[name] = tuple(draw(st.sampled_from(PER_BLOCK[name])) for _ in range(values["num_blocks"]))
    try:
        return cls(**values)
    except UserError:
        reject()


@st.composite
def cases(draw: st.DrawFn, /, dtype: torch.dtype = torch.float64, **fixed: Any) -> Case:
    """Any model, with every parameter random so that none is without effect, and inputs of a size it takes."""
    config = draw(configs(**fixed))
    rows, columns = config.grid_side, config.grid_side
    if isinstance(config, STARFlowConfig) and config.rope:
        rows, columns = draw(st.sampled_from([(1, 4), (2, 2), (3, 2), (2, 4)]))
    seed = draw(st.integers(0, 2**20))
    model, generator = randomised(config, seed).to(dtype), torch.Generator().manual_seed(seed)
    shape = (2, config.in_channels, rows * config.patch_size, columns * config.patch_size)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    if isinstance(config, STARFlowConfig):
        tokens = (2, config.txt_size, config.txt_dim)
        both = torch.randn(2, *tokens, generator=generator, dtype=dtype)
        return Case(model, x, *(both if config.txt_size else (None, None)))
    return Case(model, x, torch.tensor([-1, 1]) if config.num_classes else None, None)


def randomised(config: ModelConfig, seed: int) -> Flow:
    """A model of that config whose every parameter is random, a function of the seed alone, and matters."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build(config)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith("proj_out.weight"):
                parameter.copy_(noise * 0.2 / parameter.shape[1] ** 0.5)  # sigma well off 1, Jacobians well conditioned
            elif name.endswith(("sos_embed", "pos_embed", "class_embed")):
                parameter.copy_(noise)
            else:
                parameter.add_(noise * 0.1)
    return model
