"""A whole report on a tiny model with stubbed features: its parts, its repeatability, and samples that break."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from starflow.conditioning import ClassLabels
from starflow.data.images import from_pil, to_float, to_pil
from starflow.data.sources.base import ImageRecord
from starflow.errors import UserError
from starflow.evaluate import FeatureExtractor, kernel_distance
from starflow.evaluate.dataset import EvaluationSet, select_rows
from starflow.evaluate.render import report_page, report_table
from starflow.evaluate.report import (
    EvaluationReport,
    EvaluationSettings,
    _sampling_label,
    evaluate_pipeline,
    few_pictures,
    weights_to_try,
)
from starflow.evaluate.samples import SamplingOptions
from starflow.io.files import json_text
from starflow.latents import PixelLatents
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import CLASSES, random_pipeline, with_companions


class MeanColour(nn.Module):
    """Features that are cheap: the mean colour and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), torch.ones(len(images), 1)], dim=1) * self.scale


@pytest.fixture
def pictures(tmp_path: Path) -> EvaluationSet:
    colours = {"circle": "red", "square": "lime", "star": "blue"}
    found = []
    for number in range(18):
        shape = CLASSES[number % 3]
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), colours[shape]).save(path)
        split: Literal["train", "heldout"] = "heldout" if number >= 12 else "train"
        found.append(ImageRecord(path, shape, shape, split, f"p{number}", {}))
    return EvaluationSet.of_records(found, 8)


def pipeline() -> StarFlowPipeline:
    return random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))


PLAN = EvaluationSettings(samples=6, tuning_samples=4, guidance=(0.0, 1.0), prompts=CLASSES, classify=True, draws=2)


def run(pictures: EvaluationSet, plan: EvaluationSettings = PLAN) -> EvaluationReport:
    return evaluate_pipeline(pipeline(), pictures, plan, lambda text: None, FeatureExtractor("colour", MeanColour()))


def test_a_whole_report(pictures: EvaluationSet) -> None:
    report = run(pictures)
    assert report.reconstruction["noise 0.0"] > 90  # pixels are their own latents
    assert report.reconstruction["noise 0.0"] > report.reconstruction["noise 0.2"] > report.reconstruction["noise 0.3"]
    assert set(report.tuning) == {"0", "1"}
    assert report.tuning[f"{report.guidance:g}"] == min(report.tuning.values())
    floor, *others = report.distances
    assert floor == "floor (training pictures)"
    assert others == ["autoencoder, noise 0", "autoencoder, noise 0.1", "samples, guidance 0", "samples, guidance 1"]
    assert report.distances[floor]["kid_colour"] < report.distances["samples, guidance 0"]["kid_colour"]
    assert report.distances["autoencoder, noise 0"]["fd_colour"] == pytest.approx(0, abs=1e-6)
    assert {measures["count"] for measures in report.distances.values()} == {6, 12}
    assert report.retrieval["reconstructions of held-out pictures"] == 1.0
    assert len(report.sheets.samples) == len(report.sheets.nearest) == 3
    found = report.likelihood["heldout"]
    assert (found.count, found.draws, found.space, found.dimensions) == (6, 2, "noised pixels", 192)
    assert found.bits_per_dim == pytest.approx(found.nats_per_dim / math.log(2))
    assert report.classification is not None
    assert sum(map(sum, report.classification.confusion)) == 6
    assert json.loads(json.dumps(report.as_json()))["counts"] == {"train": 12, "heldout": 6, "samples": 6}


def test_likelihoods_are_the_pipelines(pictures: EvaluationSet) -> None:
    plan = EvaluationSettings(only_likelihood=True, draws=2)
    report = run(pictures, plan)
    assert not report.distances
    assert not report.sheets.samples
    made = pipeline()
    each = [
        made.log_prob(one, str(label), seed=2 * row, draws=2).nats
        for row, (one, label) in enumerate(
            zip(to_pil(to_float(pictures.heldout.images)), pictures.heldout.labels, strict=True)
        )
    ]
    assert report.likelihood["heldout"].nats_per_dim == pytest.approx(-sum(each) / 6 / 192, rel=1e-5)


def test_a_report_repeats_at_any_batch_size(pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(pictures)
    assert run(pictures).as_json() == whole.as_json()
    monkeypatch.setattr("starflow.evaluate.samples.BATCH", 4)
    monkeypatch.setattr("starflow.evaluate.likelihood.BATCH", 5)
    monkeypatch.setattr("starflow.evaluate.dataset.BATCH", 5)
    again = run(pictures)
    for name, measures in whole.distances.items():
        assert again.distances[name] == pytest.approx(measures, rel=1e-3, abs=1e-4)
    assert again.likelihood["heldout"].nats_per_dim == pytest.approx(whole.likelihood["heldout"].nats_per_dim)


def test_samples_that_are_not_finite_are_counted_not_redrawn(
    pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starflow.pipeline import pipeline as module

    sample = module.best_candidates  # type: ignore[attr-defined]

    def broken(*arguments: object, **options: object) -> Tensor:
        made = sample(*arguments, **options)  # type: ignore[arg-type]
        made[0] = torch.nan
        return made

    monkeypatch.setattr(module, "best_candidates", broken)
    report = run(pictures)
    for weight in (0, 1):
        found = report.distances[f"samples, guidance {weight}"]
        assert (found["count"], found["not_finite"]) == (5, 1)
    assert "pictures that are not finite, samples, guidance 0" in report_table(report)


def test_with_a_student_every_sample_is_its_own(pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    made, colour = with_companions(pipeline()), FeatureExtractor("colour", MeanColour())
    plan = dataclasses.replace(PLAN, classify=False, sampling=SamplingOptions("student", candidates=2))
    monkeypatch.setattr("starflow.pipeline.pipeline.best_candidates", lambda *_, **__: pytest.fail("the flow drew"))
    report = evaluate_pipeline(made, pictures, plan, lambda text: None, colour)
    prompts = [str(label) for label in pictures.heldout.labels]
    heldout = colour.network(to_float(pictures.heldout.images)).double()
    for weight in (0, 1):
        drawn = made(prompts, guidance=weight, sampler="student", candidates=2).images
        features = colour.network(torch.cat([from_pil(image) for image in drawn])).double()
        found = report.distances[f"samples, guidance {weight}, temperature 0.5, best of 2, by the student"]
        assert found["kid_colour"] == pytest.approx(kernel_distance(features, heldout).value, rel=1e-4, abs=1e-6)
    sheet = made(list(CLASSES), guidance=report.guidance, sampler="student", candidates=2).images
    assert [image.tobytes() for image in report.sheets.samples] == [image.tobytes() for image in sheet]
    assert "note: samples are the student's, an approximation of the flow" in report_table(report)
    without = run(pictures, dataclasses.replace(PLAN, only_likelihood=True))
    assert report.likelihood["heldout"] == without.likelihood["heldout"]  # the flow's own


def test_a_student_that_cannot_draw_is_refused_first(pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starflow.evaluate.report.measure_likelihoods", lambda *_: pytest.fail("measured"))
    plan = dataclasses.replace(PLAN, classify=False, sampling=SamplingOptions("student"))
    with pytest.raises(UserError, match="'pixels' has no student to sample with"):
        run(pictures, plan)
    made, colour = with_companions(pipeline()), FeatureExtractor("colour", MeanColour())
    with pytest.raises(UserError, match="guidance is 5, but the student was trained up to 4"):
        evaluate_pipeline(made, pictures, dataclasses.replace(plan, guidance=(5.0,)), lambda text: None, colour)
    made.config = dataclasses.replace(made.config, guidance=5.0)
    judged = dataclasses.replace(plan, judge="judge.safetensors")
    with pytest.raises(UserError, match="the model's own guidance, 5, and the student was trained up to 4"):
        evaluate_pipeline(made, pictures, judged, lambda text: None, colour)


def test_a_student_that_knows_no_guidance_is_measured_without(pictures: EvaluationSet) -> None:
    made = with_companions(pipeline())
    assert made.student is not None
    made.student.config = dataclasses.replace(made.student.config, largest_guidance=0.0)
    plan = dataclasses.replace(PLAN, classify=False, sampling=SamplingOptions("student", temperature=1.0))
    report = evaluate_pipeline(made, pictures, plan, lambda text: None, FeatureExtractor("colour", MeanColour()))
    assert [name for name in report.distances if "samples" in name] == ["samples, guidance 0, by the student"]


def test_the_table_and_the_page_say_everything(pictures: EvaluationSet) -> None:
    report = run(pictures)
    for text in (report_table(report), report_page(report, "a <model>", [("Samples", "samples.png")])):
        for part in ("kid_colour x 1000, floor", "fd_colour, samples, guidance 1", "autoencoder, noise 0.1",
                     "bits/dim of the noised pixels, heldout, 6 pictures, 2 draws", "best guidance",
                     "accuracy of the likelihood classifier"):  # fmt: skip
            assert part in text
    assert "a &lt;model&gt;" in report_page(report, "a <model>", [])
    assert '<img src="samples.png"' in report_page(report, "t", [("Samples", "samples.png")])


def test_plans_are_checked() -> None:
    with pytest.raises(UserError, match="draws 0"):
        EvaluationSettings(draws=0)
    for weights in ((1.0, -1.0), (math.nan,), (0.0, math.inf), ()):
        with pytest.raises(UserError, match="none below 0 or infinite"):
            EvaluationSettings(guidance=weights)


def test_too_few_pictures_for_a_distance_are_refused_before_anything_is_measured(
    pictures: EvaluationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starflow.evaluate.report.measure_likelihoods", lambda *_: pytest.fail("measured"))
    for split, set_of_one in (
        ("held-out", EvaluationSet(pictures.train, select_rows(pictures.heldout, [0]))),
        ("training", EvaluationSet(select_rows(pictures.train, [0]), pictures.heldout)),
    ):
        with pytest.raises(UserError, match=f"the set has 1 {split} picture, expected at least 2 .*--bpd"):
            run(set_of_one)
    with pytest.raises(UserError, match="cirkle"):
        run(pictures, EvaluationSettings(prompts=("cirkle",)))


def test_likelihoods_need_one_picture_a_split(pictures: EvaluationSet) -> None:
    few = EvaluationSet(select_rows(pictures.train, [0]), select_rows(pictures.heldout, [0]))
    assert run(few, EvaluationSettings(only_likelihood=True)).likelihood["heldout"].count == 1


def test_a_distance_of_few_pictures_says_that_it_says_little(pictures: EvaluationSet) -> None:
    report = run(pictures)
    assert [remark.partition(": a distance of ")[0] for remark in report.remarks] == list(report.distances)
    assert "samples, guidance 1: a distance of 6 to 6 pictures says little" in report_table(report)
    assert "Note: samples, guidance 1: a distance of 6 to 6" in report_page(report, "t", [])
    assert json.loads(json_text(report.as_json()))["remarks"] == list(report.remarks)
    enough = {"samples": {"count": 50.0}, "floor": {"count": 900.0}}
    assert list(few_pictures(enough, 50)) == []
    assert len(list(few_pictures(enough, 49))) == 2


def test_what_is_drawn_and_how_long_it_takes_is_said_first(pictures: EvaluationSet) -> None:
    said: list[str] = []
    plan = EvaluationSettings(samples=6, tuning_samples=4, guidance=(0.0, 1.0, 2.0))
    evaluate_pipeline(pipeline(), pictures, plan, said.append, FeatureExtractor("colour", MeanColour()))
    drawn = 3 * 4 + 2 * 6
    assert said[0] == f"{drawn} samples are drawn: at most about 1 min in one process here, --samples draws fewer"


def test_guided_and_unguided_are_shown_together_whatever_is_asked() -> None:
    assert weights_to_try((0.0,)) == [0.0, 1.0]
    assert weights_to_try((3.0, 2.0)) == [0.0, 2.0, 3.0]


def test_a_model_without_classes_is_no_classifier(pictures: EvaluationSet) -> None:
    made = random_pipeline("plain", PixelLatents(), None)
    with pytest.raises(UserError, match="no classes to tell apart"):
        evaluate_pipeline(made, pictures, PLAN, lambda text: None, FeatureExtractor("colour", MeanColour()))


@pytest.mark.parametrize(
    ("temperature", "candidates", "label"),
    [(1.0, 1, ""), (0.8, 1, ", temperature 0.8"), (1.0, 4, ", best of 4"), (0.8, 4, ", temperature 0.8, best of 4")],
)
def test_samples_are_named_after_how_they_are_drawn(temperature: float, candidates: int, label: str) -> None:
    config = dataclasses.replace(pipeline().config, temperature=temperature, candidates=candidates)
    assert _sampling_label(config) == label
