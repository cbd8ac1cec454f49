"""No tensor depends on torch's default precision or device, which are the caller's: every allocation says both."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "starflow"
ROOMS = (
    "conditioning",
    "data",
    "density",
    "edit",
    "evaluate",
    "flow",
    "latents",
    "nn",
    "pipeline",
    "published",
    "sampling",
    "serve",
)
FLOATS = {"empty", "zeros", "ones", "full", "rand", "randn", "tensor", "as_tensor", "linspace", "eye"}
INDICES = {"arange", "randperm"}
"""Integers by themselves."""

PARAMETERS = {"__init__", "_small_table"}
"""A module's own weights follow the default, as those of torch's modules do."""


def _allocations(tree: ast.AST, inside: str = "") -> Iterator[tuple[ast.Call, str]]:
    for child in ast.iter_child_nodes(tree):
        name = child.name if isinstance(child, ast.FunctionDef) else inside
        called = child.func if isinstance(child, ast.Call) and name not in PARAMETERS else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "torch":
            assert isinstance(child, ast.Call)
            yield child, called.attr
        yield from _allocations(child, name)


def _careless(source: str) -> list[int]:
    lines = []
    for call, function in _allocations(ast.parse(source)):
        said = {keyword.arg for keyword in call.keywords}
        wanted = {"dtype", "device"} if function in FLOATS else {"device"} if function in INDICES else set()
        if wanted - said:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("room", ROOMS)
def test_every_allocation_says_its_precision_and_its_device(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert {str(file): lines for file in files if (lines := _careless(file.read_text()))} == {}


def test_the_check_sees_what_is_left_out() -> None:
    assert _careless("x = torch.zeros(3)\ny = torch.zeros(3, dtype=d, device=e)\nz = torch.arange(3)") == [1, 3]
