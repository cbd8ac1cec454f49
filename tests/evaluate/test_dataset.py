"""Two processes get what one gets: rows in order, none dropped, and a distance that is the same number.

What a prompt asks for, which rows are taken, and which sets are known by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image

from starflow.data.buckets import Buckets
from starflow.data.index import open_source, split_indices
from starflow.data.sources.base import ImageRecord, Split, unit_hash
from starflow.errors import UserError
from starflow.evaluate import gather_rows, kernel_distance, own_rows
from starflow.evaluate.dataset import (
    EvaluationSet,
    concept_of,
    evenly_spaced,
    is_first,
    open_evaluation_set,
    open_outliers,
    select_rows,
    training_names,
)
from tests.data.sets.test_small import write_set
from tests.data.sources.common import indexed

CODE = """
import json, sys, torch
from starflow.evaluate import gather_rows, is_first, kernel_distance, own_rows
from starflow.train.distributed import join_world

def rows(count, seed):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

with join_world(torch.device("cpu"), 60):
    found = {}
    for count in (1, 2, 7, 8):
        whole = rows(count, count)
        mine = own_rows(count)
        found[str(count)] = torch.equal(gather_rows(whole[mine.start:mine.stop], count), whole)
    samples, real = rows(7, 1), rows(9, 2)
    mine = own_rows(7)
    found["distance"] = kernel_distance(gather_rows(samples[mine.start:mine.stop], 7), real).value
    if is_first():
        print(json.dumps(found))
"""


def test_alone_everything_is_ones_own() -> None:
    rows = torch.arange(5.0)
    assert is_first()
    assert list(own_rows(5)) == [0, 1, 2, 3, 4]
    assert gather_rows(rows, 5) is rows


def test_two_processes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "run.py").write_text(CODE)
    source = Path(__file__).parents[2] / "src"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source), "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run(
        [*torchrun, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=120, env=env, check=False
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.strip().splitlines()[-1])

    def rows(count: int, seed: int) -> torch.Tensor:
        return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    assert found.pop("distance") == pytest.approx(kernel_distance(rows(7, 1), rows(9, 2)).value, abs=1e-12)
    assert found == {"1": True, "2": True, "7": True, "8": True}


@pytest.mark.parametrize(
    ("prompt", "concept"),
    [
        ("a blue car", "car"),
        ("a cat face", "cat face"),
        ("Twemoji of a unicorn", "unicorn"),
        ("a frog on a yellow background", "frog"),
        ("a carrot", "carrot"),
        ("a spaceship", ""),
    ],
)
def test_the_longest_known_concept_is_asked_for(prompt: str, concept: str) -> None:
    assert concept_of(prompt, {"car", "cat", "cat face", "unicorn", "frog", "carrot", "ship"}) == concept


def test_rows_are_spread_evenly() -> None:
    assert evenly_spaced(5, 0) == evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(10, 3) == [0, 3, 6]
    assert evenly_spaced(60_000, 10_000)[-1] == 59_994


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    records = [ImageRecord(tmp_path / "a.png", "a", None, "train", "a", {})] * 3
    with pytest.raises(UserError, match="no heldout pictures among 3"):
        EvaluationSet.of_records(records, 8)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_what_a_training_held_out_is_held_out(tmp_path: Path, share: float) -> None:
    """The split of `starflow.data.index`, which a training of that share makes."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(30):
        Image.new("RGB", (24, 16), (8 * number, 90, 30)).save(folder / f"{number}.png")
    first = min(folder.iterdir(), key=lambda path: unit_hash(path.name))
    if not share:
        first.write_bytes(first.read_bytes()[:50])  # another is held out in its place
    trained = indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(8, 8), heldout=share)
    expected = {trained.entry(int(number)).name for some in split_indices(trained, heldout=True) for number in some} - {
        first.name if not share else ""
    }
    pictures = open_evaluation_set(str(folder), 8, share)
    assert set(pictures.heldout.names) == expected
    assert len(pictures.train) + len(pictures.heldout) == 30 - (not share)
    wide = open_evaluation_set(str(folder), (16, 8), share)
    assert wide.heldout.images.shape[2:] == (8, 16)
    assert wide.heldout.names == pictures.heldout.names


def test_a_folder_with_the_four_files(tmp_path: Path) -> None:
    write_set(tmp_path, train=6, test=3)
    pictures = open_evaluation_set(str(tmp_path), 28)
    assert (len(pictures.train), len(pictures.heldout)) == (6, 3)
    assert pictures.concepts_of(pictures.heldout) == pictures.heldout.labels
    assert len(open_outliers(str(tmp_path), 28)) == 9
    with pytest.raises(UserError, match="28 px, the model of 32"):
        open_evaluation_set(str(tmp_path), 32)
    some = select_rows(pictures.train, [4, 1])
    assert some.names == [pictures.train.names[4], pictures.train.names[1]]
    assert torch.equal(some.images, pictures.train.images[[4, 1]])


def test_held_out_pictures_can_be_narrowed(tmp_path: Path) -> None:
    records = []
    for number, (split, concept, family) in enumerate(
        [("train", "cat", "a"), ("train", "dog", "a"), ("heldout", "cat", "b"), ("heldout", "cat", "b"),
         ("heldout", "dog", "b"), ("heldout", "owl", "a")]
    ):  # fmt: skip
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8)).save(file)
        meta = {"concept": concept, "family": family}
        records.append(ImageRecord(file, f"red {concept}", None, cast("Split", split), f"p{number}", meta))
    whole = EvaluationSet.of_records(records, 8)
    assert whole.groups_of(whole.heldout) == ["cat", "cat", "dog", "owl"]
    assert whole.narrowed("known").heldout.names == ["p2", "p3", "p4"]
    assert whole.narrowed("new").heldout.names == ["p5"]
    assert whole.narrowed(seen=["p2"]).heldout.names == ["p4", "p5"]  # p3 is held out with p2
    assert whole.narrowed("known", ["p2", "elsewhere"]).heldout.names == ["p4"]
    assert torch.equal(whole.narrowed("new").heldout.images, whole.heldout.images[3:])
    with pytest.raises(UserError, match="none is left"):
        whole.narrowed("new", ["p5"])
    with pytest.raises(UserError, match="has no index"):
        training_names(str(tmp_path))
    assert training_names("") == []
