"""The judge learns names from pictures, says what it left out, and a file of it is whole or refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from starflow.data.sources.base import unit_hash
from starflow.data.views import TrainingViews
from starflow.errors import UserError
from starflow.evaluate import judge as module
from starflow.evaluate.dataset import EvaluationSet, select_rows
from starflow.evaluate.features import FeatureExtractor
from starflow.evaluate.judge import (
    Judge,
    JudgeHead,
    _learn,
    _ratio,
    load_judge,
    measure_judge,
    names_of,
    open_judge,
    save_judge,
    some_of_each,
)
from starflow.evaluate.samples import SamplingOptions
from starflow.io.files import read_tensors, write_tensors
from starflow.sampling.student import StudentOutput
from tests.cli.conftest import CLASSES, with_companions
from tests.evaluate.test_report import MeanColour, pipeline
from tests.evaluate.test_report import pictures as pictures  # a fixture

SMALL = FeatureExtractor("colour", MeanColour())


@pytest.fixture
def judge(pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """One that was trained on three colours, with vectors of the names that are drawn here."""
    monkeypatch.setattr(module, "WIDTH", 4)
    monkeypatch.setattr(module, "HIDDEN", 32)
    monkeypatch.setattr(module, "EPOCHS", 60)
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "name_vectors", lambda names: torch.randn(len(names), 6, generator=draw))
    return module.train_judge(pictures, SMALL, lambda text: None)


def clusters(kinds: int, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features around a centre for each kind, their kinds, and a vector for each kind's name."""
    draw = torch.Generator().manual_seed(1)
    centres, names = torch.randn(kinds, 20, generator=draw), torch.randn(kinds, 8, generator=draw)
    labels = torch.arange(kinds).repeat(each)
    return centres[labels] + 0.3 * torch.randn(len(labels), 20, generator=draw), labels, names


def test_it_learns_names_that_it_can_tell_apart_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HIDDEN", 64)
    monkeypatch.setattr(module, "EPOCHS", 60)
    features, labels, names = clusters(20, 24)
    state = torch.random.get_rng_state()
    head, vectors = _learn(features[:400], labels[:400], names, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    known = Judge(head, vectors, tuple("abcdefghijklmnopqrst"), tuple("abcdefghijklmnopqrst"), frozenset())
    concepts = [known.concepts[label] for label in labels[400:]]
    assert known.hits(features[400:], concepts).mean(0).min() > 0.9
    noise = torch.randn(400, 20, generator=torch.Generator().manual_seed(2))
    first, among_five = known.hits(noise, [known.concepts[row % 20] for row in range(400)]).mean(0).tolist()
    assert first == pytest.approx(1 / 20, abs=0.05)
    assert among_five == pytest.approx(5 / 20, abs=0.1)
    again = _learn(features[:400], labels[:400], names, seed=0)[1]
    assert torch.equal(vectors, again)


def test_answers_are_in_order_and_a_picture_that_is_not_finite_has_none() -> None:
    head = JudgeHead(3, 3).eval()
    vectors = torch.nn.functional.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    known = Judge(head, vectors, tuple("abcdefg"), tuple("abcdefg"), frozenset())
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    features[2, 1] = torch.nan
    answers = known.answers(features, 7)
    assert (answers[2] == -1).all()
    for row in (0, 1, 3):
        cosines = (head(features[row : row + 1]) @ vectors.T)[0]
        assert answers[row].tolist() == cosines.argsort(descending=True).tolist()
    assert known.hits(features, ["a"] * 4)[2].tolist() == [0, 0]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4), st.integers(4, 6))
def test_some_of_each_concept(concepts: list[str], least: int, most: int) -> None:
    rows = some_of_each(concepts, least, most)
    assert rows == sorted(set(rows))
    assert Counter(concepts[row] for row in rows) == {
        one: min(most, count) for one, count in Counter(concepts).items() if count >= least
    }


def test_a_concept_is_called_by_its_most_frequent_caption() -> None:
    assert names_of(["x", "x", "b", "x"], ["red x", "x", "b", "x"]) == (("b", "x"), ("b", "x"))


def test_a_file_brings_the_same_judge_back(judge: Judge, tmp_path: Path) -> None:
    save_judge(tmp_path / "judge.safetensors", judge)
    back = load_judge(tmp_path / "judge.safetensors")
    assert (back.names, back.concepts, back.trained) == (judge.names, judge.concepts, judge.trained)
    features = torch.rand(5, 4)
    assert torch.equal(back.answers(features), judge.answers(features))


def test_a_file_that_was_changed_is_refused(judge: Judge, tmp_path: Path) -> None:
    file = tmp_path / "judge.safetensors"
    save_judge(file, judge)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="sha256 differs"):
        load_judge(file)
    write_tensors(file, {"vectors": torch.zeros(1, 1)})
    with pytest.raises(UserError, match="holds no judge"):
        load_judge(file)
    with pytest.raises(UserError, match="no such file"):
        load_judge(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("gone", ["features", "names", "concepts", "sha256", ""])
def test_a_header_that_is_no_judges_is_refused(judge: Judge, tmp_path: Path, gone: str) -> None:
    file = tmp_path / "judge.safetensors"
    save_judge(file, judge)
    with safe_open(file, "pt") as header:
        about = json.loads(header.metadata()["judge"])
    about.pop(gone, None)
    for text in (json.dumps(about), "{", "[]", "null", json.dumps({**about, "names": 3})) if gone else ("{", "[]"):
        write_tensors(file, read_tensors(file), {"judge": text})
        with pytest.raises(UserError, match="holds no judge"):
            load_judge(file)


def test_pictures_without_a_caption_are_no_concept(judge: Judge, pictures: EvaluationSet) -> None:
    """Three of them would be a concept of the name ""; held out they are unknown, and left out."""

    def blank(views: TrainingViews) -> TrainingViews:
        names = [f"q{name}" for name in views.names]  # of which the set knows no concept but the caption
        return dataclasses.replace(views, captions=["", "", "", *views.captions[3:]], names=names)

    dataset = dataclasses.replace(pictures, train=blank(pictures.train), heldout=blank(pictures.heldout))
    found = module.train_judge(dataset, SMALL, lambda text: None)
    assert found.names == judge.names == tuple(sorted(CLASSES))
    assert len(found.trained) == 9
    assert measure_judge(pipeline(), dataset, found, SMALL, 6).unknown == 3


def test_hits_are_of_known_concepts_one_for_each_picture(judge: Judge) -> None:
    with pytest.raises(UserError, match="1 concepts for 2 pictures: give one for each"):
        judge.hits(torch.rand(2, 4), judge.concepts[:1])
    with pytest.raises(UserError, match="does not know 1 concepts, such as 'unicorn'"):
        judge.hits(torch.rand(2, 4), [judge.concepts[0], "unicorn"])


def test_it_is_trained_once(judge: Judge, pictures: EvaluationSet, tmp_path: Path) -> None:
    said: list[str] = []
    made = open_judge(tmp_path / "judge.safetensors", pictures, SMALL, said.append)
    assert len(said) == 2
    again = open_judge(tmp_path / "judge.safetensors", pictures, SMALL, said.append)
    assert len(said) == 2
    assert torch.equal(made.vectors, again.vectors)


def test_real_pictures_reconstructions_and_samples_side_by_side(judge: Judge, pictures: EvaluationSet) -> None:
    assert judge.concepts == tuple(sorted(CLASSES))
    assert judge.trained == {unit_hash(name) for name in pictures.train.names}
    report = measure_judge(pipeline(), pictures, judge, SMALL, 4)
    assert [score.count for score in report.scores.values()] == [6, 4, 4, 4]
    assert report.scores["held-out pictures"].top1 == 1.0  # a colour each
    assert report.scores["reconstructions, noise 0.1"].top1 == 1.0  # pixels are their own latents
    assert (report.names, report.unknown, report.trained) == (3, 0, 0)
    # With three names all are among the first five.
    assert report.ratio == report.scores["samples"].top5 == 1.0


def test_a_judge_may_look_at_a_student(judge: Judge, pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starflow.pipeline.pipeline.best_candidates", lambda *_, **__: pytest.fail("the flow drew"))
    made = with_companions(pipeline())
    assert made.student is not None
    made.student.config = dataclasses.replace(made.student.config, guidance=3.5)
    weights: list[float] = []
    draw = made.student.forward

    def note(z: torch.Tensor, condition: torch.Tensor, guidance_B: torch.Tensor) -> StudentOutput:
        weights.extend(guidance_B.tolist())
        return draw(z, condition, guidance_B)

    monkeypatch.setattr(made.student, "forward", note)
    report = measure_judge(made, pictures, judge, SMALL, 4, SamplingOptions("student"))
    assert report.scores["samples"].count == 4
    assert weights == [3.5] * 4


def test_what_it_cannot_judge_is_left_out_and_counted(judge: Judge, pictures: EvaluationSet) -> None:
    names = pictures.heldout.names
    strange = {name: "moon" if name in names[:2] else concept for name, concept in pictures.concepts.items()}
    dataset = dataclasses.replace(pictures, concepts=strange)
    known = dataclasses.replace(judge, trained=judge.trained | {unit_hash(names[1]), unit_hash(names[3])})
    report = measure_judge(pipeline(), dataset, known, SMALL, 10)
    assert (report.unknown, report.trained) == (2, 2)
    assert report.scores["samples"].count == 3
    none = dataclasses.replace(dataset, heldout=select_rows(dataset.heldout, [0, 1]))
    with pytest.raises(UserError, match="it can judge none"):
        measure_judge(pipeline(), none, known, SMALL, 10)


def test_samples_that_break_count_as_not_named(judge: Judge, pictures: EvaluationSet) -> None:
    broken = pipeline()
    for parameter in broken.flow.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    report = measure_judge(broken, pictures, judge, SMALL, 4)
    found = report.scores["samples"]
    assert (found.not_finite, found.top5, report.ratio) == (4, 0.0, 0.0)


def test_the_ratio_and_its_error() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(20000, 2, generator=draw).double()
    first, second = (rows[:, 0] < 0.3).double(), (rows[:, 1] < 0.6).double()
    ratio, error = _ratio(first, second)
    assert ratio == pytest.approx(0.5, abs=0.02)
    means = torch.stack([first.view(200, 100).mean(1) / second.view(200, 100).mean(1)])
    assert error * math.sqrt(200) == pytest.approx(float(means.std()), rel=0.15)  # of 100 rows
    assert _ratio(second, second) == (1.0, 0.0)
    assert math.isnan(_ratio(first, torch.zeros(20000).double())[0])
