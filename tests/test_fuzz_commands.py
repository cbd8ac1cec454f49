"""Generated recipes, options, models and command lines: no traceback, and all that went in is used or named.

See `tests/test_fuzz.py`, whose counts and time limit these share.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import typing
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from starflow.cli.main import COMMANDS, main
from starflow.cli.options import Flag, Parameter, parameters, parse
from starflow.config import to_dict
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.recipe import Recipe, load_recipe
from starflow.train.recipe_keys import flat_keys
from starflow.train.settings import TrainSettings
from tests.cli.conftest import random_pipeline
from tests.test_fuzz import damaged, fuzz, one_line

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "model"

KEYS = sorted(flat_keys(to_dict(Recipe("mine", TrainSettings(steps=100)))))

SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.sampled_from(["auto", "glyphs", "text", "class", "small", "1e-3", "x", "", "é\u2028", "null"])
    | st.text(max_size=6)
)

VALUE = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=4), SCALAR, max_size=2)


def same(one: Any, other: Any) -> bool:
    """Equal as a recipe means it: lists are tuples, 1 is 1.0, "1e-3" is 0.001, NaN is itself."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(other, float) and isinstance(one, (str, int, float)):
        return float(one) == other or other != other
    return bool(one == other)


def in_recipe(values: dict[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def near_default(key: str) -> st.SearchStrategy[tuple[str, Any]]:
    """A value for a key: mostly of the kind that its default has."""
    default = flat_keys(to_dict(Recipe("mine", TrainSettings(steps=100))))[key]
    like: st.SearchStrategy[Any] = st.just(default)
    if type(default) is int:
        like = st.integers(0, 2 * default + 4)
    elif isinstance(default, float):
        like = st.floats(0, 2 * default + 1)
    elif isinstance(default, bool):
        like = st.booleans()
    return st.tuples(st.just(key), st.one_of(like, like, like, VALUE))


@pytest.mark.filterwarnings("ignore")
def test_recipes() -> None:
    def check(given: dict[str, Any]) -> list[str]:
        text = {
            key: yaml.safe_dump(value, allow_unicode=True).strip().removesuffix("...") for key, value in given.items()
        }
        parts = {part for key in given for part in (key, key.split(".")[-1], key.split(".")[0])}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            path = Path(folder) / "mine.yaml"
            path.write_text("{name: mine, train: {steps: 100}}")
            try:
                recipe = load_recipe(path, text)
            except UserError as error:
                named = any(part in str(error) for part in parts)
                return [one_line(error) if named else pytest.fail(f"{given}: {error}")]
        said = " ".join(str(one.message) for one in warned)
        for key, value in given.items():
            assert (
                key in said
                or same(yaml.safe_load(text[key]), in_recipe(to_dict(recipe), key))
                or isinstance(value, dict)
            )
        return ["read"]

    unknown = st.tuples(st.sampled_from(["flow.chanels", "trian.lr", "data", "train", "x", "data.views.sice"]), VALUE)
    items = st.lists(st.sampled_from(KEYS).flatmap(near_default) | unknown, min_size=1, max_size=3)
    fuzz("recipes", items.map(dict), 1500, check)


def test_recipe_files() -> None:
    start = "name: mine\ntrain: {steps: 3}\nflow: {channels: 64}\n"

    def check(text: bytes) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mine.yaml"
            path.write_bytes(text)
            try:
                load_recipe(path)
            except UserError as error:
                return [one_line(error)]
        return ["read"]

    fuzz(
        "recipe files",
        damaged(start.encode()) | st.binary(max_size=20) | st.text(max_size=30).map(str.encode),
        800,
        check,
    )


@cache
def options_of(number: int) -> tuple[str, type, list[Parameter]]:
    command = COMMANDS[number]
    run = getattr(importlib.import_module(f"starflow.cli.{command.module}"), command.function)
    kind = typing.get_type_hints(run)["options"]
    return command.name, kind, parameters(kind)


WORD = st.text(max_size=6) | st.sampled_from(
    ["-1", "0", "1", "4", "1e3", "nan", "inf", "64x64", "auto", "a b", "--", "é", "=", "-"]
)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[int, list[tuple[str, str]], list[str]]:
    """A command, options with a value each, and other words."""
    number = draw(st.integers(0, len(COMMANDS) - 1))
    flags = [one.shown for one in options_of(number)[2] if isinstance(one.annotation, Flag) and one.kind is not bool]
    chosen = draw(st.lists(st.sampled_from(flags), max_size=3, unique=True)) if flags else []
    pairs = [(flag, draw(WORD)) for flag in chosen]
    return number, pairs, draw(st.lists(WORD.filter(lambda word: word not in ("-h", "--help")), max_size=2))


def test_options() -> None:
    def check(case: tuple[int, list[tuple[str, str]], list[str]]) -> list[str]:
        number, pairs, words = case
        name, kind, known = options_of(number)
        line = [*(f"{flag}={value}" for flag, value in pairs), *words]
        try:
            found: Any = parse(kind, name, line)
        except UserError as error:
            return [one_line(error)]
        by_flag = {one.shown: one for one in known}
        for flag, value in pairs:
            got = getattr(found, by_flag[flag].field)
            got = got[-1] if by_flag[flag].several else got
            assert str(got) == value or same(value, got) or same(value, float(got)), (flag, value, got)
        return ["read"]

    fuzz("options", command_lines(), 2000, check)


def model_files() -> list[str]:
    return sorted(path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore")
def test_damaged_models() -> None:
    """A damaged model is refused in a line, or it draws."""
    small = [name for name in model_files() if (GOLDEN / name).stat().st_size < 2**20]

    def check(case: tuple[str, Any]) -> list[str]:
        name, damage = case
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            shutil.copytree(GOLDEN, folder)
            data = (folder / name).read_bytes()
            if not data:
                return ["empty"]
            start, new, cut = damage
            at = start % min(len(data), 4096 if start % 3 else len(data))
            (folder / name).write_bytes((data[:at] + new + data[at + len(new) :])[: len(data) - cut % len(data)])
            try:
                StarFlowPipeline.from_pretrained(folder)
            except UserError as error:
                return [one_line(error)]
        return ["loaded"]

    damage = st.tuples(st.integers(0, 2**20), st.binary(max_size=3), st.just(0) | st.integers(0, 2**20))
    fuzz("models", st.tuples(st.sampled_from(small), damage), 300, check)


@pytest.mark.filterwarnings("ignore")
def test_configurations() -> None:
    """A value of config.json that cannot be is named."""
    files = [name for name in model_files() if name.endswith("config.json")]

    def check(case: tuple[str, list[tuple[int, Any]], str]) -> list[str]:
        name, changes, extra = case
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            shutil.copytree(GOLDEN, folder)
            values = json.loads((folder / name).read_text())
            for number, value in changes:
                values[sorted(values)[number % len(values)]] = value
            if extra:
                values[extra] = 1
            (folder / name).write_text(json.dumps(values))
            try:
                StarFlowPipeline.from_pretrained(folder)
            except UserError as error:
                return [one_line(error)]
        return ["loaded"]

    changes = st.lists(st.tuples(st.integers(0, 40), VALUE), max_size=2)
    fuzz("configurations", st.tuples(st.sampled_from(files), changes, st.just("") | st.text(max_size=5)), 500, check)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    random_pipeline("tiny", PixelLatents(), None).save_pretrained(tmp_path / "tiny")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_command_lines(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole commands on a tiny model: done, or one line and code 2; never a file where there was an error."""
    monkeypatch.chdir(tiny)
    torch.set_num_threads(1)
    values = {
        "--num-images": ["0", "1", "-1", "x"],
        "--seed": ["0", "-1", "9" * 25, "x"],
        "--guidance": ["0", "-1", "nan", "1e30", "2"],
        "--temperature": ["0", "1", "-1", "inf"],
        "--size": ["8x8", "9x9", "0x8", "8", "80000x80000"],
        "--steps": ["0", "1", "-1"],
        "--box": ["0,0,4,4", "4,4,9,9", "1,1", "0,0,0,0"],
        "--strength": ["0", "0.5", "2", "nan"],
        "--model": ["nothing", "red.png", "."],
        "--draws": ["0", "1"],
        "--candidates": ["0", "1", "x"],
        "--method": ["resample", "foo"],
        "--device": ["cpu", "tpu"],
        "--solver": ["sequential", "jacobi", "x"],
    }
    flags = st.lists(st.sampled_from(sorted(values)), max_size=3, unique=True)
    options = flags.flatmap(
        lambda some: st.tuples(*(st.sampled_from([f"{one}={v}" for v in values[one]]) for one in some))
    )
    lines = ("generate", "generate cat", "likelihood red.png", "likelihood broken.png red.png", "edit red.png")
    more = ("inpaint red.png", "inpaint broken.png", "info tiny", "info tiny --memory", "convert red.png")
    first = st.sampled_from([line.split() for line in lines + more])

    def check(case: tuple[list[str], Sequence[str], bool]) -> list[str]:
        words, given, as_json = case
        named = any(one.startswith("--model") for one in given) or words[0] in ("info", "convert")
        output = ["--output=out"] if words[0] in ("generate", "inpaint", "edit") else []
        line = [*words, *given, *([] if named else ["--model=tiny"]), *output, *(["--json"] if as_json else [])]
        code = main(line)
        shown = capsys.readouterr()
        assert code in (0, 2), (line, code)
        errors = [one for one in shown.err.splitlines() if one.startswith("starflow: ")]
        assert len(errors) == (code == 2), (line, shown.err)
        assert "Traceback" not in shown.err
        if code == 0 and as_json:
            json.loads(shown.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        made = list(Path("out").glob("*")) if Path("out").exists() else []
        assert code == 0 or not made, (line, made)
        shutil.rmtree("out", ignore_errors=True)
        return ["said" if code else "done"]

    fuzz("command lines", st.tuples(first, options, st.booleans()), 600, check)
