"""The released model at its real size: a random checkpoint is converted, loaded, run forward and sampled in bounded
memory. It takes 24 GB of disk, and on two idle cores about a quarter of an hour; STARFLOW_REAL_SHAPE names a folder for
its files, which are kept there and used again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def stage(name: str, folder: Path) -> dict[str, Any]:
    """One stage in a process of its own."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.published.real_shape", name, str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its memory from /proc")
def test_the_released_model_in_bounded_memory(tmp_path: Path) -> None:
    folder = Path(os.environ.get("STARFLOW_REAL_SHAPE") or tmp_path)
    if not (folder / "starflow_3B_t2i_256x256.pth").is_file():
        assert stage("generate", folder)["bytes"] > 15e9
    converted = stage("convert", folder)
    assert 3.8e9 < converted["parameters"] < 3.9e9
    assert converted["anonymous"] < converted["largest_shard"] + 1e9
    assert stage("forward", folder)["anonymous"] < 9e9
    assert stage("sample", folder)["anonymous"] < 9e9
