"""Growth of cost: measured with what sampling itself uses, and what binds is named."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from starflow.bench.limits import MachineLimits

pytestmark = pytest.mark.filterwarnings("ignore:sampling goes on without its compiled loop")
FOLDER = Path(__file__).parents[2] / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"growth_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


GROWTH = module("growth")


def test_a_run_writes_figures_a_plot_and_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(GROWTH, "SWEEPS", {"tokens": (4, 16), "batch": (1, 2), "width": (64, 128)})
    monkeypatch.setattr(GROWTH, "BASE", {"tokens": 16, "batch": 2, "width": 64})
    monkeypatch.setattr(GROWTH, "measure_limits", lambda _device, _dtype: MachineLimits(1e10, 1e11))
    output, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    monkeypatch.setattr(sys, "argv", ["growth.py", "--output", str(output), "--plot", str(plot), "--repeats", "1"])
    GROWTH.main()
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(output.read_text())
    first, second = found["sweeps"]["tokens"]
    assert "exponent" not in first
    assert second["seconds_a_picture"] == pytest.approx(second["sequential_seconds"] / 2)
    text = module("document").growth(found)
    assert text.count("| tokens |") == text.count("| batch |") == text.count("| width |") == 1
    assert f"| 16 | {second['sequential_seconds']:.3f} | {second['exponent']:.2f} |" in text


def test_what_a_token_needs_grows_as_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GROWTH, "fastest", lambda *_: 1.0)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    base, ceilings = {"tokens": 16, "batch": 2, "width": 64}, MachineLimits(1e10, 1e11)

    def needs(**changes: int) -> dict[str, float]:
        found: dict[str, float] = GROWTH.measure({**base, **changes}, torch.device("cpu"), ceilings, 1)["needs"]
        return found

    plain, longer, more = needs(), needs(tokens=64), needs(batch=4)
    assert longer["weights"] == pytest.approx(4 * plain["weights"])
    assert longer["cache"] == pytest.approx(plain["cache"] * 64 * 65 / (16 * 17))
    assert more["weights"] == pytest.approx(plain["weights"])
    assert more["cache"] == pytest.approx(2 * plain["cache"])
    assert more["arithmetic"] == pytest.approx(2 * plain["arithmetic"])
