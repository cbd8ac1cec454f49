"""The report: what a prompt asks for, and a whole run on a tiny model with stubbed features."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from tests.cli.conftest import CLASSES, random_pipeline
from torch import Tensor, nn

from starflow import measure as module
from starflow.conditioning import ClassLabels
from starflow.data.records import Record
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.measure import Plan, Report, concept_of, measure


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


class MeanColour(nn.Module):
    """Features that are closed under nothing but are cheap: the mean colour and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), torch.ones(len(images), 1)], dim=1) * self.scale


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    colours = {"circle": "red", "square": "lime", "star": "blue"}
    found = []
    for number in range(18):
        shape = CLASSES[number % 3]
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), colours[shape]).save(path)
        split: Literal["train", "heldout"] = "heldout" if number >= 12 else "train"
        found.append(Record(path, shape, shape, split, f"p{number}", {}))
    return found


def run(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(module, "load_mobilenet", MeanColour)
    pipeline = random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))
    plan = Plan(samples=6, tuning_samples=4, guidance=(0.0, 1.0), prompts=CLASSES)
    return measure(pipeline, records, plan, lambda text: None)


def test_a_whole_report(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(records, monkeypatch)
    assert report.reconstruction["noise 0.0"] > 90  # pixels are their own latents
    assert report.reconstruction["noise 0.0"] > report.reconstruction["noise 0.2"] > report.reconstruction["noise 0.3"]
    assert report.guidance in (0.0, 1.0)
    assert set(report.tuning) == {"0", "1"}
    assert report.tuning[f"{report.guidance:g}"] == min(report.tuning.values())
    assert report.kid_mobilenetv2["floor (training pictures)"] < report.kid_mobilenetv2["samples"]
    assert report.retrieval["reconstructions of held-out pictures"] == 1.0
    assert len(report.grid) == len(report.nearest) == 3
    assert {split: found.count for split, found in report.likelihood.items()} == {"train": 6, "heldout": 6}
    found = report.likelihood["heldout"]
    assert found.bits_per_dim == pytest.approx(found.nats_per_dim / math.log(2))
    assert json.loads(json.dumps(report.as_json()))["counts"] == {"train": 12, "heldout": 6, "samples": 6}


def test_a_report_repeats(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(records, monkeypatch).as_json() == run(records, monkeypatch).as_json()


def test_a_missing_split_is_refused(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no heldout pictures among 12"):
        run(records[:12], monkeypatch)
