"""The commands of docs/training.md and docs/many-gpus.md run as they stand, with fewer updates and processes."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from starflow.cli.main import COMMANDS, main
from starflow.cli.options import parse, split_overrides
from starflow.cli.train import TrainOptions
from starflow.conditioning.text import MINILM, find_text_encoder
from starflow.data.sets.small import draw_shapes
from starflow.errors import UserError
from starflow.train.recipe import load_recipe

ROOT = Path(__file__).parent.parent
TEXT = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("training.md", "many-gpus.md"))
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.splitlines()]
HERE = [line for line in LINES if line.startswith("starflow ") and "recipes/starflow-" not in line]
LARGE = [line for line in LINES if "recipes/starflow-" in line]
MANY = [line for line in LINES if line.startswith("torchrun --standalone")]
HOSTS = [line for line in LINES if line.startswith("torchrun --nnodes")]
SHORT = "--train.steps 2 --train.batch 4 --train.warmup 1 --train.peak_tflops 0.01 --data.workers 0".split()
SMALL = [*SHORT, "--flow.channels", "64", "--flow.layers_per_block", "[1, 1]"]
SHORT_AUTOENCODER = ["--autoencoder.train.steps", "2", "--autoencoder.train.batch", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with my-pictures/ (eight, with captions), my-classes/, mine.yaml and the recipes."""
    try:
        find_text_encoder(MINILM)
    except UserError:
        pytest.skip("the text encoder is not installed")
    folder = tmp_path_factory.mktemp("guide")
    views = draw_shapes(8, 72, seed=0)
    for number in range(8):
        picture = Image.fromarray(views.images[number].permute(1, 2, 0).numpy())
        picture = picture.crop((0, 0, 72, (72, 40)[number % 2]))
        for path in (folder / "my-pictures" / f"{number}.png", folder / "my-classes" / ("cat", "dog")[number % 2]):
            path = path if path.suffix else path / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        (folder / "my-pictures" / f"{number}.txt").write_text(views.captions[number])
    Image.open(folder / "my-pictures" / "0.png").resize((64, 64)).save(folder / "my-pictures" / "0.png")
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    (folder / "mine.yaml").write_text(recipe)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def shortened(words: list[str]) -> list[str]:
    """A command line of ours with fewer updates, and a small flow where it is a new one."""
    if words[0] == "train-decoder":
        return [*words, "--steps", "2", "--batch", "2", "--perceptual", "0", "--adversarial", "0"]
    if words[0] not in ("train", "train-autoencoder", "cache-latents"):
        return words
    words = shlex.split(re.sub(r"--(train\.steps|data\.workers) \d+", "", shlex.join(words)))
    own = SHORT if "finetune" in words[1] else SMALL
    return [*words, *own, *([] if "finetune" in words[1] else SHORT_AUTOENCODER)]


def run(line: str) -> None:
    name, *words = shlex.split(line)
    assert name == "starflow"
    assert main(shortened(words)) == 0, line


FIRST = HERE[:2]


def test_fine_tuning_the_bundled_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for line in FIRST:
        run(line)
    assert list((place / "out" / "finetuned").glob("*.png"))


@pytest.mark.slow
def test_every_other_command_of_one_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for line in HERE[2:]:
        run(line)
    assert len(list((place / "out" / "mine").glob("*.png"))) == 4
    (wide,) = (place / "out" / "wide").glob("*.png")
    with Image.open(wide) as image:
        assert image.size == (88, 48)


@pytest.mark.slow
def test_commands_under_torchrun(place: Path) -> None:
    """With two processes for eight."""
    for line in MANY:
        start(line.replace("--nproc-per-node 8", "--nproc-per-node 2"), place, wait=True)
    assert (place / "runs" / "eight" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_commands_of_many_hosts(place: Path) -> None:
    """Both hosts are this one, with a process each."""
    (line,) = HOSTS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = line.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("host-one:29500", f"127.0.0.1:{port}")
    agents = [start(line, place, wait=False) for _ in range(2)]
    for agent in agents:
        out, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, out
    assert (place / "runs" / "hosts" / "model" / "config.json").is_file()


def start(line: str, place: Path, *, wait: bool) -> subprocess.Popen[str]:
    ours, _, rest = line.partition(" -m starflow ")
    words = [*shlex.split(ours)[1:], "-m", "starflow", *shortened(shlex.split(rest))]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if wait:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    return process


@pytest.mark.parametrize("line", LARGE)
def test_commands_of_the_published_models_are_read(line: str) -> None:
    """They need data and days: the command line and the recipe are checked, with what it overrides."""
    name, command, *words = shlex.split(line)
    assert (name, command in {one.name for one in COMMANDS}) == ("starflow", True)
    options = parse(TrainOptions, command, words)
    recipe = load_recipe(ROOT / options.recipe, dict(options.overrides))
    _, overrides = split_overrides(words, ["--output", "--device"])
    assert dict(overrides)["data.path"] == recipe.data.path


def test_every_command_is_tested() -> None:
    others = [line for line in LINES if line not in {*HERE, *LARGE, *MANY, *HOSTS}]
    assert others == ["tensorboard --logdir runs"]
    assert "starflow" not in "".join(re.findall(r"^```(?!sh\n|yaml\n|\n).*", TEXT, re.MULTILINE))


def test_every_key_and_recipe_that_is_named_exists() -> None:
    known = load_recipe(ROOT / "recipes" / "tiny.yaml")
    for section, key in re.findall(r"`(data|train|autoencoder)\.([a-z_]+)`", TEXT):
        assert hasattr(getattr(known, section), key), f"{section}.{key}"
    for name in re.findall(r"^\| `([a-z0-9-]+)`(?:, `([a-z0-9-]+)`)? \| .* \| .* \|$", TEXT, re.MULTILINE):
        for one in filter(None, name):
            assert (ROOT / "recipes" / f"{one}.yaml").is_file() or one in ("folder", "tar", "parquet")
