"""Exact likelihoods of 8-bit pixels by the pipeline, against the closed form of an identity flow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.latents import PixelLatents
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.likelihood import LogProb
from starflow.pipeline.pipeline import StarFlowPipeline


class TestEightBitPixels:
    """Uniform dequantisation: log-probabilities of pictures of levels, and the closed form of an identity flow."""

    @staticmethod
    def pipeline() -> StarFlowPipeline:
        config = STARFlowConfig(
            in_channels=1, img_size=8, patch_size=4, channels=16, num_blocks=2, layers_per_block=1, head_dim=16
        )
        autoencoder = PixelLatents(1)
        settings = PipelineConfig(
            name="grey", image_size=8, noise_std=0.0, autoencoder=autoencoder.spec, cleaning="none", noise="uniform"
        )
        return StarFlowPipeline(STARFlow(config), autoencoder, None, settings)

    def test_an_identity_flow_has_the_closed_form(self) -> None:
        """Mean over u of log N((level + u) / 128 - 1; 0, 1), plus log(1 / 128) a dimension."""
        image = Image.new("L", (8, 8), 192)
        found = self.pipeline().log_prob(image, seed=5, draws=400)
        low, high = 192 / 128 - 1, 193 / 128 - 1
        square = (high**3 - low**3) / 3 * 128  # the mean of y^2 over the level
        nats = 64 * (-0.5 * (square + math.log(2 * math.pi)) - math.log(128))
        assert found.standard_error is not None
        assert found.nats == pytest.approx(nats, abs=5 * found.standard_error)
        assert found.bits_per_dim == pytest.approx(-found.nats / (64 * math.log(2)))
        assert (found.space, found.dimensions, found.draws) == ("8-bit pixels", 64, 400)

    def test_probabilities_of_all_levels_add_up_to_less_than_one(self) -> None:
        """The bound is under log P, and P over the 256 levels of a pixel is under 1."""
        pipeline = self.pipeline()
        total = 0.0
        for level in range(256):
            total += math.exp(pipeline.log_prob(Image.new("L", (8, 8), level), seed=level).nats / 64)
        inside = float(torch.special.erf(torch.tensor(1 / 2**0.5)))
        assert total == pytest.approx(inside, abs=1e-3)  # the Gaussian's mass in [-1, 1]

    def test_maps_add_up_too(self) -> None:
        pipeline = self.pipeline()
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        nats, _ = pipeline.log_probs(images, ["", ""], [1, 2])
        maps = pipeline.log_prob_maps(images, ["", ""], [1, 2])
        assert maps.shape == (2, 2, 2)
        torch.testing.assert_close(maps.sum((1, 2)), nats)

    def test_it_survives_a_folder(self, tmp_path: Path) -> None:
        self.pipeline().save_pretrained(tmp_path)
        again = StarFlowPipeline.from_pretrained(tmp_path)
        image = Image.new("L", (8, 8), 77)
        assert again.log_prob(image, seed=1) == self.pipeline().log_prob(image, seed=1)
        made = again(num_images=1).images[0]
        assert len(set(made.getpixel((0, 0)))) == 1  # type: ignore[arg-type]  # grey


def test_a_difference_is_of_as_many_draws() -> None:
    found = LogProb.mean_of(torch.tensor([-61.0, -67.0]), dimensions=64, space="noised latent")
    with pytest.raises(UserError, match="1 values beside 2 draws"):
        found.minus([-63.0])
