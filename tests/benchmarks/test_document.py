"""What was measured is written into the document, once and in its place."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from starflow.bench import sample as bench
from starflow.bench.limits import MachineLimits
from starflow.bench.sample import SamplingBenchmark, load_model, measure
from starflow.config import to_dict
from starflow.flow.config import STARFlowConfig
from tests.compilers import set_compiler

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("document", ROOT / "benchmarks" / "document.py")
assert SPEC is not None
assert SPEC.loader is not None
document = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(document)


@pytest.mark.filterwarnings("ignore:sampling goes on without its compiled loop")
def test_a_report_becomes_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = STARFlowConfig(in_channels=2, img_size=4, channels=32, num_blocks=1, layers_per_block=1, head_dim=32)
    monkeypatch.setattr(bench, "measure_limits", lambda _device, _dtype: MachineLimits(2e9, 3e9))
    monkeypatch.setattr(bench, "architecture", lambda _name: small)
    set_compiler("/nowhere/c++", monkeypatch)
    (tmp_path / "textbook.py").write_text(
        "from starflow.bench.limits import Baseline\n"
        "def baselines(task): return [Baseline('textbook', lambda: None, 1.0, 'a note')]\n"
    )
    report = measure(
        load_model("57m", torch.device("cpu"), torch.float32), SamplingBenchmark((2,), 0.0, 2, 1, tmp_path)
    )
    text = document.section({"command": "starflow bench sample 57m", **to_dict(report)})
    assert "random weights, token by token only" in text
    assert "Ceilings of the run: 2.0 GB/s, 3 GFLOP/s." in text
    assert "| sequential | 2 | 0 |" in text
    assert "| textbook: a note |" in text
    assert "Command: `starflow bench sample 57m`." in text


def test_it_goes_into_its_own_place_and_again(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    target.write_text("a\n<!-- one -->\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n")
    for text in ("first", "second \\1"):
        document.fill(target, "one", text)
    assert target.read_text() == "a\n<!-- one -->\nsecond \\1\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n"
    with pytest.raises(SystemExit, match="has 0 places"):
        document.fill(target, "three", "")


def test_the_document_has_a_place_for_every_command_it_names() -> None:
    text = document.DOCUMENT.read_text()
    for name in ("sample", "sample-trained", "sample-glyphs", "growth", "weights"):
        assert f"benchmarks/results/{name}.json" in text
        assert f"<!-- {name} -->" in text
        assert f"<!-- /{name} -->" in text
