"""Values that are not finite are named: which picture, from which block on, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from starflow.errors import UserError
from starflow.flow.model import Flow, Trace

LISTED = 4
"""Pictures that a message names, at most."""


class NotFiniteError(UserError):
    """What was computed is not finite, so that there is no picture and no density to give."""


def broken_rows(values: Tensor) -> list[int]:
    """The rows of a batch that hold a value that is not finite.

    >>> import torch
    >>> broken_rows(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))
    [1]
    """
    return [int(row) for row in (~values.isfinite().flatten(1).all(1)).nonzero()]


def broken_block(states: Sequence[Tensor], row: int) -> int | None:
    """The first of the blocks' outputs, in the order of computation, whose row is not finite."""
    return next((number for number, state in enumerate(states) if not bool(state[row].isfinite().all())), None)


def check_finite(
    model: Flow, values: Tensor, inputs: Mapping[str, Tensor | None], blocks: Mapping[int, int], remedy: str
) -> None:
    """Refuse what a flow computed where it is not finite.

    Args:
        model: the flow.
        values: (B, ...), what it computed.
        inputs: what it was given, by name, a row a picture.
        blocks: of a picture that is not finite, the block from which on it is not; counted from the data.
        remedy: what to do where weights and inputs are finite.

    Raises:
        NotFiniteError: a picture that is not finite; it names the pictures, the block and the cause.
    """
    rows = broken_rows(values)
    if not rows:
        return
    shown = ", ".join(map(str, rows[:LISTED])) + (" and more" if len(rows) > LISTED else "")
    which = f"picture {shown}" if len(rows) == 1 else f"pictures {shown}"
    where = f" from block {blocks[rows[0]]} on" if rows[0] in blocks else ""
    raise NotFiniteError(f"{which} of {len(values)} came out not finite{where}: {_cause(model, inputs, rows, remedy)}")


def check_trace(model: Flow, trace: Trace, inputs: Mapping[str, Tensor | None]) -> None:
    """As `check_finite`, of a pass from data to noise.

    Raises:
        NotFiniteError: a picture whose noise or log-determinant is not finite.
    """
    states = trace.states[1:]
    values = trace.z.flatten(1).sum(1, keepdim=True) + trace.logdet[:, None]
    blocks = {row: found for row in broken_rows(values) if (found := broken_block(states, row)) is not None}
    check_finite(model, values, inputs, blocks, "the model is broken: use another checkpoint")


def _cause(model: Flow, inputs: Mapping[str, Tensor | None], rows: Sequence[int], remedy: str) -> str:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the weights '{name}' are not finite, use another checkpoint"
    for name, given in inputs.items():
        if given is not None and given.is_floating_point():
            broken = broken_rows(given)
            if broken and (len(given) == 1 or set(broken) & set(rows)):
                return f"the {name} of picture {broken[0]} is not finite"
    return remedy
