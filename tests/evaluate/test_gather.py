"""Two processes get what one gets: rows in order, none dropped, and a distance that is the same number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from starflow.evaluate import gather_rows, kernel_distance, own_rows
from starflow.evaluate.gather import is_first

CODE = """
import json, sys, torch
from starflow.evaluate import gather_rows, is_first, kernel_distance, own_rows
from starflow.evaluate.gather import process_group

def rows(count, seed):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

with process_group():
    found = {}
    for count in (1, 2, 7, 8):
        whole = rows(count, count)
        mine = own_rows(count)
        found[str(count)] = torch.equal(gather_rows(whole[mine.start:mine.stop], count), whole)
    samples, real = rows(7, 1), rows(9, 2)
    mine = own_rows(7)
    found["distance"] = kernel_distance(gather_rows(samples[mine.start:mine.stop], 7), real).value
    if is_first():
        print(json.dumps(found))
"""


def test_alone_everything_is_ones_own() -> None:
    rows = torch.arange(5.0)
    assert is_first()
    assert list(own_rows(5)) == [0, 1, 2, 3, 4]
    assert gather_rows(rows, 5) is rows


def test_two_processes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "run.py").write_text(CODE)
    source = Path(__file__).parents[2] / "src"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run(
        [*torchrun, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.strip().splitlines()[-1])

    def rows(count: int, seed: int) -> torch.Tensor:
        return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    assert found.pop("distance") == pytest.approx(kernel_distance(rows(7, 1), rows(9, 2)).value, abs=1e-12)
    assert found == {"1": True, "2": True, "7": True, "8": True}
