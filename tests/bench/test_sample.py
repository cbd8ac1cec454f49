"""The speed of sampling is measured and reported; the numbers themselves are the machine's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from starflow.bench import sample as bench
from starflow.bench.limits import DrawTask, MachineLimits, load_baselines, measure_limits, sampling_work
from starflow.bench.sample import SamplingBenchmark, SpeedReport, load_model, measure
from starflow.cli.bench import BenchSampleOptions, bench_sample, sample_table
from starflow.conditioning import ClassLabels
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.model import build
from starflow.latents import PixelLatents
from starflow.sampling import calibrate
from tests.cli.conftest import CLASSES, random_pipeline
from tests.compilers import set_compiler

CPU = torch.device("cpu")
SMALL = STARFlowConfig(
    in_channels=2, img_size=4, channels=32, num_blocks=2, layers_per_block=(1, 2), head_dim=32, txt_size=2, txt_dim=4
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings and times that nobody measures, and a small model under the name of the usual one."""
    monkeypatch.setattr(bench, "measure_limits", lambda _device, _dtype: MachineLimits(1e10, 1e11))
    monkeypatch.setattr(bench, "architecture", lambda _name: SMALL)
    monkeypatch.setattr(calibrate, "time", Clock())
    set_compiler("/nowhere/c++", monkeypatch)


pytestmark = pytest.mark.filterwarnings("ignore:sampling goes on without its compiled loop")

SLOW_BASELINE = """
from starflow.bench.limits import Baseline
from starflow.sampling import calibrate
def baselines(task):
    return [Baseline("textbook decoder", lambda: calibrate.time.sleep(0.05), 10.0, f"batch {len(task.noise)}")]
"""
TICK = 0.001


class Clock:
    """Stands in for the module `time`: every look at it takes a tick, whatever is done meanwhile."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += TICK
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def report(tmp_path: Path, batches: tuple[int, ...] = (1, 2)) -> SpeedReport:
    (tmp_path / "textbook.py").write_text(SLOW_BASELINE)
    return measure(load_model("57m", CPU, torch.float32), SamplingBenchmark(batches, 3.0, 2, 1, tmp_path))


def test_the_figures_fit_each_other(tmp_path: Path) -> None:
    found = report(tmp_path)
    assert {(one.solver, one.batch, one.guidance) for one in found.speeds} == {
        ("sequential", batch, guidance) for batch in (1, 2) for guidance in (0.0, 3.0)
    }
    for one in found.speeds:
        assert one.seconds_per_picture == pytest.approx(one.seconds / one.batch)
        assert one.pictures_per_second == pytest.approx(1 / one.seconds_per_picture)
        assert one.tokens_per_second == pytest.approx(16 * one.pictures_per_second)
        assert one.share_of_limit == pytest.approx(one.limit_seconds / one.seconds)
        reads = one.bytes_per_second * one.seconds / found.ceilings.bytes_per_second
        arithmetic = one.flops_per_second * one.seconds / found.ceilings.flops_per_second
        assert one.limit_seconds == pytest.approx(max(reads, arithmetic))
        assert one.limited_by == ("reads" if reads > arithmetic else "arithmetic")
        assert one.deviation == 0
    (other,) = found.others
    assert other.seconds == pytest.approx(10 * (0.05 + TICK))
    assert other.note == "batch 2"
    guided = next(one for one in found.speeds if one.batch == 2 and one.guidance)
    assert other.limits == pytest.approx(other.seconds / guided.limit_seconds)
    assert guided.seconds == pytest.approx(TICK)
    assert other.speedup == {"sequential": pytest.approx(other.seconds / TICK)}
    assert found.once.first_picture_seconds == pytest.approx(TICK)


def test_random_weights_serve_the_sequential_solver_alone_and_it_says_so(tmp_path: Path) -> None:
    lines = sample_table(report(tmp_path))
    assert "random weights: token by token only" in lines[0]
    assert not any(line.startswith("auto") for line in lines)
    assert any("too slow a baseline for the comparison to count" in line for line in lines)


def test_a_trained_pipeline_is_timed_with_its_own_prompts_and_the_best_policy(tmp_path: Path) -> None:
    random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES)).save_pretrained(tmp_path / "model")
    given = load_model(str(tmp_path / "model"), CPU, torch.float32)
    found = measure(given, SamplingBenchmark((3,), 2.0, 3, 1, None))
    assert found.trained
    assert {one.solver for one in found.speeds} == {"sequential", "auto"}
    assert all(one.deviation <= 1e-2 for one in found.speeds)
    assert "trained weights" in sample_table(found)[0]
    assert sample_table(found)[-1].startswith("no baselines")


def test_a_flow_without_its_conditioner_counts_as_random(tmp_path: Path) -> None:
    build(TarFlowConfig(3, 8, 4, 64, 2, 1, num_classes=3)).save_pretrained(tmp_path / "tarflow")
    build(SMALL).save_pretrained(tmp_path / "starflow")
    for name in ("tarflow", "starflow"):
        given = load_model(str(tmp_path / name), CPU, torch.float32)
        assert not given.trained
        assert {one.solver for one in measure(given, SamplingBenchmark((2,), 1.0, 2, 1)).speeds} == {"sequential"}


def test_what_a_batch_needs_is_counted() -> None:
    """A block of one layer without a condition, by hand."""
    config = STARFlowConfig(in_channels=2, img_size=2, channels=32, num_blocks=1, layers_per_block=1, head_dim=32)
    model = build(config)
    work, matrices = sampling_work(model, 3, 4, guided=False), 12 * 32 * 32
    ends = 2 * 32 + 32 * 4
    layer = sum(one.numel() for one in next(model.iter_blocks()).attn_blocks.parameters())
    assert work.flops == 3 * (4 * 2 * (matrices + ends) + 4 * 32 * (1 + 2 + 3 + 4))
    assert work.bytes == 4 * 4 * (layer + ends) + 4 * 2 * 3 * 32 * (1 + 2 + 3 + 4)


def test_guidance_doubles_the_rows_of_guided_blocks_and_reads_no_weight_twice() -> None:
    model = build(SMALL)
    plain, guided = (sampling_work(model, 2, 16, guided=guided) for guided in (False, True))
    top_alone = sampling_work(model, 2, 16, guided=True).flops - plain.flops
    assert 0 < top_alone < plain.flops
    assert plain.bytes < guided.bytes < 1.5 * plain.bytes
    assert sampling_work(model, 4, 16, guided=False).flops == 2 * plain.flops


def test_ceilings() -> None:
    found = measure_limits(CPU, torch.float32, 2**20)
    assert found.bytes_per_second > 0
    assert found.flops_per_second > 0
    assert MachineLimits(1, 5).better(MachineLimits(2, 3)) == MachineLimits(2, 5)
    assert MachineLimits(2, 4).seconds(6, 8) == (3, 2)


def test_a_folder_without_baselines_is_refused(tmp_path: Path) -> None:
    task = DrawTask(build(SMALL), torch.zeros(1, 2, 4, 4), None, None, 0.0)
    with pytest.raises(UserError, match=r"has none of textbook.py, compiled.py, dit.py: name a folder of baselines"):
        load_baselines(tmp_path, task)


def test_the_command_prints_json_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "sample.json"
    bench_sample(
        BenchSampleOptions(batches="2", compare_at=2, repeats=1, baselines="none", output=str(target), json=True)
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(target.read_text())
    assert printed["command"].startswith("starflow bench sample 57m --batches 2 --guidance 3")
    assert [one["batch"] for one in printed["speeds"]] == [2, 2]
    with pytest.raises(UserError, match="--repeats is 0, expected at least 1"):
        BenchSampleOptions(repeats=0)
    with pytest.raises(UserError, match="no model 'nothing'"):
        load_model("nothing", CPU, torch.float32)
