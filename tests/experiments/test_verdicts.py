"""Verdicts come from the numbers alone: each claim is called shown, not shown or undecided as they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import decoder, deep_shallow, fashion_mnist, guidance, universality
from experiments.__main__ import main, shown
from experiments.cells import Cell, Mean, Result, cell, compare, document, keep_budget, write_result
from starflow.errors import UserError
from starflow.train.loop import Interrupted
from starflow.train.tasks.decoder_run import DecoderReport


def test_means_and_their_differences() -> None:
    mean = Mean.of([1.0, 2.0, 3.0])
    assert (mean.value, mean.count) == (2.0, 3)
    assert mean.error == pytest.approx(1 / 3**0.5)
    assert Mean.of([1.0]).error == 0
    assert compare(Mean(1, 0.1, 3), Mean(2, 0.1, 3)) == "lower"
    assert compare(Mean(2, 0.1, 3), Mean(1, 0.1, 3)) == "higher"
    assert compare(Mean(1, 0.5, 3), Mean(1.9, 0.5, 3)) == "not told apart"
    assert compare(Mean(1, 0, 1), Mean(1, 0, 1)) == "not told apart"


def test_a_cell_is_computed_once(tmp_path: Path) -> None:
    said: list[str] = []
    assert cell(tmp_path, "a-0", lambda: {"x": 1.5}, said.append) == {"x": 1.5}
    assert cell(tmp_path, "a-0", lambda: {"x": 2.5}, said.append) == {"x": 1.5}
    assert said == ["a-0"]


def test_budgets_do_not_mix(tmp_path: Path) -> None:
    keep_budget(tmp_path, universality.QUICK)
    keep_budget(tmp_path, universality.QUICK)
    with pytest.raises(UserError, match="another steps"):
        keep_budget(tmp_path, universality.Budget())


def gaps(one: float, two: float, three: float) -> dict[str, dict[int, list[Cell]]]:
    def cells(gap: float) -> list[Cell]:
        return [
            {"gap": gap + noise, "curve": [[5, 2 * gap + 1], [10, gap]], "parameters": 100}
            for noise in (-0.01, 0, 0.01)
        ]

    return {name: {1: cells(one), 2: cells(two), 3: cells(three)} for name in ("mixture", "rings")}


LIMITS = {"mixture": 0.9, "rings": 0.8}


def test_universality() -> None:
    shown = universality.verdict(gaps(1.0, 0.2, 0.05), LIMITS)
    assert shown.startswith("The claim shows")
    assert "one block stays 1.000 nats above the entropy (the best any single block can do is 0.900)" in shown
    assert "three to 0.050, which is lower again" in shown
    assert "still fell" in shown
    assert "Three blocks miss at most 0.05 nats" in shown
    equal = universality.verdict(gaps(1.0, 1.001, 1.002), LIMITS)
    assert equal.startswith("The claim does not show")
    assert "not told apart from two" in equal
    assert "does not follow from this: they still miss 1.00 to 1.00 nats" in equal
    assert universality.table(gaps(1.0, 0.2, 0.05), LIMITS)[1][:2] == ["mixture", "0.9"]


def variant(nats: float, distance: float, last: float) -> list[Cell]:
    return [
        {
            "nats_per_dim": nats + noise,
            "train_nats_per_dim": nats,
            "kid_mobilenetv2": distance + noise / 10,
            "update_seconds": 0.3,
            "sampling_seconds": 2.0,
            "sampling_seconds_auto": 1.0,
            "parameters": 10,
            "curve": [[5, nats + last, nats], [10, nats, nats]],
        }
        for noise in (-0.01, 0.0, 0.01)
    ]


@pytest.mark.parametrize(
    ("deep", "equal", "head"),
    [
        ((-1.0, 0.02), (-0.8, 0.03), "The claim shows at this size"),
        ((-0.8, 0.02), (-1.0, 0.01), "The claim does not show at this size"),
        ((-1.0, 0.02), (-1.001, 0.0201), "The claim neither shows nor fails"),
    ],
)
def test_deep_shallow(deep: tuple[float, float], equal: tuple[float, float], head: str) -> None:
    found = {"deep-shallow": variant(*deep, last=0.0), "equal blocks": variant(*equal, last=0.0)}
    said = deep_shallow.verdict(found)
    assert said.startswith(head)
    assert said.endswith("were flat at the end.")
    falling = {**found, "equal blocks": variant(*equal, last=0.1)}
    assert deep_shallow.verdict(falling).endswith("still fell at the end.")
    assert [row[0] for row in deep_shallow.table(found)[1:]] == [
        "deep-shallow [1, 1, 1, 5]",
        "equal blocks [2, 2, 2, 2]",
    ]


def guided(gaussian: list[float], linear: list[float]) -> guidance.Found:
    weights = (0.0, 2.0, 8.0)

    def cells(distance: float) -> list[Cell]:
        return [
            {"kid_mobilenetv2": distance + noise, "agreement": 0.5, "not_finite": 1} for noise in (-1e-3, 0.0, 1e-3)
        ]

    return {
        "gaussian": {weight: cells(value) for weight, value in zip(weights, gaussian, strict=True)},
        "linear": {weight: cells(value) for weight, value in zip(weights, linear, strict=True)},
    }


CURVES = [[(1, 0.5, 0.5), (2, 0.499, 0.5)]]


@pytest.mark.parametrize(
    ("gaussian", "linear", "head"),
    [
        ([0.05, 0.03, 0.04], [0.05, 0.03, 0.4], "The claim shows: the linear rule dips and then spikes"),
        ([0.05, 0.03, 0.4], [0.05, 0.03, 0.04], "The claim does not show at this size: at the largest"),
        ([0.05, 0.03, 0.032], [0.05, 0.03, 0.045], "The claim shows, but for the height of the spike"),
        ([0.05, 0.03, 0.04], [0.05, 0.03, 0.04], "The claim does not show at this size: at the largest weight the two"),
    ],
)
def test_guidance(gaussian: list[float], linear: list[float], head: str) -> None:
    said = guidance.verdict(guided(gaussian, linear), CURVES)
    assert said.startswith(head)
    assert "9 samples in all were not finite" in said
    assert said.endswith("were flat at the end.")


def test_samples_that_are_all_broken_still_make_a_table() -> None:
    found = guided([0.05, 0.03, 0.04], [0.05, 0.03, 0.04])
    found["linear"][8.0] = [{"kid_mobilenetv2": None, "agreement": 0.0, "not_finite": 10}] * 3
    assert guidance.table(found)[-1][3] == "none finite"
    assert "inf" in guidance.verdict(found, CURVES)


def of_fashion(raw: float) -> dict[str, Cell]:
    one = {"bits_per_dim": 3.0, "error": 0.01, "draw_error": 0.0001, "count": 10_000, "draws": 4}
    measures = {"count": 500, "not_finite": 1, "kid_mobilenetv2": 0.02, "precision": 0.5}
    return {
        "bits": {"heldout": one, "train": {**one, "bits_per_dim": 2.9}},
        "classifier": {"accuracy": 0.875, "count": 2000},
        "outliers": {"auroc_likelihood": raw, "auroc_typicality": 0.9},
        "distances": {"floor": measures, "samples, unguided": {"count": 1, "not_finite": 499}},
    }


@pytest.mark.parametrize(("raw", "part"), [(0.2, "the known failure: the model finds"), (0.7, "does not show here")])
def test_fashion_mnist(raw: float, part: str) -> None:
    said = fashion_mnist.verdict(of_fashion(raw), [(1, 2.2, 2.1), (2, 2.1, 2.0)])
    for text in ("3.0000 ± 0.0100 bits/dim", "± 0.00010", "87.50 % of 2,000", part, "still fell"):
        assert text in said
    assert "was flat" in fashion_mnist.verdict(of_fashion(raw), [(1, 2.1, 2.1), (2, 2.1, 2.0)])
    floor, unguided = fashion_mnist.table(of_fashion(raw))[1:]
    assert floor[3:6] == ["20.0", "0.500", ""]
    assert unguided[3] == "none finite"


def fine_tuned(decibels: float, kernel: float) -> DecoderReport:
    before = {"PSNR at noise 0.3 (dB)": 21.3, "kid_mobilenetv2 x 1000 at noise 0.3": 31.0}
    after = (decibels, kernel)
    return DecoderReport({name: (was, now) for (name, was), now in zip(before.items(), after, strict=True)}, 96, 0.3)


@pytest.mark.parametrize(("decibels", "part"), [(25.01, "it reaches 25 dB"), (24.99, "it misses 25 dB")])
def test_decoder(decibels: float, part: str) -> None:
    reports = {"L2": fine_tuned(decibels, 40.0), "full loss": fine_tuned(24.0, 12.5)}
    said = decoder.verdict(reports, {"L2": [(1, 22.0), (2, 22.5)], "full loss": [(1, 22.0)]}, decoder.Budget())
    for text in ("goes from 21.30 to", part, "of 12.5 where the old decoder had 31.0", "still rose at the end"):
        assert text in said
    flat: dict[str, decoder.Curve] = {"L2": [(1, 22.5), (2, 22.5)]}
    assert "were flat" in decoder.verdict(reports, flat, decoder.Budget())
    assert decoder.table(reports)[1] == ["PSNR at noise 0.3 (dB)", "21.30", f"{decibels:.2f}", "24.00"]
    reports["L2, longer"] = fine_tuned(25.5, 35.0)
    said = decoder.verdict(reports, flat, decoder.Budget(longer=5000))
    assert (
        "to 25.50 dB at noise 0.3 on 96 held-out pictures, in 5,000 updates of 4 crops of 96 px: it reaches 25 dB"
        in said
    )
    assert decoder.table(reports)[0] == ["measure", "before", "L2", "full loss", "L2, longer"]


def test_a_stop_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*arguments: object) -> None:
        raise Interrupted("stopped at step 3")

    monkeypatch.setattr("experiments.__main__._run", stop)
    monkeypatch.setattr("sys.argv", ["claims", "guidance"])
    assert main() == 130
    assert capsys.readouterr().err == "stopped; the same command resumes\n"


def test_a_documents_command_has_no_paths_of_a_machine() -> None:
    words = ["decoder", "--data", "/somewhere/glyphs", "--steps", "9", "--document", "docs/results.md"]
    assert shown(words) == ["decoder", "--data", "FOLDER", "--steps", "9", "--document", "docs/results.md"]


def test_a_documents_section_is_written_anew(tmp_path: Path) -> None:
    plot = tmp_path / "x.png"
    plot.write_bytes(b"png")
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text("# Results\n\n<!-- x -->\nold\n<!-- /x -->\n\nafter\n")

    def result(verdict: str) -> Result:
        return Result("x", "Title", "It is so.", verdict, [["a", "b"], ["1", "2"]], "make x", {})

    document(path, result("It is."), plot)
    document(path, result("It is not."), plot)
    text = path.read_text()
    assert "old" not in text
    assert text.count("It is not.") == 1
    assert text.count("**What was found.**") == 1
    assert "| 1 | 2 |" in text
    assert "images/results-x.png" in text
    assert text.endswith("after\n")
    assert (tmp_path / "docs" / "images" / "results-x.png").read_bytes() == b"png"
    write_result(tmp_path, result("It is."))
    assert "It is." in (tmp_path / "section.md").read_text()
