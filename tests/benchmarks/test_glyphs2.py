"""The figures of the bundled model's card: what counts as held out, the card's blanks, and the shuffled sheet's key."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from PIL import Image

from benchmarks.glyphs2 import CARD, SHEETS, alike, clean_pairs, fill_card, save_sheet
from starflow.cli.generate import read_prompt_file
from starflow.data.sources.base import ImageRecord, Split


def record(name: str, split: Split, concept: str, family: str) -> ImageRecord:
    return ImageRecord(Path(f"{name}.png"), concept, None, split, name, {"concept": concept, "family": family})


def test_what_the_first_weights_saw_is_not_held_out(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(base / "images/a.png")
    lines: list[dict[str, object]] = [
        {"file": "images/a.png", "caption": "apple", "label": None, "split": "train", "name": "3d/apple", "meta": {}},
        {"file": "images/a.png", "caption": "pear", "label": None, "split": "heldout", "name": "3d/pear", "meta": {}},
    ]
    (base / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [
        record("noto/apple", "train", "apple", "noto"),
        record("noto/pear", "train", "pear", "noto"),
        record("3d/apple", "heldout", "apple", "fluent"),
        record("flat/apple", "heldout", "apple", "fluent"),  # the same drawing in flat
        record("3d/pear", "heldout", "pear", "fluent"),
        record("3d/moon", "heldout", "moon", "fluent"),  # of no concept in training
    ]
    pairs, left_out = clean_pairs(records, base)
    assert [one.name for one in pairs] == ["3d/pear"]
    assert left_out == 2


def test_training_pictures_have_the_held_out_ones_groups() -> None:
    def some(group: str, count: int) -> list[ImageRecord]:
        return [replace(record(f"{group}{n}", "train", "x", "y"), meta={"sampling_group": group}) for n in range(count)]

    train = [*some("icons", 100), *some("emoji", 50)]
    found = alike(train, [*some("emoji", 6), *some("icons", 2)], 20)
    assert Counter(one.meta["sampling_group"] for one in found) == {"emoji": 15, "icons": 5}
    assert len({one.name for one in found}) == 20


def test_the_card_has_no_figure_that_the_script_does_not_give() -> None:
    text = CARD.read_text()
    filled = fill_card(
        text, {"guidance": 3.0, "judge": {"samples": {"top1": (0.25, 0.03), "top5": (0.5, 0.04), "count": 200}}}
    )
    assert "{" not in filled
    assert "at guidance 3.0" in filled
    assert "25.0 ± 3.0 %; 50.0 ± 4.0 % (200)" in filled


def test_the_two_files_of_prompts_share_none() -> None:
    first, second = (read_prompt_file(file) for file in SHEETS.values())
    assert (len(first), len(second)) == (48, 24)
    assert not set(first) & set(second)


def test_the_key_says_where_each_picture_lies(tmp_path: Path) -> None:
    prompts = [f"thing {number}" for number in range(5)]

    class Pipeline:
        def __call__(self, asked: list[str], **options: object) -> Pipeline:
            self.images = [Image.new("RGB", (8, 8), (40 * asked.index(one), 0, 0)) for one in asked]
            return self

    save_sheet(Pipeline(), prompts, tmp_path, "objects")  # type: ignore[arg-type]
    places = dict(line.split("\t") for line in (tmp_path / "objects-key.txt").read_text().splitlines())
    assert sorted(places.values()) == prompts
    assert list(places.values()) != prompts
    sheet = Image.open(tmp_path / "objects-blind.png")
    for place, prompt in places.items():
        red = sheet.getpixel((8 + (int(place) - 1) * 136 + 64, 8 + 64))[0]  # type: ignore[index]
        assert red == 40 * prompts.index(prompt)
