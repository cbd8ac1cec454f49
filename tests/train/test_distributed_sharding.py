"""Two processes are one: every layout, accumulated parts, resumed runs and checkpoints that change hands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starflow.flow.memory import training_memory
from starflow.train.checkpoint import checkpoints
from tests.train.distributed.launch import finish, torchrun
from tests.train.distributed.scenario import CONFIG, Stopped, numbers, settings, train

RESUMED = ("replicated-resumed", "sharded-resumed")
TOGETHER = ("replicated", "sharded", "thrifty", "parts", "real", "one-to-two", "two-to-one", "across", *RESUMED)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run alone, and everything that `worker` does in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "alone", settings())
    train(folder / "bfloat16-alone", replace(settings(), precision="bfloat16"))
    with pytest.raises(Stopped):
        train(folder / "one-to-two", settings(), stop_at=5)
    finish(torchrun(2, "tests.train.distributed.worker", folder))
    train(folder / "two-to-one", settings())
    return folder


@pytest.mark.parametrize("name", TOGETHER)
def test_every_layout_repeats_the_run_of_one_process(runs: Path, name: str) -> None:
    """Losses, both terms, gradient norms and held-out likelihoods, to float32 rounding over eight updates."""
    alone, together = numbers(runs / "alone"), numbers(runs / name)
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    for mine, theirs in zip(together, alone, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("name", TOGETHER)
def test_the_averages_that_are_saved_are_the_same(runs: Path, name: str) -> None:
    alone, together = (load_file(runs / one / "model" / "model.safetensors") for one in ("alone", name))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        if key.endswith("qkv.bias"):  # a bias of all keys changes no attention: its gradient is rounding alone
            continue
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=2e-5)


def test_a_process_that_comes_late_takes_part_in_every_stage(runs: Path) -> None:
    """A file that the first process has written by then does not make the second one skip what all do together."""
    assert [json.loads((runs / "late" / f"seen-{rank}.json").read_text()) for rank in (0, 1)] == [[2.0], [2.0]]
    assert (runs / "late" / "latents").is_dir()


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_uninterrupted_bit_for_bit(runs: Path, name: str) -> None:
    whole = name.removesuffix("-resumed")
    assert numbers(runs / name) == numbers(runs / whole)
    for file in ("model/model.safetensors", "best/model.safetensors"):
        assert (runs / name / file).read_bytes() == (runs / whole / file).read_bytes()


def test_weights_averages_and_moments_are_split(runs: Path) -> None:
    """Each process of the sharded run wrote about half of every part; of the replicated one, the first wrote all."""
    sharded, replicated = (checkpoints(runs / name / "checkpoints")[-1] for name in ("sharded", "replicated"))
    for part in ("model", "average", "exp_avg", "exp_avg_sq"):
        sizes = [(sharded / f"{part}_0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
        assert 0.7 < sizes[0] / sizes[1] < 1.5
        assert not (replicated / f"{part}_00001.safetensors").exists()


def test_bfloat16_shards_round_weights_alone(runs: Path) -> None:
    """As close to one process as bfloat16 is to float32; what leaves a block is never rounded.

    AdamW's first updates are the gradients' signs, and rounding turns some of them: over four seeds the losses of the
    two precisions are 0 to 10 % apart after the first update, whatever computes attention.
    """
    alone, together, exact = (numbers(runs / name) for name in ("bfloat16-alone", "bfloat16", "alone"))
    for mine, theirs, full in zip(together, alone, exact, strict=True):
        for key in ("squares", "logdet", "heldout_loss"):
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=0.02, abs=0.01)
                assert mine[key] == pytest.approx(full[key], rel=0.01 if mine["step"] == 1 else 0.1, abs=0.05)


def test_blocks_of_bfloat16_shards_give_float32(runs: Path) -> None:
    for precisions, share in json.loads((runs / "rounded-1.json").read_text()):
        assert precisions == "torch.float32 torch.float32"
        assert share < 0.1


def test_every_layer_and_block_is_a_shard_whose_gradients_are_averaged_in_float32(runs: Path) -> None:
    for rank in (0, 1):
        seen = json.loads((runs / f"reduced-{rank}.json").read_text())
        assert seen["units"] == ["AutoregressiveBlock"] * 3 + ["FlowLoss"] + ["Layer"] * 4
        assert seen["dtypes"] == ["torch.float32"]
        assert seen["entries"] > 1000
        assert seen["rounded"] < 0.5


def test_states_take_the_memory_that_is_computed(runs: Path) -> None:
    """`starflow info --memory` for two GPUs, against what a process of two holds."""
    computed = training_memory(CONFIG, 4, gpus=2, sharding="sharded", precision="float32")
    for rank in (0, 1):
        for name, held in json.loads((runs / f"bytes-{rank}.json").read_text()).items():
            assert held == pytest.approx(getattr(computed, name), rel=0.01), name


def test_nothing_is_pickled(runs: Path) -> None:
    suffixes = {path.suffix for path in runs.rglob("checkpoints/**/*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    index = json.loads((checkpoints(runs / "sharded" / "checkpoints")[-1] / "index.json").read_text())
    assert index["progress"]["step"] == 8
    assert index["processes"] == 2


def test_nan_in_one_process_stops_both_before_the_update(runs: Path) -> None:
    first, second = ((runs / f"nan-{rank}.txt").read_text() for rank in (0, 1))
    assert "at step 5 (process 1 names its pictures): nothing was updated" in first
    assert "at step 5 (batch: p" in second
    assert len([line for line in numbers(runs / "nan") if "loss" in line]) == 5
    for path in checkpoints(runs / "nan" / "checkpoints"):
        for part in path.glob("model_*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(part).values())
