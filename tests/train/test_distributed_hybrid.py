"""Four processes: two copies of two shards, and compiled, recomputed layers; slow on two cores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.distributed.launch import finish, torchrun
from tests.train.distributed.scenario import numbers, settings, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    train(folder / "alone", settings())
    finish(torchrun(4, "tests.train.distributed.hybrid_worker", folder), timeout=900)
    return folder


@pytest.mark.parametrize("name", ["hybrid", "hybrid-parts", "hybrid-resumed", "replicated", "compiled"])
def test_four_processes_repeat_the_run_of_one(runs: Path, name: str) -> None:
    for mine, theirs in zip(numbers(runs / name), numbers(runs / "alone"), strict=True):
        assert mine == pytest.approx(theirs, rel=5e-5, abs=5e-6)


def test_a_resumed_hybrid_run_is_uninterrupted_bit_for_bit(runs: Path) -> None:
    assert numbers(runs / "hybrid-resumed") == numbers(runs / "hybrid")


def test_compiled_layers_alone_repeat_it_too(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, replace(settings(checkpoint_mlp=True), compile=True))
    for mine, theirs in zip(numbers(tmp_path), numbers(runs / "alone"), strict=True):
        assert mine == pytest.approx(theirs, rel=5e-5, abs=5e-6)
