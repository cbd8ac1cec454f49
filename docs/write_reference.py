"""Write the reference pages from the code: one page a room, every key of a recipe, every option of a command.

    python -m docs.write_reference [FOLDER]      # docs/reference by default; `make docs` does it

The pages are not kept in the repository: they are made anew at each build, so they always say what the code says.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

import starflow
from docs.draw_architecture import ABOUT, PACKAGE
from starflow.cli.main import COMMANDS
from starflow.cli.main import main as starflow_main
from starflow.config import Dataclass
from starflow.train.recipe import Recipe

FOLDER = Path(__file__).parent / "reference"
WITHOUT_PAGE = ("__init__", "__main__", "bundled", "cli", "version")
"""What has no page of its own: the commands are on the page of commands."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a configuration: its dotted name, type and default in words, and its documentation."""

    name: str
    kind: str
    default: str
    meaning: str

    def row(self) -> str:
        return f"| `{self.name}` | {self.default} | {' '.join((self.meaning, self.kind)).strip()} |"


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0]) if arguments else FOLDER
    os.environ["COLUMNS"] = "90"  # argparse wraps its help to what a page shows without scrolling
    pages = {
        **room_pages(),
        "recipe.md": recipe_page(),
        "companions.md": companion_page(),
        "commands.md": commands_page(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # an untouched page is not built again
            path.write_text(text, encoding="utf-8")


def room_pages() -> dict[str, str]:
    """The API pages by file name: an index with the public names, and a page for each room."""
    names = [name for name in ABOUT if name not in WITHOUT_PAGE and modules(name)]
    pages = {f"{name}.md": _room_page(name) for name in names}
    public = sorted((name for name in starflow.__all__ if not name.startswith("__")), key=str.lower)
    rows = [f"| {_link(name)} | {first_sentence(getattr(starflow, name).__doc__)} |" for name in public]
    rooms = [f"| [`{name}`]({name}.md) | {ABOUT[name]} |" for name in names]
    pages["api.md"] = "\n".join(
        [
            "# API reference",
            "",
            "These names are imported from `starflow` itself:",
            "",
            *_table(("name", "what it is"), rows),
            "",
            "Everything else is imported from its module, for instance "
            "`from starflow.flow.config import STARFlowConfig`. A room is a folder of the package; the "
            "[architecture](../architecture.md) shows which room may import which.",
            "",
            *_table(("room", "what is in it"), rooms),
            "",
            "```{toctree}\n:hidden:\n",
            *(f"{name} <{name}>" for name in names),
            "```",
            "",
        ]
    )
    return pages


def _room_page(name: str) -> str:
    package = PACKAGE / name / "__init__.py"
    about = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) if package.is_file() else None
    parts = [f"# {name}", "", about or f"The module `{name}`: {ABOUT[name]}.", ""]
    for module in modules(name):
        parts += [f"## `{module.removeprefix('starflow.')}`", "", "```{eval-rst}", f".. automodule:: {module}"]
        parts += ["   :members:", "   :undoc-members:", "   :ignore-module-all:", "```", ""]
    return "\n".join(parts)


def modules(room: str) -> list[str]:
    """The modules of a room that say or define something, the package itself first."""
    paths = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    shown = [path for path in paths if path.name != "__init__.py" or _defines(path)]
    dotted = (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in shown)
    dotted = (name.removesuffix(".__init__") for name in dotted)
    return sorted(dotted, key=lambda name: (name.count("."), name))


def _defines(path: Path) -> bool:
    """Whether a file defines a public class or function."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(one, kinds) and not one.name.startswith("_") for one in body)


def _link(name: str) -> str:
    target = getattr(starflow, name)
    role = "class" if inspect.isclass(target) else "func"
    return f"{{py:{role}}}`{name} <{target.__module__}.{target.__name__}>`"


def recipe_page() -> str:
    """Every key of a recipe, by section."""
    parts = [
        "# Every key of a recipe",
        "",
        "A recipe is a YAML file that describes a whole training run (see [Training](../training.md)). Each key below "
        "is also an option of `starflow train`, for instance `--train.lr 1e-3`. A key that is not listed here is an "
        "error that names the nearest one. `base: other.yaml` at the top of a recipe takes all keys of another recipe, "
        "and those of this one replace them.",
        "",
    ]
    for section, keys in sections(Recipe):
        parts += [f"## {'Top level' if not section else f'`{section}`'}", ""]
        parts += [*_table(("key", "default", "meaning"), [key.row() for key in keys]), ""]
    return "\n".join(parts)


def companion_page() -> str:
    """Every key of the recipes of a student, a denoiser and a density, apart from those that every recipe has."""
    from starflow.train.tasks.denoiser import DenoiserRecipe
    from starflow.train.tasks.density import DensityRecipe
    from starflow.train.tasks.student import StudentRecipe

    parts = [
        "# Every key of a student's, a denoiser's and a density's recipe",
        "",
        "`starflow train-student` and `starflow train-denoiser` read recipes of their own (see [Draw in one "
        "pass](../student.md) and [A learned denoiser](../denoiser.md)). Their sections `data` and `train` are those "
        "of [every recipe](recipe.md), and here, too, each key is an option of the command. `starflow train` reads a "
        "density's where `data.source` is `arrays` (see [A density on time series](../tutorials/time-series.md)).",
        "",
    ]
    kinds = (("A student", StudentRecipe), ("A denoiser", DenoiserRecipe), ("A density", DensityRecipe))
    for title, recipe in kinds:
        shared = ("train",) if recipe is DensityRecipe else ("data", "train")
        for section, keys in sections(recipe):
            if section.split(".")[0] not in shared:
                parts += [f"## {title}" + (f": `{section}`" if section else ""), ""]
                parts += [*_table(("key", "default", "meaning"), [key.row() for key in keys]), ""]
    return "\n".join(parts)


def sections(cls: type[Any], prefix: str = "", values: object = None) -> Iterator[tuple[str, list[Key]]]:
    """The sections of a configuration, outer before inner, each with the keys that hold plain values.

    `values` is the instance that gives the defaults where the section above has set its own.
    """
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    plain, inner = [], []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        nested, default = _sections_in(hints[field.name]), _default(field, values)
        name = f"{prefix}{field.name}"
        if nested:
            inner += [(name, one, default, len(nested) > 1) for one in nested]
        elif field.name == "flow" and cls is Recipe:
            inner += [(name, one, None, True) for one in _flow_options()]
        else:
            plain.append(Key(name, describe(hints[field.name]), _shown(default), docs.get(field.name, "")))
    if plain:
        yield prefix.removesuffix("."), plain
    for name, one, default, several in inner:
        given = default if isinstance(default, one) else None
        for section, keys in sections(one, f"{name}.", given):
            yield f"{section}` of `{one.__name__}" if several else section, keys


def _flow_options() -> list[type[Any]]:
    """What `flow` holds while it is a dictionary: the options of the kinds of flows."""
    from starflow.flow.config import KINDS

    return list(KINDS.values())


def _sections_in(hint: object) -> list[type[Any]]:
    """The dataclasses that a type hint is or may be."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return [one for one in options if inspect.isclass(one) and dataclasses.is_dataclass(one)]


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _default(field: dataclasses.Field[Any], values: object) -> object:
    if values is not None:
        return getattr(values, field.name)
    if field.default_factory is not dataclasses.MISSING:
        try:
            return field.default_factory()
        except TypeError:  # a section whose own keys are required
            return dataclasses.MISSING
    return field.default


def _shown(default: object) -> str:
    """A default as YAML writes it."""
    if default is dataclasses.MISSING:
        return "required"
    value = list(default) if isinstance(default, tuple) else default
    if isinstance(value, Path):
        value = str(value)
    text = repr(value) if isinstance(value, float) else yaml.safe_dump(value, default_flow_style=True, width=1000)
    text = text.strip().removesuffix("...").strip()  # YAML ends a bare value so
    return "empty" if text in ("", "''") else f"`{text}`"


def describe(hint: object) -> str:
    """The choices of a key that has them; other types can be seen from the default."""
    if typing.get_origin(hint) is Literal:
        return f"One of {', '.join(f'`{one}`' for one in typing.get_args(hint))}."
    parts = [describe(one) for one in typing.get_args(hint)] if _is_union(hint) else []
    return " ".join(filter(None, parts))


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Documentation of a dataclass's fields, inherited ones too: the string after a field, or "Attributes:"."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object and dataclasses.is_dataclass(base):
            found |= _attributes_section(inspect.getdoc(base) or "") | _strings_after_fields(base)
    return found


def _strings_after_fields(cls: type[Dataclass]) -> dict[str, str]:
    (node,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    pairs = itertools.pairwise(node.body)
    return {
        field.target.id: _one_line(after.value.value)
        for field, after in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def _attributes_section(docstring: str) -> dict[str, str]:
    match = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    if match is None:
        return {}
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", match[1], re.MULTILINE)
    return {name: _sentence(_one_line(text)) for name, text in entries}


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def first_sentence(docstring: str | None) -> str:
    """The first sentence of a docstring, for a table."""
    text = _one_line((docstring or "").split("\n\n")[0])
    return re.split(r"(?<=[.:])\s", text)[0]


def commands_page() -> str:
    """The help of every command."""
    parts = [
        "# Commands",
        "",
        "This is what `starflow COMMAND --help` prints. The commands that train also take every key of the "
        "[recipe](recipe.md) as an option.",
        "",
    ]
    for command in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            starflow_main([*command.name.split(), "--help"])
        parts += [f"## {command.name}", "", f"```text\n{printed.getvalue().strip()}\n```", ""]
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]


if __name__ == "__main__":
    main(sys.argv[1:])
