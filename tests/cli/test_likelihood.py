"""`starflow likelihood`: rows that the pipeline's log_prob gives, and every bad input."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from starflow.io import weights
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import Run, fails


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two pictures of the models' size."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, colour in zip(paths, ("red", "navy"), strict=True):
        image = Image.new("RGB", (8, 8), "white")
        image.paste(colour, (2, 2, 6, 6))
        image.save(path)
    return paths


def rows(result: str) -> list[list[str]]:
    """The cells of a printed table, which two blanks or more set apart."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.splitlines()]


def test_one_row_a_picture(run: Run, text: Path, pictures: list[Path]) -> None:
    result = run("likelihood", *pictures, "--prompt", "a red apple", "--seed", 3, "--draws", 1, "--model", text)
    head, *found = rows(result.out)
    assert result.code == 0
    assert head == ["nats", "bits/dim", "dimensions", "of", "image", "prompt"]
    pipeline = StarFlowPipeline.from_pretrained(text)
    for row, path in zip(found, pictures, strict=True):
        with Image.open(path) as image:
            expected = pipeline.log_prob(image, "a red apple", seed=3)
        assert float(row[0]) == pytest.approx(expected.nats, abs=1e-3)
        assert float(row[1]) == pytest.approx(expected.bits_per_dim, abs=1e-4)
        assert row[2:] == [str(4 * 4 * 4), "noised latent", str(path), "a red apple"]


def test_a_prompt_a_picture_and_json(run: Run, classes: Path, pictures: list[Path]) -> None:
    prompts = ["--prompt", "star", "--prompt", "circle"]
    result = run("likelihood", *pictures, *prompts, "--model", classes, "--json")
    found = json.loads(result.out)
    assert [(row["image"], row["prompt"]) for row in found] == list(
        zip(map(str, pictures), ("star", "circle"), strict=True)
    )
    assert {(row["dimensions"], row["space"]) for row in found} == {(3 * 8 * 8, "noised pixels")}
    alone = json.loads(run("likelihood", pictures[1], "--prompt", "circle", "--model", classes, "--json").out)
    assert alone == found[1:]


def test_several_draws_have_an_error(run: Run, text: Path, pictures: list[Path]) -> None:
    options = ("--seed", 3, "--model", text)
    several = run("likelihood", pictures[0], "--draws", 3, *options, "--json")
    (found,) = json.loads(several.out)
    each = [
        json.loads(run("likelihood", pictures[0], "--seed", seed, "--draws", 1, "--model", text, "--json").out)
        for seed in (3, 4, 5)
    ]
    nats = [row["nats"] for (row,) in each]
    assert found["nats"] == pytest.approx(statistics.mean(nats))
    assert found["standard_error"] == pytest.approx(statistics.stdev(nats) / 3**0.5)
    assert each[0][0]["standard_error"] is None
    head, row = rows(run("likelihood", pictures[0], "--draws", 3, *options).out)
    assert head[:3] == ["nats", "± of the draws", "bits/dim"]
    assert float(row[1]) == pytest.approx(found["standard_error"], abs=1e-3)


def test_maps_are_on_one_scale(run: Run, classes: Path, pictures: list[Path], tmp_path: Path) -> None:
    result = run("likelihood", *pictures, "--model", classes, "--maps", tmp_path / "maps", "--json")
    assert result.code == 0, result.err
    found = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in found] == ["000-a.png", "001-b.png"]
    texts = []
    for path in found:
        with Image.open(path) as image:
            assert image.size == (8, 8)
            texts.append(image.text)  # type: ignore[attr-defined]
    assert texts[0] == texts[1]
    ends = [float(texts[0][end].split()[0]) for end in ("low", "high")]
    means = [row["bits_per_dim"] for row in json.loads(result.out)]
    assert ends[0] < min(means) <= max(means) < ends[1]


def test_another_size_is_resized_with_a_note(run: Run, classes: Path, tmp_path: Path) -> None:
    small, tall = tmp_path / "small.png", tmp_path / "tall.png"
    Image.new("RGB", (8, 8), "red").save(small)
    ImageOps.expand(Image.new("RGB", (32, 96), "red"), (0, 16), "white").save(tall)
    result = run("likelihood", tall, "--model", classes, "--json")
    assert result.err.splitlines()[0] == f"note: {tall} is 32x128: resized to 8x8, its centre"
    same = run("likelihood", small, "--model", classes, "--json")
    assert same.err == ""
    assert json.loads(result.out)[0]["nats"] == json.loads(same.out)[0]["nats"]


def test_a_size_of_choice(run: Run, classes: Path, pictures: list[Path]) -> None:
    result = run("likelihood", pictures[0], "--size", "12x4", "--model", classes, "--json")
    assert json.loads(result.out)[0]["dimensions"] == 3 * 12 * 4


def test_transparency_is_laid_on_white(run: Run, classes: Path, pictures: list[Path], tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8))
    clear.paste((255, 0, 0, 255), (2, 2, 6, 6))
    clear.save(tmp_path / "clear.png")
    found = json.loads(run("likelihood", pictures[0], tmp_path / "clear.png", "--model", classes, "--json").out)
    assert found[0]["nats"] == found[1]["nats"]


def test_bad_input(run: Run, classes: Path, pictures: list[Path], tmp_path: Path) -> None:
    words, half = tmp_path / "words.png", tmp_path / "half.png"
    words.write_text("no picture")
    half.write_bytes(pictures[0].read_bytes()[:50])
    good = pictures[0]
    for arguments, parts in (
        ([good, tmp_path / "missing.png"], ["missing.png", "no such file"]),
        ([words], ["words.png", "no known image format"]),
        ([half], ["half.png", "not a readable image"]),
        ([tmp_path], [str(tmp_path), "not a readable image"]),
        ([good, "--prompt", "star", "--prompt", "circle"], ["2 prompts for 1 pictures", "one for all"]),
        ([good, "--size", "6x8"], ["6x8", "multiple"]),
        ([good, "--size", "big"], ["--size is 'big'"]),
        ([good, "--prompt", "triangle"], ["unknown class 'triangle'"]),
        ([good, "--seed", "-1"], ["--seed is -1"]),
        ([good, "--draws", "0"], ["--draws is 0", "at least 1"]),
        ([good, "--maps", words], ["is a file, expected a folder"]),
        ([good, "--model", "nowhere"], ["no model 'nowhere'"]),
    ):
        fails(run("likelihood", "--model", classes, *arguments), *parts)


def test_a_broken_picture_among_others_is_named_and_skipped(run: Run, classes: Path, pictures: list[Path]) -> None:
    words = pictures[0].with_name("words.png")
    words.write_text("no picture")
    result = run("likelihood", words, *pictures, "--model", classes, "--json")
    assert result.code == 0
    assert [row["image"] for row in json.loads(result.out)] == list(map(str, pictures))
    assert result.err.startswith(f"skipped: {words} is not a readable image")
    none = run("likelihood", words, words, "--model", classes, "--json")
    assert (none.code, none.out) == (2, "")
    assert "not one of 2 pictures" in none.err.splitlines()[-1]


def test_pictures_are_compared_under_the_same_noise(run: Run, text: Path, pictures: list[Path]) -> None:
    result = run("likelihood", *pictures, "--draws", 4, "--model", text, "--json")
    pipeline = StarFlowPipeline.from_pretrained(text)
    first, second = ([pipeline.log_prob(str(path), seed=seed).nats for seed in range(4)] for path in pictures)
    paired = [later - earlier for earlier, later in zip(first, second, strict=True)]
    mean, error = statistics.mean(paired), statistics.stdev(paired) / 2
    assert f"note: {pictures[1]} less {pictures[0]}: {mean:+.3f} nats ± {error:.3f}" in result.err.splitlines()
    head, *_ = rows(run("likelihood", *pictures, "--model", text).out)
    assert "± of the draws" in head, "several draws are the default"


def test_a_size_that_was_not_trained_is_warned_of(run: Run, classes: Path, pictures: list[Path]) -> None:
    result = run("likelihood", pictures[0], "--size", "16x8", "--model", classes, "--draws", 1)
    assert "was trained at 8x8 pixels, not at 16x8" in result.err


def test_a_density_that_is_no_number_is_named_and_not_printed(
    run: Run, classes: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """The same model draws nothing either."""
    broken = shutil.copytree(classes, tmp_path / "broken")
    tensors = weights.read(broken / "flow")
    tensors["blocks.1.proj_out.bias"] = tensors["blocks.1.proj_out.bias"] * math.nan
    weights.write(broken / "flow", tensors.items())
    out = tmp_path / "out"
    for arguments in (("likelihood", pictures[0], "--json"), ("generate", "star", "--output", out)):
        result = run(*arguments, "--model", broken)
        fails(result, "from block 1 on: the weights 'blocks.1.proj_out.bias' are not finite")
        assert not result.out
    assert not list(out.iterdir())
