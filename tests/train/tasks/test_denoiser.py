"""A learned denoiser: its target is the flow's own score, and of a Gaussian flow it reaches the closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starflow.cli.main import main
from starflow.data.images import from_pil, save_grid
from starflow.data.sets.small import SHAPES
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.denoise import Denoiser, DenoiserConfig, denoise
from starflow.sampling.student import Student, StudentConfig, inputs_of
from starflow.train.distributed import World
from starflow.train.loop import fit
from starflow.train.run import read_log
from starflow.train.settings import TrainSettings
from starflow.train.tasks.denoiser import DenoiserTask, with_companions
from tests.train.distributed.launch import finish, torchrun
from tests.train.distributed.scenario import numbers
from tests.train.tasks.companions import (
    SETTINGS,
    make_cache,
    make_linear,
    make_teacher,
    random_weights,
    save_shapes_teacher,
)


def make_task(teacher: StarFlowPipeline, settings: TrainSettings = SETTINGS) -> DenoiserTask:
    torch.manual_seed(0)
    config = DenoiserConfig(**inputs_of(teacher.flow), channels=32, layers=(2,), head_dim=16, noise_std=0.3)
    return DenoiserTask(teacher, Denoiser(config), make_cache(), 0.1, settings, World())


def gaussian_teacher() -> tuple[StarFlowPipeline, torch.Tensor, torch.Tensor]:
    """A flow whose density is a Gaussian, and that one's mean and deviation of each channel."""
    teacher = make_teacher(lambda parameter: None)
    make_linear(teacher)
    z = torch.zeros(2, 4, 4, 4)
    z[1] = 1
    with torch.no_grad():
        low, high = (teacher.flow(x, teacher.conditioner.encode(["a"]))[0] for x in (z[:1], z[1:]))  # type: ignore[union-attr]
    deviation = 1 / (high - low)
    return teacher, -low * deviation, deviation


def test_the_target_of_a_gaussian_flow_is_the_closed_form() -> None:
    teacher, mean, deviation = gaussian_teacher()
    batch = make_task(teacher).batch(1, range(8))
    expected = 0.3 * (batch.x - mean) / deviation**2
    assert torch.allclose(batch.target, expected, atol=1e-4)


def test_the_denoiser_of_a_gaussian_flow_reaches_the_closed_form(tmp_path: Path) -> None:
    teacher, mean, deviation = gaussian_teacher()
    settings = replace(
        SETTINGS, steps=150, batch=8, lr=1e-2, warmup=10, average=0.9, evaluate_every=150, checkpoint_every=150
    )
    fit(make_task(teacher, settings), settings, tmp_path, show_progress=False)
    denoiser = Denoiser.from_pretrained(tmp_path / "model")
    x = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    condition = teacher.conditioner.encode(["a"] * 16) if teacher.conditioner else None
    exact = x - 0.09 * (x - mean) / deviation**2
    assert torch.allclose(denoise(teacher.flow, x, condition, 0.3), exact, atol=1e-4)
    missed = (denoiser.clean(x, condition) - exact).norm() / (x - exact).norm()
    assert float(missed) < 0.1
    heldout = [line for line in read_log(tmp_path / "log.jsonl") if "heldout_loss" in line][-1]
    assert heldout["heldout_unexplained"] < 0.02
    assert heldout["heldout_error"] == pytest.approx(heldout["heldout_error_tweedie"], rel=0.05)


def test_of_any_flow_the_target_is_a_tweedie_step() -> None:
    teacher = make_teacher(random_weights)
    batch = make_task(teacher).batch(0, range(8))
    tweedie = denoise(teacher.flow, batch.x, batch.condition, 0.3)
    assert torch.allclose(batch.x - 0.3 * batch.target, tweedie, atol=1e-5)


def test_what_a_new_denoiser_misses_is_everything() -> None:
    teacher = make_teacher(random_weights)
    task = make_task(teacher)
    batch = task.batch(0, range(8))
    loss, terms = task.loss(task.model, batch)
    assert float(loss.detach()) == pytest.approx(float(batch.target.square().flatten(1).sum(1).mean()), rel=1e-5)
    assert float(terms["unexplained"]) == pytest.approx(1.0)
    found, rows = task.evaluate(task.model), task.heldout[0]
    noised, condition = task._noised(rows, 0, 0, range(len(rows))), task._conditions(rows, None)
    clean = task.cache.posterior(rows)[0]
    assert found["unexplained"] == pytest.approx(1.0)
    assert found["error"] == pytest.approx(found["error_noised"])
    assert found["error_noised"] == pytest.approx(float((noised - clean).square().mean()), rel=1e-4)
    stepped = denoise(teacher.flow, noised, condition, 0.3)
    assert found["error_tweedie"] == pytest.approx(float((stepped - clean).square().mean()), rel=1e-4)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    teacher = make_teacher(random_weights)
    settings = replace(SETTINGS, steps=6, evaluate_every=3, schedule="trapezoid", decay=0.0)
    for folder, steps in (("parts", 4), ("parts", 6), ("whole", 6)):
        own = replace(settings, steps=steps)
        fit(make_task(teacher, own), own, tmp_path / folder, show_progress=False)
    logs = [read_log(tmp_path / folder / "log.jsonl") for folder in ("parts", "whole")]
    parts, whole = ([(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs)
    assert parts == whole
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]


def test_a_share_of_the_conditions_is_dropped() -> None:
    task = make_task(make_teacher(random_weights))
    task.objective = replace(task.objective, drop_condition=0.5)
    batch, null = task.batch(0, range(8)), task.cache.null
    assert null is not None
    assert batch.condition is not None
    dropped = task._dropped(0, range(8))
    assert 0 < int(dropped.sum()) < 8
    assert torch.equal((batch.condition == null).flatten(1).all(1), dropped)


def test_the_rows_of_a_grid_are_clean_noised_tweedie_and_denoised(tmp_path: Path) -> None:
    teacher = make_teacher(random_weights)
    task = make_task(teacher)
    denoiser = task.model
    assert isinstance(denoiser, Denoiser)
    torch.nn.init.normal_(denoiser.proj_out.weight)
    task.draw(denoiser, tmp_path / "grid.png")
    rows = task.heldout[0][:8]
    noised, condition = task._noised(rows, 0, 0, range(8)), task._conditions(rows, None)
    stepped, cleaned = denoise(teacher.flow, noised, condition, 0.3), denoiser.clean(noised, condition)
    latents = (task.cache.posterior(rows)[0].float(), noised, stepped, cleaned)
    with torch.no_grad():
        save_grid(torch.cat([teacher.autoencoder.decode(one) for one in latents]), tmp_path / "expected.png", columns=8)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_what_stands_beside_the_teacher_stays(tmp_path: Path) -> None:
    teacher = make_teacher(random_weights)
    sizes = inputs_of(teacher.flow)
    teacher.student = Student(StudentConfig(**sizes, channels=16, layers=(1, 1, 1), head_dim=16))
    denoiser = Denoiser(DenoiserConfig(**sizes, channels=16, layers=(1,), head_dim=16))
    both = with_companions(teacher, denoiser=denoiser)
    assert (both.student, both.denoiser, both.config.cleaning) == (teacher.student, denoiser, "denoiser")
    assert with_companions(teacher).config.cleaning == teacher.config.cleaning
    assert teacher.denoiser is None


def test_what_needs_no_denoiser_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["train-denoiser", str(recipe), "--output", str(tmp_path / "run"), "--drop_condition", "2"]) == 2
    assert "drop_condition is 2.0, expected a share from 0 to 1" in capsys.readouterr().err
    teacher = make_teacher(random_weights, SHAPES)
    teacher.config = replace(teacher.config, noise_std=0.0, cleaning="none")
    teacher.save_pretrained(tmp_path / "plain")
    plain = ["train-denoiser", str(recipe), "--teacher", str(tmp_path / "plain"), "--output", str(tmp_path / "run")]
    assert main(plain) == 2
    assert "was trained without Gaussian noise: it needs no denoiser" in capsys.readouterr().err


RECIPE = """
name: small-denoiser
teacher: {teacher}
data: {{source: shapes, shapes: 60, views: {{size: 8}}}}
network: {{channels: 32, layers: 2, head_dim: 16}}
train:
  precision: float32
  steps: 4
  batch: 8
  lr: 1.0e-2
  warmup: 1
  evaluate_every: 2
  sample_every: 4
  checkpoint_every: 2
prompts: [circle, star]
"""


def write_recipe(folder: Path) -> Path:
    path = folder / "denoiser.yaml"
    path.write_text(RECIPE.format(teacher=save_shapes_teacher(folder / "teacher")))
    return path


def test_the_command_trains_what_samples_are_cleaned_by(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    assert main(["train-denoiser", str(recipe), "--output", str(run), "--train.steps", "2"]) == 0
    assert main(["train-denoiser", str(recipe), "--output", str(run)]) == 0
    assert [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line] == [1, 2, 3, 4]
    pipe = StarFlowPipeline.from_pretrained(run / "pipeline")
    assert pipe.denoiser is not None
    assert pipe.config.cleaning == "denoiser"
    made, raw = pipe("star", seed=3), pipe("star", seed=3, cleaning="none")
    assert torch.equal(made.latents, raw.latents)
    condition = pipe.conditioner.encode(["star"]) if pipe.conditioner else None
    clean = raw.latents - 0.3 * pipe.denoiser(raw.latents, condition).detach()
    expected = pipe.autoencoder.decode(clean).detach()
    assert float((from_pil(made.images[0]) - expected).abs().max()) < 0.01


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["train-denoiser", str(recipe), "--output", str(tmp_path / "one")]) == 0
    finish(torchrun(2, "starflow", "train-denoiser", recipe, "--output", tmp_path / "two"))
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, other in zip(one, two, strict=True):
        assert other == pytest.approx(mine, rel=2e-3, abs=2e-4)
