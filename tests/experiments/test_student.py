"""What the student experiment times and shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from experiments import plots
from experiments import student as experiment
from starflow.conditioning import ClassLabels
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import sample
from starflow.sampling.student import Student, StudentConfig, StudentOutput, inputs_of
from tests.cli.conftest import CLASSES, random_pipeline


@pytest.fixture
def pipe() -> StarFlowPipeline:
    """A model of pixels with a student that draws at temperature 0.5."""
    pipeline = random_pipeline("student", PixelLatents(), ClassLabels(CLASSES))
    sizes = inputs_of(pipeline.flow)
    pipeline.student = Student(
        StudentConfig(**sizes, channels=16, layers=(1, 1, 1), head_dim=16, temperature=0.5, largest_guidance=4.0)
    )
    return pipeline


def test_every_way_is_timed_at_both_batches(pipe: StarFlowPipeline) -> None:
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    views = TrainingViews(images, ["star"] * 16, ["star"] * 16, [f"{i}" for i in range(16)], ["heldout"] * 16)
    found = experiment.time_all(pipe, views, experiment.QUICK)
    assert list(found["ways"]) == list(experiment.ways(pipe))
    assert all(set(one) == {"ms_1", "ms_16"} and min(one.values()) > 0 for one in found["ways"].values())
    passes = found["passes"]
    assert passes["flow / student"] == pytest.approx(
        passes["ms of the flow, 4 pictures, guided"] / passes["ms of the student, 4 pictures, guided"]
    )
    drawn = experiment.draw(pipe, views, experiment.QUICK, {"sampler": "student"})
    assert drawn.shape == (8, 3, 8, 8)


def test_the_flow_is_compared_at_the_students_temperature(pipe: StarFlowPipeline) -> None:
    options = list(experiment.ways(pipe).values())
    assert options[1] == {"candidates": 1}
    assert options[2] == {"candidates": 1, "temperature": 0.5}
    assert options[4] == {"sampler": "student", "candidates": 16}


def test_calls_take_turns_and_the_first_does_not_count() -> None:
    order: list[str] = []
    found = experiment.medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert set(found) == {"a", "b"}


def test_a_model_without_a_student_is_refused(tmp_path: Path) -> None:
    random_pipeline("plain", PixelLatents(), ClassLabels(CLASSES)).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="holds no student: train one by `starflow train-student`"):
        experiment.run(tmp_path, experiment.QUICK, print, "", str(tmp_path / "plain"), tmp_path)


def test_a_guess_that_is_right_takes_one_pass(pipe: StarFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    condition = pipe.conditioner.encode(["star"] * 2) if pipe.conditioner else None
    with torch.no_grad():
        states = pipe.flow.trace(sample(pipe.flow, z, condition), condition).states[:-1]
    assert pipe.student is not None
    monkeypatch.setattr(pipe.student, "forward", lambda *_: StudentOutput(z, states))
    found = experiment.guess_passes(pipe, ["star"] * 2, guidance=0.0)
    assert found["student"] == [1, 1]
    assert min(found["noise"]) > 1
    assert min(found["zero"]) > 1


def test_the_table_has_times_where_something_is_drawn() -> None:
    found = {"floor": {"kid": 1.0}, "student": {"kid": 3.25, "ms_1": 9.6, "ms_16": 4.4}}
    assert experiment.table(found)[1:] == [["floor", "1.0", "", ""], ["student", "3.2", "10", "4"]]


class Axis:
    """Takes the calls that a plot's axis takes."""

    def __init__(self) -> None:
        self.lines: list[tuple[list[float], list[float], str, str]] = []

    def plot(self, x: list[float], y: list[float], style: str = "-", **options: Any) -> list[Axis]:
        self.lines.append((x, y, style, options.get("label", "")))
        return [self]

    def get_color(self) -> str:
        return "blue"

    def set_xlabel(self, text: str) -> None:
        assert text == "updates"

    def legend(self, **options: Any) -> None:
        pass


def test_curves_are_means_of_updates_and_dots_what_is_held_out(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "clean": float(step % 2)} for step in range(1, 401)]
    lines += [{"step": step, "heldout_clean": 0.25, "heldout_error": 9.0} for step in (200, 400)]
    lines += [{"step": 400, "clean": None}]  # what was not finite
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    axis = Axis()
    plots.draw_curves(axis, tmp_path / "log.jsonl", {"clean": "clean latents", "error": "of latents"})
    curve, dots, empty, alone = axis.lines
    assert curve == ([2.5 + 4 * number for number in range(100)], [0.5] * 100, "-", "clean latents")
    assert dots == ([200, 400], [0.25, 0.25], "o", "")
    assert empty == ([], [], "-", "of latents")
    assert alone == ([200, 400], [9.0, 9.0], "o-", "")


def test_the_sheet_has_the_training_where_its_log_is(pipe: StarFlowPipeline, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    views = TrainingViews(images, ["star"] * 8, ["star"] * 8, [f"{i}" for i in range(8)], ["heldout"] * 8)
    log = {"step": 1, "clean": 1.0, "state_0": 1.0, "state_1": 0.5, "perceptual": 2.0}
    (tmp_path / "log.jsonl").write_text(json.dumps(log) + "\n")
    heights = []
    for name in ("log.jsonl", "none.jsonl"):
        experiment.draw_plot(tmp_path, pipe, views, tmp_path / name)
        with Image.open(tmp_path / "student.png") as drawn:
            heights.append(drawn.height)
    assert heights[0] > 1.5 * heights[1]
