"""Measurements are made once, tables hold the numbers, and a person's sentences in the document stay."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import decoder, deep_shallow, fashion_mnist, guidance, universality
from experiments.__main__ import main, without_own_paths
from experiments.results import (
    Mean,
    Measurements,
    Result,
    check_budget,
    markdown_table,
    mean_over_seeds,
    measure_once,
    update_document,
    write_result,
)
from starflow.errors import UserError
from starflow.train.loop import Interrupted
from starflow.train.tasks.decoder_run import DecoderReport


def test_means_over_seeds() -> None:
    mean = Mean.of([1.0, 2.0, 3.0])
    assert (mean.value, mean.count) == (2.0, 3)
    assert mean.error == pytest.approx(1 / 3**0.5)
    assert Mean.of([1.0]).error == 0
    assert str(mean) == "2 ± 0.58"
    two = mean_over_seeds([{"x": 1}, {"x": None}, {"x": 3}], "x", 10)
    assert (two.value, two.count) == (20, 2)
    assert two.error == pytest.approx(10)
    assert math.isinf(mean_over_seeds([{"x": None}], "x").value)


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    logged: list[str] = []
    assert measure_once(tmp_path, "a-0", lambda: {"x": 1.5}, logged.append) == {"x": 1.5}
    assert measure_once(tmp_path, "a-0", lambda: {"x": 2.5}, logged.append) == {"x": 1.5}
    assert logged == ["a-0"]


def test_budgets_do_not_mix(tmp_path: Path) -> None:
    check_budget(tmp_path, universality.QUICK)
    check_budget(tmp_path, universality.QUICK)
    with pytest.raises(UserError, match="another steps"):
        check_budget(tmp_path, universality.Budget())


def test_universality() -> None:
    def seeds(gap: float) -> list[Measurements]:
        return [{"gap": gap + n, "total_variation": gap / 2} for n in (-0.01, 0, 0.01)]

    found = {name: {"free 2": seeds(0.2), "waves 3": seeds(0.05)} for name in ("mixture", "rings")}
    assert universality.table(found, "gap", "nats", {"mixture": 0.9, "rings": 0.8}) == [
        ["nats", "best of any single block", "free 2 blocks", "waves 3 blocks"],
        ["mixture", "0.9", "0.2 ± 0.0058", "0.05 ± 0.0058"],
        ["rings", "0.8", "0.2 ± 0.0058", "0.05 ± 0.0058"],
    ]
    assert universality.table(found, "total_variation", "variation", None)[1] == ["mixture", "0.1 ± 0", "0.025 ± 0"]


def test_a_free_flow_is_a_density() -> None:
    """Its mass on a grid is one, so that what it misses of the entropy is a divergence."""
    torch.manual_seed(0)
    flow = universality.FreeFlow(3)
    axis = (torch.arange(400) + 0.5) / 400 * 20 - 10
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    with torch.no_grad():
        assert float(flow(points).exp().sum()) * (20 / 400) ** 2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("numbers", [2, 16])
def test_a_new_transformer_with_waves_is_the_identity(numbers: int) -> None:
    x = torch.randn(3, numbers)
    model = universality.Transformer(numbers, 2, 32)
    assert torch.allclose(model(x), torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1), atol=1e-5)


def test_waves_tell_numbers_apart_that_a_linear_map_does_not() -> None:
    torch.manual_seed(0)
    waves = universality.Waves(torch.nn.Linear(1, 8))
    before = waves(torch.linspace(-2, 2, 50)[:, None])
    torch.nn.init.zeros_(waves.linear.weight)
    apart = torch.pdist(waves(torch.linspace(-2, 2, 50)[:, None]))
    assert float(apart.detach().min()) > 1e-3
    assert before.shape == (50, 8)


def test_deep_shallow() -> None:
    one = {"nats_per_dim": -1.0, "train_nats_per_dim": -2.0, "kid_mobilenetv2": 0.02, "parameters": 10}
    seconds = {"update_seconds": 0.3, "sampling_seconds": 2.0, "sampling_seconds_auto": 1.0}
    found = {"deep-shallow": [{**one, **seconds}], "equal blocks": [{**one, **seconds, "nats_per_dim": -0.8}]}
    heads, *rows = deep_shallow.table(found)
    assert [row[:3] for row in rows] == [
        ["deep-shallow [1, 1, 1, 5]", "10", "-1 ± 0"],
        ["equal blocks [2, 2, 2, 2]", "10", "-0.8 ± 0"],
    ]
    assert rows[0][3:] == ["-2 ± 0", "20 ± 0", "0.3 ± 0", "2 ± 0", "1 ± 0"]
    assert len(heads) == len(rows[0])


def test_guidance_names_weights_without_a_finite_sample() -> None:
    good = {"kid_mobilenetv2": 0.03, "agreement": 0.5, "not_finite": 1}
    broken = {"kid_mobilenetv2": None, "agreement": 0.0, "not_finite": 10}
    found: guidance.Found = {"gaussian": {0.0: [good] * 3, 8.0: [good] * 3}, "linear": {0.0: [good] * 3}}
    found["linear"][8.0] = [broken] * 3
    heads, first, last = guidance.table(found)
    assert heads[:4] == [
        "w",
        "kid_mobilenetv2 x 1000, gaussian",
        "agreement, %, gaussian",
        "samples not finite, gaussian",
    ]
    assert first == ["0", "30 ± 0", "50 ± 0", "3", "30 ± 0", "50 ± 0", "3"]
    assert last == ["8", "30 ± 0", "50 ± 0", "3", "none finite", "0 ± 0", "30"]


def test_fashion_mnist() -> None:
    bits = {"bits_per_dim": 3.0, "error": 0.01, "draw_error": 0.0001, "count": 10_000, "draws": 4}
    measures = {"count": 500, "not_finite": 1, "kid_mobilenetv2": 0.02, "precision": 0.5}
    found: dict[str, Measurements] = {
        "bits": {"heldout": bits, "train": {**bits, "bits_per_dim": 2.9}, "png_bits_per_dim": 5.1},
        "classifier": {"accuracy": 0.8, "count": 1600, "seconds": 160.0},
        "one-pass": {"accuracy": 0.5, "count": 2500, "seconds": 50.0},
        "outliers": {
            "auroc_likelihood": 0.2,
            "auroc_typicality": 0.9,
            "auroc_ratio": 0.7,
            "auroc_background": 0.6,
            "count_inside": 2000,
            "count_outside": 5000,
        },
        "distances": {"floor": measures, "samples, unguided": {"count": 1, "not_finite": 499}},
    }
    table = fashion_mnist.likelihood_table(found)
    assert ["bits/dim of 8-bit pixels, training, 4 draws", "10,000", "2.9000 ± 0.0100"] in table
    assert ["bits/dim of the test pictures as PNG files", "10,000", "5.10"] in table
    assert ["caused by the draws alone, test", "10,000", "± 0.00010"] in table
    assert ["classified right by likelihood, a pass for each class", "1,600", "80.0 ± 1.0 %, 100 ms each"] in table
    assert ["the same, one pass there and back", "2,500", "50.0 ± 1.0 %, 20 ms each"] in table
    assert ["digits by likelihood, AUROC", "2,000 and 5,000", "0.2000"] in table
    assert ["digits by log p less PNG's, AUROC", "2,000 and 5,000", "0.7000"] in table
    assert ["digits by PNG's size alone, AUROC", "2,000 and 5,000", "0.6000"] in table
    nats = math.log(2)
    curve = [(500, 5 * nats, 0.0), (1000, 4 * nats, 0.0), (1500, 3 * nats, 0.0)]
    assert fashion_mnist.curve_rows(curve, fashion_mnist.Budget(heldout=1000)) == [
        ["test pictures on the way, 1,000 updates", "1,000", "4.0000"],
        ["test pictures on the way, 1,500 updates", "1,000", "3.0000"],
    ]
    floor, unguided = fashion_mnist.distance_table(found)[1:]
    assert floor[3:6] == ["20.0", "0.500", ""]
    assert unguided[3] == "none finite"


def test_decoder() -> None:
    def tuned(decibels: float) -> DecoderReport:
        return DecoderReport({"PSNR at noise 0.3 (dB)": (21.3, decibels)}, 96, 0.3)

    reports = {"L2": tuned(25.01), "full loss": tuned(24.0), "L2, longer": tuned(25.5)}
    assert decoder.table(reports, decoder.Budget(longer=5000)) == [
        ["measure", "before", "L2", "full loss", "L2, longer"],
        ["PSNR at noise 0.3 (dB)", "21.30", "25.01", "24.00", "25.50"],
        ["updates", "0", "640", "640", "5,000"],
        ["held-out pictures", "96", "96", "96", "96"],
    ]


def test_a_stop_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*arguments: object) -> None:
        raise Interrupted("stopped at step 3")

    monkeypatch.setattr("experiments.__main__._run", stop)
    monkeypatch.setattr("sys.argv", ["experiments", "guidance"])
    assert main() == 130
    assert capsys.readouterr().err == "stopped; the same command resumes\n"


def test_a_documents_command_has_no_paths_of_a_machine() -> None:
    words = ["decoder", "--data", "/somewhere/glyphs", "--steps", "9", "--document", "docs/results.md"]
    assert without_own_paths(words) == ["decoder", "--data", "FOLDER", *words[3:]]


def test_a_section_is_written_anew_and_a_persons_sentences_stay(tmp_path: Path) -> None:
    plot = tmp_path / "x.png"
    plot.write_bytes(b"png")
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text("# Results\n\n<!-- x -->\nold\n<!-- /x -->\n\n**What was found.** It is so.\n")

    def result(value: str) -> Result:
        return Result(
            "x", "Title", "It is so.", [[["a", "b"], ["1", value]], [["c"], ["3"]]], "make x", {"cells": value}
        )

    update_document(path, result("1.5"), plot)
    update_document(path, result("2.5"), plot)
    text = path.read_text()
    assert "old" not in text
    assert "1.5" not in text
    assert text.count("| 1 | 2.5 |") == 1
    assert "| c |\n|---|\n| 3 |" in text
    assert "images/results-x.png" in text
    assert text.endswith("<!-- /x -->\n\n**What was found.** It is so.\n")
    assert (tmp_path / "docs" / "images" / "results-x.png").read_bytes() == b"png"
    update_document(tmp_path / "new.md", result("1"), plot)
    assert (tmp_path / "new.md").read_text().startswith("# Results\n\n<!-- x -->\n## Title\n")


def test_a_result_is_written_beside_its_measurements(tmp_path: Path) -> None:
    write_result(tmp_path, Result("x", "Title", "It is so.", [[["a"], ["1"]]], "make x", {"cells": 2}))
    assert json.loads((tmp_path / "results.json").read_text()) == {"command": "make x", "cells": 2}
    assert "![Title](x.png)" in (tmp_path / "section.md").read_text()
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
