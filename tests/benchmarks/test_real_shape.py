"""The benchmark of the real shape: its arithmetic and its words, and at a small size all of its stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.bench.train import MODEL_57M
from starflow.flow.memory import weight_bytes
from tests.benchmarks.test_baselines import module

ROOT = Path(__file__).parents[2]
REAL_SHAPE = module("real_shape")


def test_the_table_is_the_bytes_over_the_bandwidth() -> None:
    found: dict[str, Any] = REAL_SHAPE.table("57m")
    for form in ("bfloat16", "int8", "int4"):
        row = found[form]
        assert row["20 GB/s"] == pytest.approx(row["bytes"] / 20e9 / 60)
        assert row["10 GB/s"] == pytest.approx(20 * row["200 GB/s"])
        layers = weight_bytes(MODEL_57M, "bfloat16", None if form == "bfloat16" else form)
        assert 0.95 * 256 * layers < row["bytes"] < 1.4 * 256 * layers, "every token reads all weights, and its cache"
    assert found["bfloat16"]["bytes"] > found["int8"]["bytes"] > found["int4"]["bytes"]


def test_what_was_measured_is_told_apart_from_what_is_scaled() -> None:
    clock = {"seconds": 100.0, "processor_seconds": 150.0}
    block = {"token": clock, "prefix": clock}
    found = {
        "weights": "int8",
        "threads": 2,
        "load": (0.5, 0.4, 0.3),
        "shallow": block,
        "deep": block,
        "read_rate": {"seconds": 30e9, "processor_seconds": 15e9},
        "read_bytes_a_picture": 1.5e12,
        "picture_extrapolated": {"seconds": 90.0, "processor_seconds": 120.0},
        "resident_bytes": 5e9,
        "anonymous_bytes": 1e9,
        "packed_bytes": 4e9,
        "cache_bytes": 7e8,
    }
    text = REAL_SHAPE.describe(found)
    assert "extrapolated from tokens: 90.0 s (120.0 processor s)" in text
    whole = REAL_SHAPE.describe(found | {"picture": clock})
    assert "drawn whole: 100.0 s (150.0 processor s)" in whole
    assert "reading 1.50 TB takes 50.0 s at that rate, which is 50% of it" in whole
    assert "scaled to a read of 20 GB/s: 150.0 s" in whole
    assert "at most 5.00 GB resident, 1.00 GB of it beside mapped files" in whole


@pytest.mark.slow
def test_every_stage_runs_at_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> dict[str, Any]:
        command = [sys.executable, str(ROOT / "benchmarks" / "real_shape.py"), *words, "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    folder = str(tmp_path / "model")
    made = run("make", folder, "--shape", "57m")
    with torch.device("meta"):
        assert made["parameters"] == sum(one.numel() for one in REAL_SHAPE.build(MODEL_57M).parameters())
    packed = run("pack", folder, "--weights", "int8")
    files = {file.name: file.stat().st_ino for file in (tmp_path / "cache").glob("packed-*")}
    assert len(files) == 6, "no two blocks are alike"
    found = run("time", folder, "--weights", "int8", "--whole")
    assert found["packed_bytes"] == packed["packed_bytes"]
    assert files == {file.name: file.stat().st_ino for file in (tmp_path / "cache").glob("packed-*")}
    assert found["picture"].keys() == found["picture_extrapolated"].keys()
