"""The examples in the package's docstrings run: each in an empty folder, without network."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import socket
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from starflow.conditioning.text import MINILM_MODULE

ROOT = Path(__file__).parent.parent / "src"
AT_LEAST = 40
"""Docstrings with an example."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def docstrings(tree: ast.Module, module: str) -> dict[str, str]:
    """Every docstring of a module by the dotted name of its owner, as doctest names it."""
    found: dict[str, str] = {}
    waiting: list[tuple[ast.AST, str]] = [(tree, module)]
    while waiting:
        node, name = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found[name] = ast.get_docstring(node) or ""
        if isinstance(node, (ast.Module, ast.ClassDef)):
            waiting += [(child, f"{name}.{child.name}") for child in node.body if hasattr(child, "name")]
    return found


def examples() -> list[tuple[str, str]]:
    """(module, name) of every docstring with an example."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if ">>>" in text:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found += [(module, name) for name, doc in docstrings(ast.parse(text), module).items() if ">>>" in doc]
    return sorted(found)


EXAMPLES = examples()


def refuse(*_: object) -> NoReturn:
    raise AssertionError("an example in a docstring opens a connection")


@pytest.mark.parametrize(("module", "name"), EXAMPLES, ids=[name for _, name in EXAMPLES])
def test_example(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = {test.name: test for test in doctest.DocTestFinder().find(importlib.import_module(module), module)}
    test = found[name]
    if '"glyphs"' in test.docstring and importlib.util.find_spec(MINILM_MODULE) is None:  # type: ignore[operator]
        pytest.skip("the text encoder's package is not installed")
    lines: list[str] = []
    with torch.random.fork_rng(devices=[]):
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(lines)


def test_there_are_enough() -> None:
    assert len(EXAMPLES) >= AT_LEAST


def test_a_wrong_example_fails() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3", {}, "wrong", None, None)
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lambda _: None).failed == 1
