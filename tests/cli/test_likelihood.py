"""`starflow likelihood`: rows that the pipeline's log_prob gives, and every bad input."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from PIL import Image, ImageOps

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
    result = run("likelihood", *pictures, "--prompt", "a red apple", "--seed", 3, "--model", text)
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
        json.loads(run("likelihood", pictures[0], "--seed", seed, "--model", text, "--json").out) for seed in (3, 4, 5)
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
        ([good, words], ["words.png", "no known image format"]),
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
