"""`starflow train` and its stages: runs, overrides, Ctrl-C and resume, and every bad input.

`starflow train-decoder`: a run, its table, and bad input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.cli.main import main
from starflow.cli.options import split_overrides
from starflow.errors import UserError
from starflow.flow.model import STARFlow
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, save_small
from tests.cli.conftest import Run, fails

RECIPE = """
name: smoke
data: {source: shapes, shapes: 40, views: {size: 8}}
autoencoder: {kind: pixels}
conditioning: {kind: class}
flow: {channels: 16, layers_per_block: [1, 1], patch_size: 4, head_dim: 16}
objective: {noise_std: 0.1}
train: {steps: 300, batch: 4, warmup: 5, evaluate_every: 100, sample_every: 1000, checkpoint_every: 1000}
prompts: [circle, star]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "smoke.yaml"
    path.write_text(RECIPE)
    return path


def steps(run: Path) -> list[int]:
    """The updates of a run's log, in order."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_a_recipe_to_a_model_that_generates(
    run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", recipe, "--train.steps", 3, "--train.sample_every=2", "--guidance", "1.5")
    folder = Path("runs/smoke")
    assert result.code == 0, result.err
    assert f"starflow generate --model {folder / 'model'}" in result.out
    assert steps(folder) == [1, 2, 3]
    kept = json.loads((folder / "recipe.json").read_text())
    assert (kept["train"]["steps"], kept["train"]["sample_every"], kept["guidance"]) == (3, 2, 1.5)
    assert [path.name for path in sorted((folder / "samples").glob("*.png"))] == [
        "step_00000002.png",
        "step_00000003.png",
    ]
    assert run("generate", "star", "--model", folder / "model").code == 0
    assert (tmp_path / "out" / "star-0000.png").is_file()
    # Whatever reads models reads the run too, and the flow alone.
    assert run("generate", "star", "--model", folder, "--output", "again").code == 0
    with Image.open("again/star-0000.png") as one, Image.open("out/star-0000.png") as two:
        assert one.tobytes() == two.tobytes()
    facts = json.loads(run("info", folder, "--verify", "--json").out)
    assert (facts["name"], facts["files"]["without_a_digest"]) == ("smoke", [])
    flows = [STARFlow.from_pretrained(one) for one in (folder, folder / "model", folder / "model" / "flow")]
    assert len({flow.config for flow in flows}) == 1


def test_stages_alone(run: Run, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small = ["--autoencoder.kind", "small", "--autoencoder.train.steps", 2, "--autoencoder.train.batch", 4]
    small += ["--autoencoder.model", "{channels: 4, widths: [8], encoder_pairs: 1, decoder_pairs: 1}"]
    assert run("train-autoencoder", recipe, "--output", folder, *small).code == 0
    assert steps(folder / "autoencoder") == [1, 2]
    assert not (folder / "latents").exists()
    assert run("cache-latents", recipe, "--output", folder, *small).code == 0
    assert (folder / "latents" / "info.json").is_file()
    assert not (folder / "checkpoints").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_writes_a_checkpoint_and_the_same_command_resumes(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["train", str(recipe), "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "starflow", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(folder / "best" / "config.json", process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    stopped = steps(folder)[-1]
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == f"starflow: stopped at step {stopped} of 300; the same command resumes"
    assert "Traceback" not in err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{stopped:08d}"]
    assert not (folder / "model").exists()
    assert 100 <= stopped < 300
    assert main(arguments) == 0
    assert steps(folder) == list(range(1, 301))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert process.poll() is None, f"ended with {process.returncode} before {path}"
        assert time.monotonic() < deadline, f"no {path} in time"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("batch: 4", "bach: 4"), ["unknown key 'train.bach'", "did you mean 'batch'?"]),
        (("prompts:", "promts:"), ["unknown key 'promts'", "did you mean 'prompts'?"]),
        (("channels: 16", "chanels: 16"), ["'flow.chanels'", "did you mean 'channels'?"]),
        (("batch: 4", "batch: many"), ["'train.batch' is 'many'", "expected int"]),
        (("kind: pixels", "kind: pixel"), ["'autoencoder.kind' is 'pixel'", "'pixels'"]),
        (("steps: 300", "steps: 0"), ["'steps' is 0", "at least 1"]),
        (("name: smoke", ""), ["'name' is missing"]),
        (
            ("source: shapes, shapes: 40", "source: folder, path: /nowhere"),
            ["no folder of pictures at '/nowhere'", "data.path"],
        ),
        (("name: smoke", "name: [smoke"), ["smoke.yaml is not valid"]),
        (("prompts: [circle, star]", "prompts: [stra]"), ["unknown class 'stra'", "did you mean 'star'?"]),
    ],
)
def test_bad_recipes(run: Run, recipe: Path, tmp_path: Path, change: tuple[str, str], parts: list[str]) -> None:
    recipe.write_text(RECIPE.replace(*change))
    result = run("train", recipe, "--output", tmp_path / "run")
    fails(result, *parts)
    assert not list(tmp_path.rglob("*/model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train.lrr", "1"], ["unknown key 'train.lrr'", "did you mean 'lr'?"]),
        (["--train.lr", "fast"], ["'train.lr' is 'fast'", "expected float"]),
        (["--train.lr", "[1"], ["--train.lr", "[1"]),
        (["--train.lr"], ["'--train.lr' has no value"]),
        (["--train.lr", "--device", "cpu"], ["'--train.lr' has no value"]),
        (["--name.first", "x"], ["--name.first"]),
        (["--ouput", "x"], ["unknown option '--ouput'", "'--output'"]),
        (["--zzz", "x"], ["unknown key 'zzz'"]),
        (["more.yaml"], ["unexpected argument 'more.yaml'"]),
    ],
)
def test_bad_overrides(run: Run, recipe: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    fails(run("train", recipe, *arguments), *parts)


def test_bad_files(run: Run, recipe: Path, tmp_path: Path) -> None:
    fails(run("train", tmp_path / "missing.yaml"), "no such file", "missing.yaml")
    fails(run("train", tmp_path), "cannot read")
    fails(run("train", recipe, "--output", recipe), f"{recipe} is a file", "another --output")
    fails(run("train", recipe, "--output", "/proc/run"), "cannot write to /proc/run")


def test_a_damaged_checkpoint_is_named(run: Run, recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", recipe, "--output", tmp_path / "run", "--train.steps"]
    assert run(*arguments, 2).code == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002" / "model_00000.safetensors"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-100])
    result = run(*arguments, 4)
    assert result.code == 2
    assert "model_00000.safetensors is not a whole safetensors file" in result.err.splitlines()[-1]
    checkpoint.write_bytes(whole)
    result = run(*arguments, 4, "--flow.channels", 32)
    assert result.code == 2
    assert "was started with another flow.channels" in result.err.splitlines()[-1]


def test_overrides_are_set_apart() -> None:
    words = ["recipe.yaml", "--output", "x", "--a.b", "-1", "--c=d=e", "--device=cpu", "--help", "--name", "n"]
    rest, overrides = split_overrides(words, ["--output", "--device"])
    assert rest == ["recipe.yaml", "--output", "x", "--device=cpu", "--help"]
    assert overrides == [("a.b", "-1"), ("c", "d=e"), ("name", "n")]
    with pytest.raises(UserError, match="did you mean '--device'"):
        split_overrides(["--devise", "cpu"], ["--output", "--device"])


def test_a_run_and_its_table(run: Run, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (4 * number, 255 - 4 * number, 20)).save(tmp_path / "data" / f"{number}.png")
    torch.manual_seed(0)
    config = SmallAutoencoderConfig(channels=3, widths=(8,), encoder_pairs=1, decoder_pairs=1)
    save_small(SmallAutoencoder(config), tmp_path / "source", 0.0)
    sizes = (
        "--size",
        8,
        "--crop",
        0,
        "--steps",
        3,
        "--batch",
        2,
        "--perceptual",
        0,
        "--adversarial",
        0,
        "--noise",
        0.2,
    )
    words = ("train-decoder", tmp_path / "source", tmp_path / "data", "--output", tmp_path / "run", *sizes)
    result = run(*words)
    assert result.code == 0, result.err
    assert "PSNR at noise 0.2 (dB)" in result.out
    assert f"done: {tmp_path / 'run' / 'model'}" in result.out
    assert run(*words).out == result.out
    fails(run(*words, "--views", 2), "another views")


def test_bad_input(run: Run, tmp_path: Path) -> None:
    fails(run("train-decoder", tmp_path / "none", tmp_path, "--output", tmp_path / "run"), "none")
    fails(run("train-decoder", "a", "b", "--noise", -2), "--noise is -2")
    fails(run("train-decoder", "a", "b", "--report", -1), "--report is -1")
    fails(run("train-decoder", "a", "b", "--size", 1), "--size is 1")
    fails(run("train-decoder", "a", "b", "--squared", 0, "--output", tmp_path / "run"), "squared weight above 0")
    fails(run("train-decoder", "a", "b", "--features", "vgg"), "--features is 'vgg'")
