"""The decoder's runs share what they compute alike, and differ in the loss and the number of updates."""

from __future__ import annotations

from pathlib import Path

from experiments.decoder import Budget, _link_shared, curve_of, settings
from starflow.train.tasks.decoder import DecoderLoss


def test_later_runs_get_the_first_ones_images_and_keep_their_own_files(tmp_path: Path) -> None:
    first, other = tmp_path / "l2", tmp_path / "full"
    first.mkdir()
    (first / "views.jsonl").write_text("views")
    (first / "before.json").write_text("before")
    (first / "after.json").write_text("after")
    _link_shared(first, other)
    assert sorted(path.name for path in other.iterdir()) == ["before.json", "views.jsonl"]
    assert (other / "views.jsonl").samefile(first / "views.jsonl")
    _link_shared(first, other)
    _link_shared(first, first)


def test_the_critic_starts_half_way() -> None:
    budget = Budget(steps=100)
    assert settings(budget, DecoderLoss(), "taesd", Path("glyphs")).loss.adversarial_from == 50
    squared = settings(budget, DecoderLoss(perceptual=0, adversarial=0), "taesd", Path("glyphs"))
    assert (squared.loss.adversarial, squared.train.steps, squared.crop) == (0, 100, budget.crop)


def test_the_curve_is_of_the_trainings_noise(tmp_path: Path) -> None:
    lines = '{"step": 1, "loss": 1}\n{"step": 2, "heldout_psnr_noise_0.3": 21.5, "heldout_psnr_noise_0": 30}\n'
    (tmp_path / "log.jsonl").write_text(lines)
    assert curve_of(tmp_path, 0.3) == [(2, 21.5)]
