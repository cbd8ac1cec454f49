"""The ways out of the noise: each is what it says, and the model's own is the default."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from starflow.conditioning import ClassLabels
from starflow.data.images import from_pil, to_pil
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.pipeline.config import Cleaning
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.denoise import denoise
from tests.cli.conftest import CLASSES, random_pipeline


def small() -> StarFlowPipeline:
    torch.manual_seed(0)
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1))
    return random_pipeline("small", SmallLatents(network, 0.1), ClassLabels(CLASSES))


def pixels() -> StarFlowPipeline:
    return random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))


@pytest.mark.filterwarnings("ignore:cleaning is 'decoder'")
@pytest.mark.parametrize("make", [small, pixels])
def test_each_way_is_what_it_says(make: object) -> None:
    pipe: StarFlowPipeline = make()  # type: ignore[operator]
    ways: tuple[Cleaning, ...] = ("decoder", "tweedie", "none")
    made = {way: pipe("star", seed=1, cleaning=way) for way in ways}
    latents = made["none"].latents
    condition = pipe.conditioner.encode(["star"]) if pipe.conditioner else None
    cleaned = denoise(pipe.flow, latents, condition, sigma=pipe.config.noise_std)
    expected = {way: cleaned if way == "tweedie" else latents for way in ways}
    for way, found in made.items():
        assert torch.equal(found.latents, latents)  # what the flow drew, before any cleaning
        picture = to_pil(pipe.autoencoder.decode(expected[way]).detach())[0]
        assert torch.equal(from_pil(found.images[0]), from_pil(picture)), way


@pytest.mark.parametrize(("make", "own"), [(small, "decoder"), (pixels, "tweedie")])
def test_the_models_own_way_is_the_default(make: object, own: Cleaning) -> None:
    pipe: StarFlowPipeline = make()  # type: ignore[operator]
    assert pipe.config.cleaning == own
    default, named = (pipe("star", seed=1, cleaning=way).images[0] for way in (None, own))
    assert torch.equal(from_pil(default), from_pil(named))


def test_ways_that_cannot_be() -> None:
    """A decoder that was not trained for noise leaves it, and without Gaussian noise there is no Tweedie step."""
    pipe = pixels()
    with pytest.warns(UserWarning, match="the decoder was not trained for noise: it stays"):
        pipe("star", cleaning="decoder")
    uniform = random_pipeline("uniform", PixelLatents(), ClassLabels(CLASSES))
    uniform.config = dataclasses.replace(uniform.config, noise="uniform", noise_std=0.0, cleaning="none")
    with pytest.raises(UserError, match="cleaning is 'tweedie', but 'uniform' was trained without Gaussian noise: use"):
        uniform("star", cleaning="tweedie")
