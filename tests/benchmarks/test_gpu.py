"""The command for a GPU session is rehearsed on a CPU: every part runs, is kept at once, and is not run twice."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.test_baselines import module

ROOT = Path(__file__).parents[2]
GPU = module("gpu")


def rehearsal(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--rehearse", "--output", str(folder), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.slow
def test_every_part_of_the_rehearsal_has_an_answer(tmp_path: Path) -> None:
    done = rehearsal(tmp_path, "--seconds", "3000")
    assert done.returncode == 0, done.stdout + done.stderr
    options = argparse.Namespace(rehearse=False, output=tmp_path, data=tmp_path, seconds=530)
    names = [part.name for part in GPU.parts(options)]
    assert names[-1] == "recipe"
    for name in names[:-1]:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["rc"] == 0, found
        assert found["result"], name
    again = rehearsal(tmp_path)
    assert again.stdout.count("there already") == len(names) - 1


def test_a_part_that_fails_or_takes_too_long_leaves_its_output(tmp_path: Path) -> None:
    ends = time.monotonic() + 100
    slow = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert not GPU.answer(GPU.Part("slow", 5, slow), tmp_path, ends)
    found = json.loads((tmp_path / "slow.json").read_text())
    assert (found["rc"], found["output"]) == (124, "begun\n")
    assert not GPU.answer(GPU.Part("bad", 20, [sys.executable, "-c", "raise ValueError('no')"]), tmp_path, ends)
    assert "ValueError: no" in json.loads((tmp_path / "bad.json").read_text())["errors"]
    good = GPU.Part("bad", 20, [sys.executable, "-c", "print('{\"a\": 1}')"])
    assert GPU.answer(good, tmp_path, ends), "what failed is tried again"
    assert json.loads((tmp_path / "bad.json").read_text())["result"] == {"a": 1}
    assert not GPU.answer(GPU.Part("late", 20, good.command), tmp_path, time.monotonic())


def test_the_limits_of_all_parts_but_the_recipe_fit_a_session(tmp_path: Path) -> None:
    """They are limits: parts are expected to end earlier, and what is left is the recipe's."""
    options = argparse.Namespace(rehearse=False, output=tmp_path, data=None, seconds=530)
    assert sum(part.limit for part in GPU.parts(options)) < 600
    commands = [" ".join(part.command) for part in GPU.parts(options)]
    assert all("cpu" not in one for one in commands)


def test_what_pytest_counted_is_read() -> None:
    assert GPU.last_json("...\n3 passed, 1 skipped in 2.0s\n") == {"passed": 3, "skipped": 1}
    assert GPU.last_json("text\n") is None
