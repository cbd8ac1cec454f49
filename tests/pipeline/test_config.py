"""Sizes and ratios: what cannot be made, what was trained, and what a model of several ratios is told."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starflow.conditioning import ClassLabels
from starflow.data.buckets import ASPECTS, Aspect, aspect_ratio, aspect_size
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.latents import AutoencoderSpec, PixelLatents
from starflow.pipeline import config
from starflow.pipeline.config import PipelineConfig
from starflow.pipeline.inputs import add_aspect_ratio
from tests.cli.conftest import CLASSES, random_pipeline

FLOW = STARFlowConfig(4, 32, 64, num_blocks=2, layers_per_block=1, txt_size=8, txt_dim=4)
"""Latents of 256 px by a factor of 8."""
SQUARE = PipelineConfig("square", 256, 0.3, AutoencoderSpec("diffusers_kl", 4, 8))
NINE = dataclasses.replace(SQUARE, name="nine", aspects=ASPECTS)


@given(width=st.integers(0, 600), height=st.integers(0, 600))
def test_a_size_is_made_or_refused_with_one_that_is(width: int, height: int) -> None:
    if width % 8 == 0 < width and height % 8 == 0 < height:
        config.check_size(SQUARE, FLOW, (width, height))
        return
    with pytest.raises(UserError, match=rf"size {width}x{height} cannot be made: both .* of 8 pixels, e.g. ") as raised:
        config.check_size(SQUARE, FLOW, (width, height))
    near = str(raised.value).rsplit(" ", 1)[1].split("x")
    config.check_size(SQUARE, FLOW, (int(near[0]), int(near[1])))


@pytest.mark.parametrize("flow", [dataclasses.replace(FLOW, rope=False), TarFlowConfig(4, 32, 1, 64, 2, 1)])
def test_learned_positions_are_for_one_size(flow: STARFlowConfig | TarFlowConfig) -> None:
    config.check_size(SQUARE, flow, (256, 256))
    with pytest.raises(UserError, match="'square' has learned positions, which are for 256x256 alone; leave the size"):
        config.check_size(SQUARE, flow, (512, 512))


def test_a_size_that_was_not_trained_is_said() -> None:
    assert config.untrained_size_warning(SQUARE, FLOW, (256, 256)) == ""
    said = config.untrained_size_warning(SQUARE, FLOW, (512, 512))
    assert said == (
        "'square' was trained at 256x256 pixels, not at 512x512: positions are rescaled, and pictures may be worse"
    )
    assert "256x256 pixels in 9 ratios, not at 512x512" in config.untrained_size_warning(NINE, FLOW, (512, 512))


def test_a_model_of_one_ratio_makes_that_one_and_its_captions_name_none() -> None:
    wide = dataclasses.replace(SQUARE, name="wide", aspects=("16:9",))
    size = config.default_size(wide, FLOW)
    assert size == aspect_size("16:9", 256, 8) != (256, 256)
    assert config.latent_shape(wide, FLOW) == (4, size[1] // 8, size[0] // 8)
    assert config.untrained_size_warning(wide, FLOW, size) == ""
    assert f"trained at {size[0]}x{size[1]} pixels, not at 256x256" in config.untrained_size_warning(
        wide, FLOW, (256, 256)
    )
    assert add_aspect_ratio(["a cat"], wide, config.latent_shape(wide, FLOW)) == ["a cat"]
    assert config.default_size(NINE, FLOW) == (256, 256)
    assert "trained at 344x192 pixels, not at 256x256" in config.untrained_size_warning(wide, FLOW, (256, 256))
    odd = dataclasses.replace(NINE, image_size=250)  # of several ratios: each is rounded to what can be made
    assert config.default_size(odd, FLOW) == (248, 248)
    assert all(config.untrained_size_warning(odd, FLOW, size) == "" for size in config.trained_sizes(odd, FLOW))


@pytest.mark.parametrize("aspect", ASPECTS)
def test_the_nine_ratios_have_one_area_and_are_trained(aspect: Aspect) -> None:
    width, height = aspect_size(aspect, 256, 8)
    assert (width % 8, height % 8) == (0, 0)
    assert width * height == pytest.approx(256**2, rel=0.06)
    assert math.log(width / height) == pytest.approx(math.log(aspect_ratio(aspect)), abs=0.06)
    assert config.untrained_size_warning(NINE, FLOW, (width, height)) == ""
    assert bool(config.untrained_size_warning(SQUARE, FLOW, (width, height))) is (aspect != "1:1")
    shape = (4, height // 8, width // 8)
    assert add_aspect_ratio(["a cat", ""], NINE, shape) == [f"a cat\n in a {aspect} aspect ratio.\n", ""]
    assert add_aspect_ratio(["a cat", ""], SQUARE, shape) == ["a cat", ""]


def test_the_pipeline_says_so_once_a_call() -> None:
    pipeline = random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))
    with pytest.warns(UserWarning, match="'pixels' was trained at 8x8 pixels, not at 12x8") as caught:
        assert pipeline("star", num_images=3, size=(12, 8), batch_size=1).images[0].size == (12, 8)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("star", size=(8, 8))
        pipeline("star")
