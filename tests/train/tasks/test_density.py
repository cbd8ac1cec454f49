"""A density trained by a recipe: which rows it reads, what it reaches, and that a stop changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow.cli.main import main
from starflow.density import SequenceFlow
from starflow.errors import UserError
from starflow.train.distributed import World
from starflow.train.run import read_log
from starflow.train.settings import TrainSettings
from starflow.train.tasks.density import Arrays, ArraysRecipe, DensityTask, open_arrays
from tests.train.distributed.launch import finish, torchrun

SIZES = {"channels": 16, "num_blocks": 2, "layers_per_block": 1, "head_dim": 8}
TRAIN = {"batch": 64, "lr": 5e-3, "warmup": 2, "schedule": "trapezoid", "decay": 0.0, "average": 0.5}
CORRELATION = 0.9


def pairs(rows: int) -> tuple[Tensor, Tensor]:
    """Context and event (R, 1) of a normal distribution of means 5 and -3, deviations 2 and 3, and a correlation."""
    draws = torch.randn(2, rows, generator=torch.Generator().manual_seed(0))
    event = CORRELATION * draws[0] + math.sqrt(1 - CORRELATION**2) * draws[1]
    return 5 + 2 * draws[:1].T, -3 + 3 * event[:, None]


def write_recipe(folder: Path, **sections: Any) -> Path:
    """Pairs as .npy, and a recipe on them."""
    context, event = pairs(2000)
    np.save(folder / "theta.npy", event.numpy())
    np.save(folder / "x.npy", context.numpy())
    values: dict[str, Any] = {
        "name": "mine",
        "data": {"source": "arrays", "path": str(folder), "events": "theta", "context": "x"},
        "flow": SIZES,
        "train": {"steps": 6, **TRAIN},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(recipe: Path, run: Path, *options: str) -> Path:
    assert main(["train", str(recipe), "--output", str(run), *options]) == 0
    return run / "model"


def test_it_reaches_the_conditional_density_that_is_known(tmp_path: Path) -> None:
    """Standardised, the first flow pays the correlation's -1/2 log(1 - r^2) nats; a tenth of them may be left."""
    recipe = write_recipe(tmp_path, train={"steps": 60, "schedule": "cosine", "lr": 1e-2, "evaluate_every": 30})
    flow = SequenceFlow.from_pretrained(train(recipe, tmp_path / "run"))
    context, event = pairs(2000)
    deviation = 3 * math.sqrt(1 - CORRELATION**2)
    exact = torch.distributions.Normal(-3 + CORRELATION * 1.5 * (context - 5), deviation).log_prob(event).mean()
    run = tmp_path / "run"
    with torch.no_grad():
        first, best = (
            SequenceFlow.from_pretrained(run / name)(context).log_prob(event).mean() for name in ("first", "best")
        )
        whole = float(flow(context).log_prob(event).mean())
    cost = -0.5 * math.log(1 - CORRELATION**2)
    assert float(exact - first) == pytest.approx(cost, rel=0.1)
    assert float(exact - best) < 0.1 * cost
    measured = [line for line in read_log(run / "log.jsonl") if "heldout_nats" in line]
    assert measured[-1]["heldout_nats"] == pytest.approx(whole, abs=0.15)
    drawn = np.load(run / "samples" / "step_00000060.npy")
    assert drawn.shape == (200, 1)  # one under each held-out context
    assert abs(drawn.mean() + 3) < 5 * 3 / math.sqrt(200)


def test_a_stop_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    whole = SequenceFlow.from_pretrained(train(recipe, tmp_path / "whole")).state_dict()
    train(recipe, tmp_path / "parts", "--train.steps", "3")
    parts = SequenceFlow.from_pretrained(train(recipe, tmp_path / "parts")).state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    capsys.readouterr()
    assert main(["train", str(recipe), "--output", str(tmp_path / "parts"), "--data.heldout", "0.2"]) == 2
    assert "another data.heldout" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1990, 1), (2000, 2)])
def test_a_run_does_not_go_on_with_arrays_of_another_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, int]
) -> None:
    """Other rows would be held out, and some that were would be trained on."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    train(recipe, run, "--train.steps", "1")
    np.save(tmp_path / "theta.npy", np.zeros(shape))
    np.save(tmp_path / "x.npy", np.zeros((shape[0], 1)))
    capsys.readouterr()
    assert main(["train", str(recipe), "--output", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"started with arrays {{'events': [2000, 1], 'context': [2000, 1]}}, now {{'events': {list(shape)}" in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_two_processes_train_the_same_flow(tmp_path: Path, layout: str) -> None:
    recipe = write_recipe(tmp_path)
    one = SequenceFlow.from_pretrained(train(recipe, tmp_path / "one")).state_dict()
    words = ("--output", tmp_path / "two", "--train.parallel.layout", layout)
    finish(torchrun(2, "starflow", "train", recipe, *words))
    two = SequenceFlow.from_pretrained(tmp_path / "two" / "model").state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


def test_rows_that_are_held_out_are_never_trained_on() -> None:
    arrays = Arrays(torch.arange(100.0)[:, None], None, None)
    flow = SequenceFlow((1,), channels=16, head_dim=8, num_blocks=1, layers_per_block=1)
    task = DensityTask(flow, arrays, 0.2, TrainSettings(steps=1, batch=10), World())
    seen = torch.cat([task.batch(step, range(10))[0] for step in range(16)]).flatten()
    assert sorted(seen.tolist()[:80]) == sorted(set(range(100)) - set(task.heldout.tolist()))
    assert len(task.heldout) == 20
    assert task.batch_names(0, range(2)) == [f"row {int(row)}" for row in seen[:2]]


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 7),
    group=st.integers(1, 4),
    shape=st.sampled_from([(), (3,), (2, 3)]),
    kind=st.sampled_from(["float32", "float64", "int64"]),
)
def test_parquet_is_read_as_npy_is(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, shape: tuple[int, ...], kind: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("arrays")
    values = (10 * np.random.default_rng(rows).standard_normal((rows, *shape))).astype(kind)
    np.save(folder / "a.npy", values)
    columns = {"a": values.tolist(), "b": list(range(rows)), "c": [0.5] * rows}
    parquet.write_table(pyarrow.table(columns), folder / "t.parquet", row_group_size=group)
    recipe = ArraysRecipe(path=str(folder / "t.parquet"), events="a", context=("b", "c"), lengths="b")
    read = open_arrays(recipe, folder / "written", World())
    plain = open_arrays(ArraysRecipe(path=str(folder), events="a"), folder / "none", World())
    assert not (folder / "none").exists()
    assert torch.equal(read.events.double(), plain.events.to(read.events).double())
    assert read.context is not None
    assert torch.equal(read.context, torch.tensor([[row, 0.5] for row in range(rows)]))
    assert torch.equal(np_lengths := torch.from_numpy(np.load(folder / "written" / "lengths.npy")), torch.arange(rows))
    assert np_lengths.dtype == torch.int64


def test_several_files_of_numbers_become_a_vector(tmp_path: Path) -> None:
    np.save(tmp_path / "mass.npy", np.arange(4.0))
    np.save(tmp_path / "spin.npy", np.arange(4) * 10)
    recipe = ArraysRecipe(path=str(tmp_path), events=("mass", "spin"))
    found = open_arrays(recipe, tmp_path / "written", World()).events
    assert torch.equal(found, torch.tensor([[0.0, 0], [1, 10], [2, 20], [3, 30]]))


@pytest.mark.parametrize("shape", [(0, 2), (6, 2)])
@pytest.mark.parametrize("kind", ["f2", "f8", "i1", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_kind_and_order_are_read_by_rows(
    tmp_path: Path, shape: tuple[int, int], kind: str, order: Any
) -> None:
    values = np.arange(math.prod(shape)).reshape(shape).astype(kind, order=order)
    np.save(tmp_path / "x.npy", values)
    arrays = open_arrays(ArraysRecipe(path=str(tmp_path)), tmp_path / "none", World())
    rows, _, _ = arrays.rows(slice(1, 5), torch.device("cpu"))
    assert torch.equal(rows, torch.tensor(values[1:5].astype(np.float32)))


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 2), np.float32))
    np.save(tmp_path / "y.npy", np.zeros(3))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "object.npy", np.array([None, 1], dtype=object))
    np.save(tmp_path / "big.npy", np.zeros((4, 2), ">f8"))
    np.save(tmp_path / "long.npy", np.zeros(4, np.longdouble))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-8])
    (tmp_path / "head.npy").write_bytes(whole.replace(b"{", b"\xd7"))
    np.savez(tmp_path / "zip.npz", a=np.zeros(4))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.npy")
    cases: dict[str, dict[str, Any]] = {
        "no z.npy in .*cut, head, long, object, text, x, y, zip": {"events": "z"},
        "4 events and 3 rows of context": {"context": "y"},
        r"text.npy has <U1 of shape \(2,\), expected rows of real numbers": {"events": "text"},
        r"big.npy has >f8 of shape \(4, 2\), .* save array.astype\('float32'\)": {"events": "big"},
        "long.npy has <f16": {"events": "long"},
        "object.npy is no .npy array": {"events": "object"},
        "cut.npy is no .npy array": {"events": "cut"},
        "head.npy is no .npy array": {"events": "head"},
        "zip.npy is no .npy array": {"events": "zip"},
        "several names are of single numbers": {"events": ("x", "y")},
        "data.events is empty": {"events": ""},
        "no folder or parquet file at": {"path": str(tmp_path / "nowhere")},
    }
    for message, changes in cases.items():
        with pytest.raises(UserError, match=message):
            open_arrays(replace(ArraysRecipe(path=str(tmp_path)), **changes), tmp_path / "written", World())
    with pytest.raises(UserError, match="heldout is 0"):
        ArraysRecipe(heldout=0.0)


def test_bad_parquet_is_one_line(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"a": [1.0, None], "b": ["x", "y"], "c": [[1.0], [1.0, 2.0]]}), path)
    for name, message in (
        ("a", "'a' of .* is not of numbers, or some are missing"),
        ("b", "not of numbers"),
        ("c", "cannot be read"),
        ("d", "no column 'd'"),
    ):
        with pytest.raises(UserError, match=message):
            open_arrays(ArraysRecipe(path=str(path), events=name), tmp_path / "written", World())
        assert not (tmp_path / "written" / "events.npy").exists()
    twice = pyarrow.Table.from_arrays([pyarrow.array([1.0]), pyarrow.array([2.0])], names=["a", "a"])
    parquet.write_table(twice, path)
    with pytest.raises(UserError, match="cannot be read .*exists 2 times"):
        open_arrays(ArraysRecipe(path=str(path), events="a"), tmp_path / "written", World())
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        open_arrays(ArraysRecipe(path=str(path), events="a"), tmp_path / "written", World())


def test_recipes_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    for options, message in (
        (["--flow.bounds", "[[0, 1]]"], "outside the bounds"),
        (["--flow.width", "3"], "width"),
        (["--train.init_from", "glyphs"], "not for densities"),
        (["--data.context", "nothing"], "no nothing.npy"),
    ):
        run = tmp_path / options[0]
        assert main(["train", str(recipe), "--output", str(run), *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    recipe.write_text(json.dumps({"name": "mine", "train": {"steps": 1}, "data": {"source": "array"}}))
    assert main(["train", str(recipe), "--output", str(tmp_path / "other")]) == 2
