"""`torchrun -m starflow evaluate` on two processes reports what one process reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.conftest import CLASSES

STUB = """
import torch
from torch import nn
class Stub(nn.Module):
    def forward(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
"""
SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.slow
def test_two_processes_report_what_one_does(classes: Path, tmp_path: Path) -> None:
    for number in range(60):
        folder = tmp_path / "pictures" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 3 * number, 20)).save(folder / f"{number}.png")
    (tmp_path / "stub_network.py").write_text(STUB)
    env = {
        **os.environ,
        "PYTHONPATH": f"{SOURCE}{os.pathsep}{tmp_path}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    sizes = ["--samples", "7", "--tuning-samples", "5", "--guidance", "1", "--features", "stub=stub_network:Stub"]
    reports = {}
    for count in (1, 2):
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            "-m",
            "starflow",
        ]
        words = ["evaluate", str(classes), str(tmp_path / "pictures"), "--output", str(tmp_path / str(count)), *sizes]
        made = subprocess.run(
            [*run, *words, "--classify"], capture_output=True, text=True, timeout=300, env=env, check=False
        )
        assert made.returncode == 0, made.stderr
        reports[count] = json.loads((tmp_path / str(count) / "report.json").read_text())
    one, two = reports[1], reports[2]
    for split in ("train", "heldout"):
        first, second = one["likelihood"][split], two["likelihood"][split]
        assert first["count"] == second["count"]
        assert first["bits_per_dim"] == pytest.approx(second["bits_per_dim"], rel=1e-6)
    assert one["classification"] == two["classification"]
    for name, measures in one["distances"].items():
        assert two["distances"][name] == pytest.approx(measures, rel=1e-4, abs=1e-6), name
    assert two["distances"]["samples, guidance 1"]["count"] == 7
