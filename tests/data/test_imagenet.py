"""ImageNet's folders as they come."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from tests.data.test_sources import indexed

from starflow.data.buckets import Buckets
from starflow.data.imagenet import order_classes, synset_names
from starflow.data.sources import open_source

MAPPING = """\
n01440764 tench, Tinca tinca
n01531178 goldfinch, Carduelis carduelis
n02012849 crane
n03126707 crane
n02113799 standard poodle
"""


def test_classes_are_called_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train"
    for synset in ("n02012849", "n01440764", "n03126707"):
        (folder / synset).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / synset / f"{synset}_1.JPEG", "JPEG")
    (tmp_path / "LOC_synset_mapping.txt").write_text(MAPPING)
    pictures = indexed(open_source("folder", str(folder)), tmp_path / "index", Buckets(8, 8))
    assert pictures.classes() == ["tench", "crane (n02012849)", "crane (n03126707)"], "in the synsets' order"
    told = {pictures.entry(n).label: pictures.entry(n).caption for n in range(3)}
    assert told == {name: name for name in pictures.classes()}


def test_without_a_mapping_the_ids_are_the_names(tmp_path: Path) -> None:
    assert synset_names(tmp_path, ["n01440764"]) == {}
    (tmp_path / "words.txt").write_text(MAPPING.replace(" ", "\t", 1))
    assert synset_names(tmp_path, ["n01440764"]) == {"n01440764": "tench"}
    assert synset_names(tmp_path, ["n01440764", "tench"]) == {}, "other folders beside synsets: names are names"


def test_numbers_are_ordered_as_numbers() -> None:
    assert order_classes(["10", "9", "2"]) == ["2", "9", "10"]
    assert order_classes(["10", "b", "a"]) == ["10", "a", "b"]
