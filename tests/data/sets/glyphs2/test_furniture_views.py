"""Views of models as files: drawn once, gone on with after a break, and what their captions say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from starflow.data.sets.glyphs2 import furniture as module
from starflow.data.sets.glyphs2.drawings import Raster, draw
from starflow.data.sets.glyphs2.furniture import Catalogue, model_views, read_catalogues
from starflow.data.sets.glyphs2.models import SIDES, BadModel, View
from starflow.data.sets.glyphs2.packages import open_debian
from starflow.errors import UserError
from tests.data.sets.glyphs2.conftest import FakePackages, png
from tests.data.sets.glyphs2.test_prepare import prepare, records_of

COLOURS = ("red", "blue", "green", "purple", "orange", "brown", "black", "yellow", "gray", "pink", "tan", "navy")


class FakeVtk:
    """Stands for `draw_model`: a flat picture a side, all different, and one red one."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def draw_model(
        self, files: dict[str, bytes], model: str, rotation: tuple[float, ...], name: str, size: int
    ) -> Iterator[View]:
        assert model in files
        self.drawn.append(name)
        if name.endswith("cube"):
            raise BadModel("it holds no surfaces")
        for number, (side, colour) in enumerate(zip(SIDES, COLOURS, strict=True)):
            yield View(number, side, "", draw(Raster(png(colour), crop=True), size))
        yield View(12, SIDES[6], "red", draw(Raster(png("#f02030")), size))


@pytest.fixture
def vtk(monkeypatch: pytest.MonkeyPatch) -> FakeVtk:
    fake = FakeVtk()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name == "vtkmodules" else find(name))
    monkeypatch.setattr(module, "draw_model", fake.draw_model)
    return fake


@pytest.fixture
def catalogues(fake: FakePackages) -> list[Catalogue]:
    return read_catalogues(open_debian(fake.furniture, fake.folder, fake.folder))


def views(catalogues: list[Catalogue], folder: Path, size: int = 32) -> list[Any]:
    return list(model_views(catalogues, folder, size=size, workers=1, progress=False))


def test_captions_say_side_and_colour(vtk: FakeVtk, fake: FakePackages, tmp_path: Path) -> None:
    summary = prepare(fake, tmp_path / "set", models=True)
    records = {name: one for name, one in records_of(tmp_path / "set").items() if one.meta["style"] == "model"}
    assert summary.pictures["model"] == len(records) == 13
    left = records["model/Test/armchair/06"]
    assert (left.caption, left.meta["view"], left.meta["flip"]) == ("armchair", "from the left", "no")
    painted = records["model/Test/armchair/12"]
    assert (painted.caption, painted.meta["paint"]) == ("red armchair", "red")
    assert records["model/Test/armchair/00"].meta["flip"] == "yes"
    assert records["model/Test/armchair/01"].meta["say_view"] == "sometimes"
    assert len({(one.split, one.meta["concept"], one.meta["family"]) for one in records.values()}) == 1, "one unit"
    icon = records_of(tmp_path / "set")["furniture/Test/armchair"]
    assert (icon.meta["model"], icon.split) == (left.meta["model"], left.split), "with the ready icon"


def test_a_model_is_drawn_once(vtk: FakeVtk, catalogues: list[Catalogue], tmp_path: Path) -> None:
    first = views(catalogues, tmp_path)
    assert vtk.drawn == ["Test/armchair", "Test/cube"]
    assert ("model/Test/cube", "it holds no surfaces") in first
    assert views(catalogues, tmp_path) == first
    assert vtk.drawn == ["Test/armchair", "Test/cube"], "also of one that shows nothing the reason is kept"
    (tmp_path / "model" / "Test" / "armchair" / "03.png").unlink()
    assert views(catalogues, tmp_path) == first
    assert vtk.drawn[2:] == ["Test/armchair"]
    views(catalogues, tmp_path, size=16)
    assert vtk.drawn[3:] == ["Test/armchair", "Test/cube"]


def test_a_broken_run_leaves_no_notes(
    vtk: FakeVtk, catalogues: list[Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Iterator[View]:
        yield View(0, SIDES[0], "", draw(Raster(png("red")), 32))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "draw_model", stop)
    with pytest.raises(KeyboardInterrupt):
        views(catalogues, tmp_path)
    assert not list(tmp_path.rglob("views.json"))
    monkeypatch.setattr(module, "draw_model", vtk.draw_model)
    assert len(views(catalogues, tmp_path)) == 14
    notes = json.loads((tmp_path / "model" / "Test" / "armchair" / "views.json").read_text())
    assert notes["size"] == 32
    assert len(notes["views"]) == 13


def test_without_vtk_it_says_how_to_go_on(
    catalogues: list[Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'starflow\[models\]'.*--model-views leave-out"):
        views(catalogues, tmp_path)
