"""The load script: its figures, and the service under it. STARFLOW_SOAK_MINUTES is how long it soaks, 1 by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("httpx")

from benchmarks.serve_load import ratios, resident

ROOT = Path(__file__).parents[2]


def test_the_ratios_are_those_of_the_bars() -> None:
    medians: dict[str, float] = {}
    for kind, slower in (("known prompts", 1.0), ("new prompts", 1.25)):
        medians |= {f"direct 1, {kind}": 0.08 * slower, f"direct 16, {kind}": 0.32 * slower}
        for count, rate, p50 in ((1, 10.0, 0.1), (16, 40.0, 0.4)):
            medians[f"{count} clients, {kind}: pictures a second"] = rate
            medians[f"{count} clients, {kind}: p50"] = p50
    found = ratios(medians)
    assert found["16 clients over one, known prompts"] == pytest.approx(4)
    assert found["16 clients over a direct call for 16, new prompts"] == pytest.approx(1.0)
    assert found[
        "16 clients with new prompts over a direct call for 16 known prompts, which are shorter"
    ] == pytest.approx(0.8)
    assert found["seconds of a lone client over a direct call, known prompts"] == pytest.approx(1.25)


def test_the_memory_of_a_process_is_read() -> None:
    assert resident(os.getpid()) > 10 or not Path("/proc/self/status").exists()
    assert resident(2**30) == 0


@pytest.mark.slow
def test_clients_that_leave_read_slowly_and_ask_for_too_much_harm_nobody(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    minutes = os.environ.get("STARFLOW_SOAK_MINUTES", "1")
    script, output = ROOT / "benchmarks/serve_load.py", tmp_path / "serve.json"
    command = [
        sys.executable,
        str(script),
        "--seconds",
        "1",
        "--rounds",
        "1",
        "--starts",
        "1",
        "--soak",
        minutes,
        "--output",
        str(output),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600 + 120 * float(minutes), stdout=subprocess.DEVNULL)
    report = json.loads(output.read_text())
    found = report["faults"]
    assert report["exit"] == 0
    assert all(row["errors"] == 0 for row in report["closed_loop"])
    assert all(found[f"after 100 left, of 20 served (round {number})"] == 20 for number in range(3))
    assert found["beside 8 slow readers, of 20 served"] == 20
    assert found["events of slow readers"] == [16] * 8  # 4 pictures, each with 3 previews
    assert found["metrics back to zero"]
    assert set(found["overrun"]) == {"200", "429"}
    assert found["resident after round 2"] < 1.1 * found["resident after round 0"] + 20
    memory = report["soak"]["resident"]
    assert memory[-1] < 1.1 * memory[1 if len(memory) > 1 else 0] + 50
