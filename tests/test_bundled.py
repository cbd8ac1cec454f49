"""The model in the box: its size, its papers, and that it draws something."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from starflow import StarFlowPipeline
from starflow.conditioning.text import MINILM_MODULE
from starflow.data.images import from_pil
from starflow.pipeline.folder import BUNDLED, bundled_folder

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_MODULE) is None, reason="the text encoder's package is not installed"
)
LIMIT = 24 * 2**20


@pytest.fixture(scope="module")
def glyphs() -> StarFlowPipeline:
    return StarFlowPipeline.from_pretrained("glyphs")


@pytest.mark.parametrize("name", BUNDLED)
def test_it_is_small_and_comes_with_its_card_and_notice(name: str) -> None:
    folder = bundled_folder(name)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < LIMIT
    card, notice = (folder / "README.md").read_text(), (folder / "NOTICE").read_text()
    for part in ("held-out", "nats", "limits", "Fluent Emoji", "Noto", "Twemoji"):
        assert part.lower() in (card + notice).lower(), part
    assert "<<" not in card, "a number of the card was never filled in"
    assert "Permission is hereby granted" in notice


@needs_encoder
def test_its_pictures_are_no_flat_squares_and_follow_prompt_and_seed(glyphs: StarFlowPipeline) -> None:
    prompts = ["a red apple", "a red apple", "an evergreen tree", ""]
    pictures = torch.cat([from_pil(image) for image in glyphs(prompts, seed=0).images])
    assert pictures.shape == (4, 3, 64, 64)
    assert pictures.flatten(1).std(dim=1).min() > 0.1
    for first in range(4):
        for second in range(first):
            assert (pictures[first] - pictures[second]).abs().mean() > 0.02


@needs_encoder
def test_colours_follow_the_prompt(glyphs: StarFlowPipeline) -> None:
    """Over eight seeds, a red heart is redder than a green one, by far."""

    def redness(prompt: str) -> float:
        pictures = torch.cat([from_pil(image) for image in glyphs(prompt, num_images=8, guidance=2.0).images])
        return float((pictures[:, 0] - pictures[:, 1]).mean())

    assert redness("a red heart") > redness("a green heart") + 0.1


@needs_encoder
def test_a_caption_raises_the_likelihood_of_its_own_picture(glyphs: StarFlowPipeline) -> None:
    made = glyphs(["a yellow heart", "an evergreen tree"], guidance=0.0, seed=3)
    images = torch.cat([from_pil(image) for image in made.images])
    own, _ = glyphs.log_probs(images, made.prompts, [0, 1])
    swapped, dimensions = glyphs.log_probs(images, made.prompts[::-1], [0, 1])
    assert dimensions == glyphs.flow.config.in_channels * 64
    assert float((own - swapped).sum()) > 0


def test_tracked_files_stay_small() -> None:
    root = Path(__file__).parent.parent
    tracked = [path for part in ("src", "tests", "docs", "recipes") for path in (root / part).rglob("*")]
    assert sum(path.stat().st_size for path in tracked if path.is_file()) < 48 * 2**20
