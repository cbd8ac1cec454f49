"""`starflow generate`: files, names, texts, and every bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from starflow.cli.options import OutputTarget, parse_size, slug
from starflow.data.buckets import ASPECTS, aspect_size
from starflow.errors import UserError
from starflow.io.files import read_tensors, write_tensors
from starflow.pipeline import inputs
from starflow.pipeline.config import Cleaning
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import Run, fails


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return {str(key): str(value) for key, value in image.info.items()}


def test_writes_what_the_pipeline_makes_and_says_how_in_the_file(run: Run, text: Path, tmp_path: Path) -> None:
    arguments = ["a red apple", "--num-images", 3, "--seed", 5, "--guidance", 2, "--model", text, "--output", tmp_path]
    result = run("generate", *arguments)
    paths = [tmp_path / f"a-red-apple-{seed:04d}.png" for seed in (5, 6, 7)]
    assert result.code == 0, result.err
    assert result.out.splitlines() == [str(path) for path in paths]
    images = StarFlowPipeline.from_pretrained(text)("a red apple", num_images=3, seed=5, guidance=2).images
    assert [pixels(path) for path in paths] == [image.tobytes() for image in images]
    assert texts(paths[1]) == {
        "prompt": "a red apple",
        "seed": "6",
        "guidance": "2",
        "temperature": "1",
        "candidates": "1",
        "model": str(text),
    }
    assert sorted(tmp_path.iterdir()) == paths


def test_pictures_do_not_depend_on_the_batch(run: Run, classes: Path, tmp_path: Path) -> None:
    for size in (1, 4):
        run(
            "generate",
            "star",
            "--num-images",
            4,
            "--batch-size",
            size,
            "--model",
            classes,
            "--output",
            tmp_path / f"{size}",
        )
    for one in (tmp_path / "1").iterdir():
        with Image.open(one) as a, Image.open(tmp_path / "4" / one.name) as b:
            assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


def test_one_file(run: Run, classes: Path, tmp_path: Path) -> None:
    assert run("generate", "star", "--model", classes, "--output", tmp_path / "star.png").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["star.png"]


def test_prompts_from_a_file_and_a_grid_with_a_row_a_prompt(run: Run, classes: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("circle\n\n# not this one\nstar\n")
    out = tmp_path / "out"
    result = run(
        "generate", "--prompts", file, "--num-images", 3, "--grid", "--model", classes, "--output", out, "--json"
    )
    found = json.loads(result.out)
    assert [(one["prompt"], one["seed"]) for one in found["images"]] == [
        *(("circle", seed) for seed in range(3)),
        *(("star", seed) for seed in range(3, 6)),
    ]
    assert found["grid"] == str(out / "grid.png")
    assert all(Path(one["path"]).is_file() for one in found["images"])
    assert found["seconds"].keys() == {"load", "sample"}
    with Image.open(out / "grid.png") as sheet:
        assert sheet.size == (3 * 8 + 2 * 2, 2 * 8 + 2)


def test_a_class_by_its_name_or_number_is_the_prompt(run: Run, classes: Path, tmp_path: Path) -> None:
    for flag, value in (("--class", "star"), ("--class", "2"), ("", "star")):
        words = [flag, value] if flag else [value]
        assert run("generate", *words, "--model", classes, "--output", tmp_path / f"{flag}{value}.png").code == 0
    assert len({pixels(path) for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("prompt", [["   "], [""], []])
def test_an_empty_prompt_samples_unconditionally(run: Run, text: Path, tmp_path: Path, prompt: list[str]) -> None:
    result = run("generate", *prompt, "--guidance", 3, "--model", text, "--output", tmp_path)
    assert result.code == 0, result.err
    unguided = StarFlowPipeline.from_pretrained(text)("", guidance=0).images[0]
    with Image.open(tmp_path / "unconditional-0000.png") as image:
        assert max(abs(x - y) for x, y in zip(image.tobytes(), unguided.tobytes(), strict=True)) <= 1


def test_an_emoji_is_read_by_its_name(run: Run, text: Path, tmp_path: Path) -> None:
    assert run("generate", "a 🍎", "--model", text, "--output", tmp_path / "emoji").code == 0
    assert run("generate", "a red apple", "--model", text, "--output", tmp_path / "words").code == 0
    emoji, words = tmp_path / "emoji/a-red-apple-0000.png", tmp_path / "words/a-red-apple-0000.png"
    assert pixels(emoji) == pixels(words)
    assert texts(emoji)["prompt"] == "a 🍎"


def test_a_long_prompt_is_cut_with_one_warning(run: Run, text: Path, tmp_path: Path) -> None:
    long = "a red apple on the table with a blue car"
    result = run("generate", long, "--num-images", 2, "--model", text, "--output", tmp_path)
    assert result.code == 0
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("warning: ")
    assert "over the limit of 6 tokens" in result.err


def test_other_sizes_and_ratios(run: Run, classes: Path, tmp_path: Path) -> None:
    for flag, value, expected in (
        ("--size", "12x4", (12, 4)),
        ("--aspect", "21:9", (12, 4)),
        ("--aspect", "4:5", (8, 8)),
    ):
        path = tmp_path / f"{expected[0]}{flag}.png"
        assert run("generate", flag, value, "--model", classes, "--output", path).code == 0
        with Image.open(path) as image:
            assert image.size == expected


@pytest.mark.parametrize("ratio", ASPECTS)
def test_ratios_keep_the_area(ratio: str) -> None:
    width, height = aspect_size(ratio, 512, 8)  # type: ignore[arg-type]
    across, down = map(int, ratio.split(":"))
    assert width % 8 == height % 8 == 0
    assert width / height == pytest.approx(across / down, rel=0.04)
    assert width * height == pytest.approx(512**2, rel=0.03)


def test_a_size_that_was_not_trained_is_one_warning(run: Run, classes: Path, tmp_path: Path) -> None:
    result = run("generate", "star", "--size", "16x16", "--num-images", 2, "--model", classes, "--output", tmp_path)
    assert result.code == 0
    assert result.err.splitlines() == [
        "warning: 'classes' was trained at 8x8 pixels, not at 16x16: positions are rescaled, and pictures may be worse"
    ]
    assert run("generate", "star", "--size", "8x8", "--model", classes, "--output", tmp_path).err == ""


@pytest.mark.filterwarnings("ignore:cleaning is 'decoder'")
@pytest.mark.parametrize("way", ["decoder", "tweedie", "none"])
def test_cleaning_is_the_pipelines(run: Run, classes: Path, text: Path, tmp_path: Path, way: Cleaning) -> None:
    for name, model in (("classes", classes), ("text", text)):
        file = tmp_path / f"{name}.png"
        words = ["--cleaning", way, "--seed", 4, "--model", model, "--output", file]
        assert run("generate", *words).code == 0
        pipeline = StarFlowPipeline.from_pretrained(model)
        assert pixels(file) == pipeline(seed=4, cleaning=way).images[0].tobytes()
    fails(run("generate", "--cleaning", "soap"), "--cleaning is 'soap'", "one of decoder, tweedie, denoiser, none")


def test_another_decoder(run: Run, text: Path, tmp_path: Path) -> None:
    """The model's own under another name gives the same picture, another's another."""
    shutil.copytree(text / "autoencoder", tmp_path / "other")
    words = ["a red apple", "--model", text]
    assert run("generate", *words, "--output", tmp_path / "own.png").code == 0
    assert run("generate", *words, "--decoder", tmp_path / "other", "--output", tmp_path / "same.png").code == 0
    assert pixels(tmp_path / "own.png") == pixels(tmp_path / "same.png")
    fails(run("generate", *words, "--decoder", tmp_path), "has no config.json")
    fails(run("generate", *words, "--decoder", text / "flow"), "expected an AutoencoderKL")


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "auto"])
def test_solvers_agree(run: Run, classes: Path, tmp_path: Path, solver: str) -> None:
    path = tmp_path / "one.png"
    assert run("generate", "star", "--solver", solver, "--model", classes, "--output", path).code == 0
    expected = StarFlowPipeline.from_pretrained(classes)("star").images[0].tobytes()
    assert max(abs(x - y) for x, y in zip(pixels(path), expected, strict=True)) <= 2


def test_candidates_and_temperature_reach_the_pipeline(run: Run, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    how = ["--candidates", 3, "--temperature", 0.5]
    assert run("generate", "a red apple", *how, "--model", text, "--output", path).code == 0
    made = StarFlowPipeline.from_pretrained(text)("a red apple", candidates=3, temperature=0.5)
    assert pixels(path) == made.images[0].tobytes()
    assert texts(path).items() >= {"candidates": "3", "temperature": "0.5"}.items()


def test_bfloat16_is_near_float32(run: Run, classes: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    assert run("generate", "star", "--dtype", "bfloat16", "--model", classes, "--output", path).code == 0
    expected = StarFlowPipeline.from_pretrained(classes)("star").images[0].tobytes()
    errors = [abs(x - y) for x, y in zip(pixels(path), expected, strict=True)]
    assert 0 < sum(errors) / len(errors) < 8


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--guidance", "-1"], ["--guidance is -1", "at least 0"]),
        (["--temperature", "0"], ["--temperature is 0", "above 0"]),
        (["--size", "65"], ["--size is '65'", "WIDTHxHEIGHT"]),
        (["--size", "6x8"], ["size 6x8 cannot be made", "multiples of 4 pixels, e.g. 8x8"]),
        (["--size", "0x8"], ["size 0x8 cannot be made"]),
        (["--aspect", "7:3"], ["--aspect is '7:3'", "21:9, 16:9, 3:2"]),
        (["--size", "8x8", "--aspect", "1:1"], ["--size 8x8", "--aspect 1:1", "choose one"]),
        (["--num-images", "0"], ["--num-images is 0", "at least 1"]),
        (["--candidates", "0"], ["--candidates is 0", "at least 1"]),
        (["--batch-size", "-2"], ["--batch-size is -2", "at least 1"]),
        (["--seed", "-1"], ["--seed is -1"]),
        (["star", "--class", "star"], ["PROMPT, --class and --prompts", "choose one"]),
        (["triangle"], ["unknown class 'triangle'"]),
        (["sta"], ["unknown class 'sta'", "did you mean 'star'?"]),
        (["--prompts", "missing.txt"], ["no such file: missing.txt"]),
    ],
)
def test_bad_arguments(run: Run, classes: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    fails(run("generate", *arguments, "--model", classes, "--output", tmp_path / "out"), *parts)
    assert not list(tmp_path.rglob("*.png"))


def test_a_prompts_file_that_is_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n# nothing\n")
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff\xfe")
    fails(run("generate", "--prompts", tmp_path / "empty"), "holds no prompt")
    fails(run("generate", "--prompts", tmp_path / "binary"), "cannot read", "as text")
    fails(run("generate", "--prompts", tmp_path), "cannot read")


def test_a_class_for_a_model_without_classes(run: Run, text: Path, tmp_path: Path) -> None:
    fails(run("generate", "--class", "star", "--model", text, "--output", tmp_path), "no classes", "instead of --class")


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="/proc is Linux's")
def test_a_folder_without_permission(run: Run) -> None:
    fails(run("generate", "--output", "/proc/pictures"), "cannot write to /proc/pictures", "another --output")
    fails(run("generate", "--output", "/proc/one.png"), "cannot write to /proc", "another --output")


def test_output_is_checked_before_the_model_is_loaded(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    fails(run("generate", "--model", "nowhere", "--output", file), f"{file} is a file", "another --output")
    fails(run("generate", "--model", "nowhere", "--output", file / "deeper"), "cannot write to")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "count", "grid", "parts"),
    [
        ("a.png", 2, False, ["one file", "2 pictures", "name a folder"]),
        ("a.png", 1, True, ["a grid as well", "name a folder"]),
        ("a.jpg", 1, False, ["PNG"]),
        ("folder.png", 1, False, ["is a folder"]),
    ],
)
def test_outputs_that_do_not_fit(tmp_path: Path, output: str, count: int, grid: bool, parts: list[str]) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError) as raised:
        OutputTarget.of(str(tmp_path / output), count, grid=grid)
    assert all(part in str(raised.value) for part in parts)


def test_no_such_model(run: Run, tmp_path: Path) -> None:
    fails(run("generate", "--model", "glyphz", "--output", tmp_path), "no model 'glyphz'", "glyphs")
    fails(run("generate", "--model", tmp_path, "--output", tmp_path / "out"), "config.json")


def test_no_such_device(run: Run, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--model", classes, "--output", tmp_path, "--device", "cuda"]
    fails(run("generate", *arguments), "--device is cuda", "it can use", "cpu")


@pytest.fixture
def broken(text: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(text, tmp_path / "model"))


@pytest.mark.parametrize("part", ["flow", "autoencoder"])
def test_a_model_with_a_missing_an_extra_or_half_a_file(run: Run, broken: Path, part: str) -> None:
    weights = broken / part / "model.safetensors"
    tensors, whole = read_tensors(weights), weights.read_bytes()
    (broken / part / "checksums.json").unlink()  # else the other size is what is reported
    name = sorted(tensors)[0]
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    more = {**tensors, "extra.weight": tensors[name].clone()}
    for change, parts in (
        (lambda: write_tensors(weights, fewer), [name, "missing"]),
        (lambda: write_tensors(weights, more), ["extra.weight", "unexpected"]),
        (lambda: weights.write_bytes(whole[:-8]), ["not a whole safetensors file"]),
        (lambda: weights.write_bytes(whole[:4]), ["not a whole safetensors file"]),
        (weights.unlink, ["model.safetensors"]),
    ):
        change()
        fails(run("generate", "--model", broken, "--output", broken.parent / "out"), *parts)


@pytest.mark.parametrize("file", ["config.json", "flow/config.json", "autoencoder/config.json"])
def test_a_model_with_a_damaged_config(run: Run, broken: Path, file: str) -> None:
    config = broken / file
    values = json.loads(config.read_text())
    for content, parts in (
        (json.dumps({**values, "nois_std": 1.0}), ["nois_std"]),
        (json.dumps(values)[:-5], ["config.json"]),
        ("[]", ["config.json"]),
    ):
        config.write_text(content)
        fails(run("generate", "--model", broken, "--output", broken.parent / "out"), *parts)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red apple", "a-red-apple"),
        ("3D render of: a  CAR!", "3d-render-of-a-car"),
        ("../../etc/passwd", "etc-passwd"),
        ("a_b", "a-b"),
        ("été 東京", "été-東京"),
        ("🍎", "red-apple"),
        ("...", ""),
        ("x" * 200, "x" * 60),
    ],
)
def test_file_names_are_readable_and_safe(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_sizes() -> None:
    assert parse_size("64x48") == parse_size(" 64X48 ") == (64, 48)
    for text in ("64", "64x", "x64", "-1x4", "6.5x4", "64x64x3", ""):
        with pytest.raises(UserError, match="WIDTHxHEIGHT"):
            parse_size(text)


def test_files_of_another_setting_are_not_replaced(run: Run, classes: Path, tmp_path: Path) -> None:
    """The same command again writes the same files; another setting takes the next free names."""
    arguments = ("generate", "star", "--num-images", 2, "--grid", "--model", classes, "--output", tmp_path)
    names = ["star-0000.png", "star-0001.png", "grid.png"]
    for _ in range(2):
        assert [Path(line).name for line in run(*arguments).out.splitlines()] == names
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = run(*arguments, "--guidance", 3)
    assert [Path(line).name for line in other.out.splitlines()] == ["star-0000-2.png", "star-0001-2.png", "grid-2.png"]
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    third = run(*arguments, "--guidance", 2)
    assert Path(third.out.splitlines()[0]).name == "star-0000-3.png"
    replaced = run(*arguments, "--guidance", 3, "--overwrite")
    assert [Path(line).name for line in replaced.out.splitlines()] == names
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / "star-0000-2.png").read_bytes()


def test_what_does_not_fit_the_memory_is_refused_before_it_starts(
    run: Run, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "free_bytes", lambda device: 2**20)
    arguments = ("generate", "star", "--model", classes, "--output", tmp_path)
    assert run(*arguments).code == 0
    result = run(*arguments, "--size", "1024x1024")
    assert result.code == 2
    assert "at once of 1024x1024 pixels need about" in result.err.splitlines()[-1]
    assert "or tile" in result.err.splitlines()[-1]
    assert len(list(tmp_path.iterdir())) == 1
