"""Configuration: strict reading, messages that name the nearest key, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow.config import from_dict, read_mapping, to_dict
from starflow.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    widths: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    steps: int
    mode: Literal["fast", "slow"] = "fast"
    name: str | None = None
    layers: int | tuple[int, ...] = 2
    inner: Inner = field(default_factory=Inner)
    options: dict[str, Any] = field(default_factory=dict)


outers = st.builds(
    Outer,
    steps=st.integers(),
    mode=st.sampled_from(["fast", "slow"]),
    name=st.none() | st.text(),
    layers=st.integers() | st.lists(st.integers()).map(tuple),
    inner=st.builds(
        Inner, rate=st.floats(allow_nan=False, allow_infinity=False), widths=st.lists(st.integers()).map(tuple)
    ),
    options=st.dictionaries(st.text(), st.integers() | st.booleans()),
)


@settings(max_examples=50)
@given(outers)
def test_there_and_back(config: Outer) -> None:
    assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"the key 'steps' is missing: add it \(int\)"),
        ({"steps": 1, "stepz": 2}, r"unknown key 'stepz': did you mean 'steps'\?"),
        ({"steps": 1, "qqq": 2}, r"unknown key 'qqq': known keys: inner, layers, mode"),
        ({"steps": 1, "inner": {"rat": 1}}, r"unknown key 'inner.rat': did you mean 'rate'\?"),
        ({"steps": "one"}, r"'steps' is 'one', expected int"),
        ({"steps": True}, r"'steps' is True, expected int"),
        ({"steps": 1.5}, r"'steps' is 1.5, expected int"),
        ({"steps": 1, "mode": "medium"}, r"'mode' is 'medium', expected one of 'fast', 'slow'"),
        ({"steps": 1, "inner": {"widths": [1, "x"]}}, r"'inner.widths\[1\]' is 'x', expected int"),
        ({"steps": 1, "inner": 3}, r"'inner' is 3, expected Inner"),
        ({"steps": 1, "layers": "2 2"}, r"'layers' is '2 2', expected int or a list of int"),
        ({"steps": 1, "options": 4}, r"'options' is 4, expected a mapping of options"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Outer, values)


def test_yaml_reads_1e_4_as_a_number() -> None:
    assert from_dict(Inner, {"rate": "1e-4"}).rate == 1e-4  # YAML 1.1 gives a string


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "- 1\n- 2\n", "holds a list, expected a mapping"),
        ("a.yaml", "a: [1\n", "is not valid yaml"),
        ("a.json", "{", "is not valid json"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_mapping(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file: .*none.yaml"):
        read_mapping(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "train: {steps: 10}\nname: x\ntrain: {steps: 20}\n"),
        ("a.yaml", "name: x\ntrain: {train: 1, train: 2}\n"),
        ("a.json", '{"name": "x", "train": {"train": 1, "train": 2}}'),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} gives the key 'train' twice in one mapping: keep one"):
        read_mapping(tmp_path / name)


def test_a_merge_key_may_be_overruled(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {steps: 1, lr: 2}\nown: {<<: *base, steps: 3}\n")
    assert read_mapping(tmp_path / "a.yaml")["own"] == {"steps": 3, "lr": 2}
