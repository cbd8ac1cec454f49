"""What a prompt asks for, which rows are taken, and which sets are known by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.data.test_fashion_mnist import write_set

from starflow.data.records import Record
from starflow.errors import UserError
from starflow.measure import Pictures, concept_of, open_pictures
from starflow.measure.pictures import open_foreign, part, spread


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
    assert spread(5, 0) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 3) == [0, 3, 6]
    assert spread(60_000, 10_000)[-1] == 59_994


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    records = [Record(tmp_path / "a.png", "a", None, "train", "a", {})] * 3
    with pytest.raises(UserError, match="no heldout pictures among 3"):
        Pictures.of_records(records, 8)


def test_a_folder_with_the_four_files(tmp_path: Path) -> None:
    write_set(tmp_path, train=6, test=3)
    pictures = open_pictures(str(tmp_path), 28)
    assert (len(pictures.train), len(pictures.heldout)) == (6, 3)
    assert pictures.shown(pictures.heldout) == pictures.heldout.labels
    assert len(open_foreign(str(tmp_path), 28)) == 9
    with pytest.raises(UserError, match="28 px, the model of 32"):
        open_pictures(str(tmp_path), 32)
    some = part(pictures.train, [4, 1])
    assert some.names == [pictures.train.names[4], pictures.train.names[1]]
    assert torch.equal(some.images, pictures.train.images[[4, 1]])
