"""The command for a GPU session is rehearsed on a CPU: every part runs, is kept at once, and is not run twice."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from starflow.cli.bench import BenchSampleOptions
from starflow.cli.options import parse
from starflow.cli.train import TrainOptions
from tests import conftest
from tests.benchmarks.test_baselines import module

ROOT = Path(__file__).parents[2]
GPU = module("gpu")


def rehearsal(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", "--output", str(folder), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def parts(folder: Path) -> list[Any]:
    options = argparse.Namespace(rehearse=False, output=folder, data=folder, seconds=530)
    found: list[Any] = GPU.parts(options)
    return found


@pytest.mark.slow
def test_every_part_of_the_rehearsal_has_an_answer(tmp_path: Path) -> None:
    """Whole, in one go: a minute of processor time."""
    done = rehearsal(tmp_path, "--seconds", "3000")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [part.name for part in parts(tmp_path)]
    assert names[-1] == "recipe"
    known = results(tmp_path)
    for name in names[:-1]:
        found = known[name]
        assert found["rc"] == 0, found
        assert found["result"], name
        if name == "large-int8" and importlib.util.find_spec("torchao"):
            assert found["result"]["weight_bytes"] < 5e6, "weights of one byte, as torchao stores them"
    again = rehearsal(tmp_path)
    assert again.stdout.count("there already") == len(names) - 1


def test_a_part_that_fails_or_takes_too_long_leaves_its_output(tmp_path: Path) -> None:
    ends = time.monotonic() + 100
    slow = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert not GPU.answer(GPU.Part("slow", 1, 5, slow), tmp_path, ends)
    found = results(tmp_path)["slow"]
    assert (found["rc"], found["output"]) == (124, "begun\n")
    assert not GPU.answer(GPU.Part("bad", 1, 20, [sys.executable, "-c", "raise ValueError('no')"]), tmp_path, ends)
    assert "ValueError: no" in results(tmp_path)["bad"]["errors"]
    good = GPU.Part("bad", 1, 20, [sys.executable, "-c", "print('{\"a\": 1}')"])
    assert GPU.answer(good, tmp_path, ends), "what failed is tried again"
    assert results(tmp_path)["bad"]["result"] == {"a": 1}
    assert not GPU.answer(GPU.Part("late", 1, 20, good.command), tmp_path, time.monotonic())


def test_the_parts_are_expected_to_fit_a_session(tmp_path: Path) -> None:
    """What a part may take is more than is expected; what is left is the recipe's, which comes last."""
    *others, recipe = parts(tmp_path)
    assert sum(part.expected for part in others) + recipe.expected < 530
    assert all(part.expected < part.limit <= 150 for part in others)
    lines = GPU.plan(others)
    assert len(lines) == len(others) + 1
    assert lines[-1].split() == ["together", str(sum(part.expected for part in others)), "s"]


def test_what_only_a_gpu_runs_is_well_formed(tmp_path: Path) -> None:
    """The commands name files, functions and options that there are."""
    for part in parts(tmp_path):
        words = part.command[1:]
        assert "cpu" not in words
        if words[0].endswith("gpu.py"):
            assert words[1:] == ["--run", part.name]
            assert part.name in GPU.FUNCTIONS
        elif words[1] == "pytest":
            named = [word for word in words if word.startswith("tests")]
            assert len(named) > 2
            assert all((ROOT / word).exists() for word in named)
        elif words[2] == "bench":
            assert parse(BenchSampleOptions, "bench sample", words[4:]).device == "cuda"
        else:
            assert words[1:3] == ["starflow", "train"]
            assert (ROOT / words[3]).is_file()
            assert parse(TrainOptions, "train", [words[3], *words[6:]]).device == "cuda"


@pytest.mark.parametrize(("device", "chosen"), [("cpu", [0, 1, 2, 3]), ("cuda", [0, 1])])
def test_on_another_device_only_what_computes_there_runs(device: str, chosen: list[int]) -> None:
    def item(fixtures: tuple[str, ...], mark: str | None, **parameters: str) -> Any:
        call = SimpleNamespace(params=parameters)
        return SimpleNamespace(fixturenames=fixtures, callspec=call, get_closest_marker=lambda name: name == mark)

    left: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
    config: Any = SimpleNamespace(getoption=lambda _: device, hook=hook)
    every = [
        item(("device",), None),
        item((), "gpu"),
        item(("tmp_path",), "slow"),
        item(("device",), None, device="mps"),
    ]
    conftest.pytest_collection_modifyitems(config, items := list(every))
    assert items == [every[number] for number in chosen]
    assert left == [one for one in every if one not in items]


def test_results_are_read_from_what_a_part_prints() -> None:
    assert GPU.results_in("...\n3 passed, 1 skipped in 2.0s\n") == {"passed": 3, "skipped": 1}
    assert GPU.results_in('a line\n{"a": 1}\n{"b": 2}\n{"c":') == {"a": 1, "b": 2}, "also of one that was stopped"
    assert GPU.results_in('{\n "a": {"b": 1}\n}\n') == {"a": {"b": 1}}
    assert GPU.results_in("text\n") is None
