"""The generated pages say what the code says: every key of a recipe with its default, every module, every command."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import starflow
from docs import write_reference
from docs.write_reference import Key, describe, field_docs, first_sentence, sections
from starflow.cli.main import COMMANDS
from starflow.config import from_dict, to_dict
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.train.recipe import Recipe
from tests.test_imports import ROOT, files, room_of

LEAST = {"name": "x", "train": {"steps": 7}}
"""The smallest recipe: what it holds beside these are defaults."""
NO_MEANING = {"name"}
"""Keys whose name says it all."""


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, str]]:
    """Default and meaning of every key of the page."""
    lines = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*) \|$", write_reference.recipe_page(), re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in lines}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested dictionaries."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_every_key_of_a_recipe_is_on_the_page_with_its_default(rows: dict[str, tuple[str, str]]) -> None:
    for name, value in flat(to_dict(from_dict(Recipe, LEAST))).items():
        if name.startswith("flow.") or name in ("name", "train.steps"):
            continue  # required, or completed below
        default = rows[name][0]
        shown = "" if default == "empty" else yaml.safe_load(default.strip("`"))
        assert shown == value or float(shown) == value, name


@pytest.mark.parametrize("config", [STARFlowConfig, TarFlowConfig])
def test_every_option_of_the_flow_is_on_the_page(config: type[Any], rows: dict[str, tuple[str, str]]) -> None:
    assert {f"flow.{field.name}" for field in dataclasses.fields(config) if field.init} <= set(rows)


def test_required_keys_are_called_so(rows: dict[str, tuple[str, str]]) -> None:
    assert {name for name, (default, _) in rows.items() if default == "required" and not name.startswith("flow.")} == {
        "name",
        "train.steps",
    }


def test_every_key_has_a_meaning(rows: dict[str, tuple[str, str]]) -> None:
    without = {name for name, (_, meaning) in rows.items() if not meaning} - NO_MEANING
    assert not without, "write a docstring after the field"


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner section.

    Attributes:
        size: side of a thing, pixels.
        seed: of all draws | and none,
            in two lines.
    """

    size: int = 3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(size=5))
    ratio: tuple[float, ...] = (0.5, 1e-8)
    """A ratio."""
    note: str | None = None
    path: Path = Path("a/b")


def test_sections_in_closed_form() -> None:
    assert list(sections(Outer)) == [
        (
            "",
            [
                Key("name", "", "required", ""),
                Key("ratio", "", "`[0.5, 1.0e-08]`", "A ratio."),
                Key("note", "", "`null`", ""),
                Key("path", "", "`a/b`", ""),
            ],
        ),
        (
            "inner",
            [
                Key("inner.size", "", "`5`", "Side of a thing, pixels."),
                Key("inner.seed", "", "`0`", r"Of all draws \| and none, in two lines."),
            ],
        ),
    ]
    assert field_docs(Outer) == {"ratio": "A ratio."}


def test_words_for_types_and_sentences() -> None:
    from typing import Literal

    assert describe(Literal["a", "b"]) == "One of `a`, `b`."
    assert describe(Literal["a"] | None) == "One of `a`."
    assert describe(float) == ""
    assert first_sentence("It is one.\n\nIt is two.") == "It is one."


def test_every_module_is_on_the_page_of_its_room() -> None:
    pages = write_reference.room_pages()
    shown = {name for text in pages.values() for name in re.findall(r"automodule:: (\S+)", text)}
    expected = {
        "starflow." + path.removesuffix(".py").replace("/", ".")
        for path in files()
        if not path.endswith("__init__.py") and room_of(path) not in write_reference.WITHOUT_PAGE
    }
    assert shown == expected | {"starflow.latents", "starflow.conditioning"}  # rooms that load by description
    for name in starflow.__all__:
        assert name.startswith("__") or f"`{name} <" in pages["api.md"]
    assert (ROOT / "flow").is_dir()


def test_every_command_is_on_its_page() -> None:
    text = write_reference.commands_page()
    for command in COMMANDS:
        assert f"## {command.name}\n\n```text\nusage: starflow {command.name}" in text


def test_pages_are_written_once_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "attic.md").write_text("# a room that is gone")
    write_reference.main([str(tmp_path)])
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {"api.md", "recipe.md", "commands.md", "flow.md"} <= set(times)
    assert "attic.md" not in times
    write_reference.main([str(tmp_path)])
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
