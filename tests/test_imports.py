"""The map of rooms holds: an import only goes down, no files import each other in a circle, and heavy libraries stay
inside their adapters.

Imports are read from the syntax tree, so that one inside a function, under TYPE_CHECKING, relative, or by
`importlib.import_module("...")` counts as any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "starflow"

# Rooms by step; an import goes to a lower step only. Rooms of one step do not import each other, ALSO aside.
STEPS = (
    ("errors", "version", "bundled"),
    ("config", "io"),
    ("nn",),
    ("flow",),
    ("sampling", "published", "latents", "conditioning", "data"),
    ("edit", "density"),
    ("pipeline",),
    ("train", "evaluate", "bench"),
    ("cli", "serve"),
    ("__init__", "__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(STEPS) for room in rooms}
ALSO = {("train", "evaluate"), ("bench", "train"), ("cli", "serve"), ("cli", "__init__")}

# What a room may import of ours, where that is less than everything below it.
ONLY = {
    "nn": {"errors"},
    "__main__": {"cli"},
}
# Libraries that only the named files import, inside functions (or for types only).
ADAPTERS = {
    "diffusers": {"latents/diffusers.py"},
    "transformers": {"conditioning/text.py", "conditioning/token_embeddings.py"},
    "gradio": {"serve"},
    "fastapi": {"serve"},
    "resvg_py": {"data"},
    "torchao": {"flow/quantize.py"},
    "sbi": {"density/sbi.py"},
    "pyarrow": {"data/sources/parquet.py"},
}
NN_LIBRARIES = {"torch"}


@dataclass(frozen=True)
class Import:
    """One import: the absolute dotted module, the names taken from it, and where it stands."""

    module: str
    names: tuple[str, ...]
    line: int
    at_import: bool  # it runs when the file is imported

    @property
    def library(self) -> str:
        return self.module.split(".")[0]


class Reader(ast.NodeVisitor):
    """Collects every import of a file; `package` is the dotted package that relative imports start from."""

    def __init__(self, package: str) -> None:
        self.package = package.split(".")
        self.found: list[Import] = []
        self.unreadable: list[int] = []
        self.deferred = 0

    def _add(self, module: str, names: tuple[str, ...], line: int) -> None:
        self.found.append(Import(module, names, line, self.deferred == 0))

    def _absolute(self, level: int, module: str) -> str:
        base = self.package[: len(self.package) - level + 1] if level else []
        return ".".join([*base, *([module] if module else [])])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, (), node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = self._absolute(node.level, node.module or "")
        self._add(module, tuple(alias.name for alias in node.names), node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__"):
            text = _literal_start(node.args[0]) if node.args else None
            if text is None:
                self.unreadable.append(node.lineno)
            else:
                level = len(text) - len(text.lstrip("."))
                self._add(self._absolute(level, text.lstrip(".")).rstrip("."), (), node.lineno)
        self.generic_visit(node)

    def _visit_deferred(self, node: ast.AST) -> None:
        self.deferred += 1
        self.generic_visit(node)
        self.deferred -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_deferred(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_deferred(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_deferred(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        self.deferred += 1
        for child in node.body:
            self.visit(child)
        self.deferred -= 1
        for child in node.orelse:
            self.visit(child)


def _literal_start(node: ast.expr) -> str | None:
    """The string that an argument is, or that an f-string certainly starts with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def read(source: str, package: str) -> Reader:
    reader = Reader(package)
    reader.visit(ast.parse(source))
    return reader


def room_of(path: str) -> str:
    """The room of a file named relative to the package, e.g. "flow/block.py" -> "flow"."""
    return path.split("/")[0].removesuffix(".py")


def rooms_imported(found: Import) -> list[str]:
    """The rooms of ours that an import reaches; the package itself counts as "__init__"."""
    if found.library != "starflow":
        return []
    parts = found.module.split(".")
    if len(parts) > 1:
        return [parts[1]]
    return [name if name in RANK else "__init__" for name in found.names] or ["__init__"]


def faults(path: str, source: str) -> list[str]:
    """What in one file breaks the rules; `path` is relative to the package."""
    room, package = room_of(path), ".".join(["starflow", *path.split("/")[:-1]])
    reader = read(source, package)
    found = [f"{path}:{found.line} {text}" for found in reader.found for text in _faults_of(path, room, found)]
    if path != "__init__.py":
        found += [f"{path}:{line} imports a module whose name cannot be read" for line in reader.unreadable]
    return found


def _faults_of(path: str, room: str, found: Import) -> list[str]:
    wrong = []
    for target in rooms_imported(found):
        if target != room and not _allowed(room, target):
            wrong.append(f"{room} imports {target}")
    if found.library in ADAPTERS:
        places = ADAPTERS[found.library]
        if path not in places and room not in places:
            wrong.append(f"{found.library} outside its adapter")
        elif found.at_import:
            wrong.append(f"{found.library} at import, not inside a function")
    if room == "nn" and found.library not in NN_LIBRARIES | sys.stdlib_module_names | {"starflow"}:
        wrong.append(f"nn imports {found.library}")
    lazy = found.library in sys.stdlib_module_names
    if path == "__init__.py" and found.at_import and not lazy:
        wrong.append("the package is not lazy")
    return wrong


def _allowed(room: str, target: str) -> bool:
    if target not in RANK:
        return False
    if room in ONLY:
        return target in ONLY[room]
    return RANK[target] < RANK[room] or (room, target) in ALSO


def files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", files())
def test_imports_go_down(path: str) -> None:
    assert faults(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", files())
def test_every_room_is_on_the_map(path: str) -> None:
    assert room_of(path) in RANK, f"{path}: add the room to STEPS and to the design"


def modules_imported(path: str) -> set[str]:
    """The files of ours that a file imports, in whatever form, as paths relative to the package."""
    package = ".".join(["starflow", *path.split("/")[:-1]])
    candidates: set[str] = set()
    for found in read((ROOT / path).read_text(), package).found:
        if found.library == "starflow":
            candidates |= {found.module, *(f"{found.module}.{name}" for name in found.names)}
    stems = {candidate.removeprefix("starflow").removeprefix(".").replace(".", "/") for candidate in candidates}
    here = {f"{stem}.py" for stem in stems} | {f"{stem}/__init__.py" for stem in stems}
    return {name for name in here if (ROOT / name).is_file() and name != path}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of files that reach each other (the strongly connected components of more than one)."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph.get(waiting.pop(), set()) - seen:
                seen.add(target)
                waiting.append(target)
        reached[start] = seen
    together = ({other for other in reached[name] if name in reached.get(other, set())} for name in graph)
    return [set(group) for group in {frozenset(group) for group in together if len(group) > 1}]


def test_no_files_import_each_other_in_a_circle() -> None:
    lazy = ("__init__.py", "__main__.py")
    graph = {path: modules_imported(path) - set(lazy) for path in files() if path not in lazy}
    assert circles(graph) == []


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


FORBIDDEN = [
    ("flow/model.py", "import starflow.sampling"),
    ("flow/model.py", "import starflow.sampling.solvers as j"),
    ("flow/model.py", "from starflow.sampling import sample"),
    ("flow/model.py", "from starflow import sampling"),
    ("flow/model.py", "from starflow import sample"),
    ("flow/model.py", "import starflow"),
    ("flow/model.py", "from .. import sampling"),
    ("flow/model.py", "from ..sampling.solvers import solve"),
    ("flow/__init__.py", "from ..sampling import sample"),
    ("flow/model.py", "def f():\n    from starflow.sampling import sample"),
    ("flow/model.py", "async def f():\n    import starflow.sampling"),
    ("flow/model.py", "class A:\n    from starflow.sampling import sample"),
    ("flow/model.py", "import importlib\nimportlib.import_module('starflow.sampling')"),
    ("flow/model.py", "from importlib import import_module\nimport_module('..sampling', __package__)"),
    ("flow/model.py", "import_module(f'starflow.sampling.{name}')"),
    ("flow/model.py", "__import__('starflow.sampling')"),
    ("flow/model.py", "import_module(name)"),
    ("flow/model.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from starflow.sampling import sample"),
    ("flow/model.py", "try:\n    import starflow.pipeline.pipeline\nexcept ImportError:\n    pass"),
    ("flow/model.py", "from starflow.attic import thing"),
    ("nn/layers.py", "from starflow.flow import STARFlow"),
    ("nn/layers.py", "import numpy"),
    ("sampling/solvers.py", "from starflow.latents import base"),
    ("pipeline/pipeline.py", "from starflow.train import loop"),
    ("config.py", "from starflow.nn import layers"),
    ("evaluate/distances.py", "from starflow.train.loop import fit"),
    ("latents/base.py", "def f():\n    import diffusers"),
    ("latents/diffusers.py", "from diffusers import AutoencoderKL"),
    ("pipeline/pipeline.py", "def f():\n    from transformers import AutoModel"),
    ("serve/app.py", "from starflow.cli import main"),
    ("__init__.py", "import torch"),
    ("__init__.py", "from starflow.flow import STARFlow"),
]
ALLOWED = [
    ("flow/model.py", "from starflow.nn.layers import Layer\nfrom .block import Block\nfrom . import affine"),
    ("flow/model.py", "from ..nn import kv_cache\nfrom starflow import config"),
    ("latents/diffusers.py", "def f():\n    from diffusers import AutoencoderKL"),
    ("latents/diffusers.py", "if TYPE_CHECKING:\n    from diffusers import AutoencoderKL"),
    ("train/loop.py", "from starflow.pipeline.pipeline import StarFlowPipeline\nfrom starflow.evaluate import kid"),
    ("cli/main.py", "import_module(f'starflow.cli.{name}')"),
    ("__init__.py", "def __getattr__(name):\n    return import_module(EXPORTS[name])"),
    ("__init__.py", "if TYPE_CHECKING:\n    from starflow.flow import STARFlow"),
    ("__main__.py", "from starflow.cli.main import main"),
]


@pytest.mark.parametrize(("path", "source"), FORBIDDEN)
def test_the_rule_sees_every_form(path: str, source: str) -> None:
    assert faults(path, source)


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_the_rule_allows_what_goes_down(path: str, source: str) -> None:
    assert faults(path, source) == []


def in_a_new_python(code: str) -> str:
    """What `code` prints in an interpreter that has imported nothing of ours yet."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_the_package_is_lazy() -> None:
    heavy = ["torch", "numpy", "transformers", "diffusers", "PIL", "yaml", "huggingface_hub", "tqdm"]
    loaded = in_a_new_python(f"import starflow; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]"


def test_no_public_name_equals_a_room() -> None:
    import starflow

    assert starflow.__all__, "the package names what it offers"
    assert not set(starflow.__all__) & (set(RANK) - {"__init__", "__main__"})


def test_a_public_name_is_itself_in_every_import_order() -> None:
    """A submodule of the same name would hide the function after `import starflow.<room>`."""
    import starflow

    rooms = [room for room in RANK if (ROOT / room / "__init__.py").exists() or (ROOT / f"{room}.py").exists()]
    rooms = [room for room in rooms if room not in ("__init__", "__main__", "cli", "serve")]
    code = (
        f"import importlib, types\nfor room in {rooms}: importlib.import_module('starflow.' + room)\n"
        f"import starflow\nprint([n for n in {list(starflow.__all__)} "
        "if isinstance(getattr(starflow, n), types.ModuleType)])"
    )
    assert in_a_new_python(code) == "[]"
