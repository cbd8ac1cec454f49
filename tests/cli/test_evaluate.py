"""`starflow evaluate`: the files it writes, its table, and bad input.

`torchrun -m starflow evaluate` on two processes reports what one process reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.evaluate import features, judge
from starflow.evaluate import report as reports
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import CLASSES, Run, fails, with_companions
from tests.evaluate.test_report import MeanColour


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of classes, enough pictures that the hash holds some out."""
    monkeypatch.setattr(features, "load_mobilenet", MeanColour)
    monkeypatch.setattr(judge, "WIDTH", 4)
    monkeypatch.setattr(judge, "HIDDEN", 8)
    monkeypatch.setattr(judge, "name_vectors", lambda names: torch.eye(len(names)))
    monkeypatch.setattr(reports, "judge_features", lambda: features.FeatureExtractor("colour", MeanColour()))
    for number in range(60):
        folder = tmp_path / "pictures" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 3 * number, 20)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def test_table_report_and_sheets(run: Run, classes: Path, pictures: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("circle\nstar\n")
    sizes = ("--samples", 4, "--tuning-samples", 3, "--guidance", 0, "--guidance", 1)
    kept = ("--save-reference", tmp_path / "kept.safetensors", "--judge", tmp_path / "judge.safetensors")
    result = run("evaluate", classes, pictures, "--output", tmp_path / "report", "--prompts", prompts, *sizes, *kept)
    assert result.code == 0, result.err
    for part in ("reconstruction, noise 0.2 (dB)", "heldout", "kid_mobilenetv2 x 1000, samples", "retrieval, grid",
                 "floor (training pictures)", "autoencoder, noise 0", "guidance 0", "guidance 1",
                 "judge: right name first of 3 names, held-out pictures",
                 "judge: samples over reconstructions"):  # fmt: skip
        assert part in result.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["counts"]["samples"] == 4
    assert set(report["tuning"]) == {"0", "1"}
    assert report["counts"]["train"] + report["counts"]["heldout"] == 60
    assert report["judge"]["scores"]["samples"]["count"] == min(4, report["counts"]["heldout"])
    assert (tmp_path / "judge.safetensors").is_file()
    again = run(
        "evaluate", classes, pictures, "--output", tmp_path / "again", *sizes, "--reference", tmp_path / kept[1]
    )
    assert "fd_mobilenetv2_reference, samples, guidance 1" in again.out, again.err
    measures = json.loads((tmp_path / "again" / "report.json").read_text())["distances"]["floor (training pictures)"]
    assert measures["fd_mobilenetv2_reference"] == pytest.approx(measures["fd_mobilenetv2"])
    html = (tmp_path / "report" / "report.html").read_text()
    for name in ("samples.png", "nearest.png", "reconstructions.png"):
        assert f'src="{name}"' in html
        with Image.open(tmp_path / "report" / name) as sheet:
            assert sheet.width > 2 * 8


def test_likelihood_alone(run: Run, classes: Path, pictures: Path, tmp_path: Path) -> None:
    options = ("--bpd", "--draws", 2, "--classify", "--outliers", pictures, "--pictures", 2)
    result = run("evaluate", classes, pictures, "--output", tmp_path / "report", *options)
    assert result.code == 0, result.err
    for part in ("bits/dim of the noised pixels, heldout, 2 pictures, 2 draws", "likelihood classifier", "typicality"):
        assert part in result.out
    assert "kid" not in result.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["likelihood"]["heldout"]["draws"] == 2
    assert report["outliers"]["count_outside"] == 2
    assert not (tmp_path / "report" / "samples.png").exists()


def test_the_way_out_of_the_noise_is_a_choice(run: Run, classes: Path, pictures: Path, tmp_path: Path) -> None:
    found = {}
    for cleaning in ("tweedie", "none"):
        sizes = ("--samples", 4, "--tuning-samples", 3, "--guidance", 0, "--cleaning", cleaning)
        result = run("evaluate", classes, pictures, "--output", tmp_path / cleaning, *sizes)
        assert result.code == 0, result.err
        found[cleaning] = json.loads((tmp_path / cleaning / "report.json").read_text())["distances"]
    assert found["tweedie"]["samples, guidance 0"] != found["none"]["samples, guidance 0"]
    assert found["tweedie"]["autoencoder, noise 0"] == found["none"]["autoencoder, noise 0"]


def test_what_a_user_draws_with_is_what_is_measured(run: Run, classes: Path, pictures: Path, tmp_path: Path) -> None:
    with_companions(StarFlowPipeline.from_pretrained(str(classes))).save_pretrained(tmp_path / "model")
    sizes = ("--samples", 4, "--tuning-samples", 3, "--guidance", 0, "--temperature", 0.9)
    command = ("evaluate", tmp_path / "model", pictures, "--output", tmp_path / "report", *sizes)
    result = run(*command, "--sampler", "student", "--candidates", 2)
    assert result.code == 0, result.err
    assert "note: samples are the student's, an approximation of the flow" in result.out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["sampler"] == "student"
    label = ", temperature 0.9, best of 2, by the student"
    assert {f"samples, guidance {weight}{label}" for weight in (0, 1)} < set(report["distances"])
    result = run(*command, "--cleaning", "denoiser")
    assert result.code == 0, result.err
    again = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (again["sampler"], again["cleaning"]) == ("flow", "denoiser")
    assert "samples, guidance 0, temperature 0.9" in again["distances"]
    for asked, missing in (("--sampler", "student"), ("--cleaning", "denoiser")):
        result = run("evaluate", classes, pictures, asked, missing, "--output", tmp_path / "none")
        said = result.err.splitlines()[-1]  # the line before counts the pictures
        assert result.code == 2
        assert said.startswith("starflow: ")
        assert f"`starflow train-{missing}`" in said
    fails(run(*command, "--sampler", "student", "--bpd"), "--sampler", "--bpd", "choose one")
    fails(run(*command, "--sampler", "student", "--cleaning", "tweedie"), "--cleaning has no effect")


def test_bad_input_is_one_line(run: Run, classes: Path, tmp_path: Path) -> None:
    fails(run("evaluate", classes, tmp_path / "none", "--output", tmp_path / "r"), "none")
    fails(run("evaluate", classes, tmp_path, "--save-reference", "m.npz"), "--save-reference is 'm.npz'", "safetensors")
    fails(run("evaluate", classes, tmp_path, "--judge", "j.pt"), "--judge is 'j.pt'", "safetensors")
    fails(run("evaluate", classes, tmp_path, "--judge", "j.safetensors", "--bpd"), "--judge", "--bpd", "choose one")
    for words in (("--save-reference", "m.safetensors"), ("--features", "none"), ("--samples", 9), ("--guidance", 1)):
        fails(run("evaluate", classes, tmp_path, *words, "--bpd"), words[0], "is about samples", "choose one")
    fails(run("evaluate", classes, tmp_path, "--samples", 1), "--samples is 1", "at least 2")
    fails(run("evaluate", classes, tmp_path, "--features", "resnet"), "resnet")
    fails(run("evaluate", classes, tmp_path, "--cleaning", "soap"), "--cleaning is 'soap'", "tweedie")
    (tmp_path / "file").write_text("")
    fails(run("evaluate", classes, tmp_path, "--output", tmp_path / "file"), "is a file, expected a folder")


STUB = """
import torch
from torch import nn
class Stub(nn.Module):
    def forward(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)
"""
SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.slow
def test_two_processes_report_what_one_does(classes: Path, tmp_path: Path) -> None:
    for number in range(60):
        folder = tmp_path / "pictures" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 3 * number, 20)).save(folder / f"{number}.png")
    (tmp_path / "stub_network.py").write_text(STUB)
    env = {
        **os.environ,
        "PYTHONPATH": f"{SOURCE}{os.pathsep}{tmp_path}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    sizes = ["--samples", "7", "--tuning-samples", "5", "--guidance", "1", "--features", "stub=stub_network:Stub"]
    reports = {}
    for count in (1, 2):
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            "-m",
            "starflow",
        ]
        words = ["evaluate", str(classes), str(tmp_path / "pictures"), "--output", str(tmp_path / str(count)), *sizes]
        made = subprocess.run(
            [*run, *words, "--classify"], capture_output=True, text=True, timeout=300, env=env, check=False
        )
        assert made.returncode == 0, made.stderr
        reports[count] = json.loads((tmp_path / str(count) / "report.json").read_text())
    one, two = reports[1], reports[2]
    for split in ("train", "heldout"):
        first, second = one["likelihood"][split], two["likelihood"][split]
        assert first["count"] == second["count"]
        assert first["bits_per_dim"] == pytest.approx(second["bits_per_dim"], rel=1e-6)
    assert one["classification"] == two["classification"]
    for name, measures in one["distances"].items():
        assert two["distances"][name] == pytest.approx(measures, rel=1e-4, abs=1e-6), name
    assert two["distances"]["samples, guidance 1"]["count"] == 7
