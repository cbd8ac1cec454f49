"""What is not finite is named: which picture, from which block on, and where it came from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from starflow import sample
from starflow.conditioning import ClassLabels
from starflow.data.images import to_pil
from starflow.errors import UserError
from starflow.latents import PixelLatents
from starflow.pipeline.pipeline import StarFlowPipeline
from tests.cli.conftest import CLASSES, random_pipeline


def pipeline() -> StarFlowPipeline:
    return random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))


@pytest.mark.parametrize("block", [0, 1])
def test_broken_weights_are_named_with_the_block(block: int) -> None:
    pipe = pipeline()
    bias = list(pipe.flow.iter_blocks())[block].proj_out.bias
    assert bias is not None
    bias.data[0] = math.nan
    named = rf"'blocks\.{block}\.proj_out\.bias' are not finite"
    image = to_pil(torch.zeros(1, 3, 8, 8))[0]
    calls: list[Any] = [
        lambda: pipe("star"),
        lambda: pipe.log_prob(image, "star"),
        lambda: pipe.encode(image, "star"),
        lambda: pipe.decode(torch.zeros(1, 3, 8, 8), "star"),
    ]
    for call in calls:
        with pytest.raises(UserError, match=rf"from block {block} on: the weights {named}"):
            call()


def test_a_broken_picture_of_a_batch_is_named_and_the_others_are_not() -> None:
    pipe = pipeline()
    z, condition = torch.zeros(3, 3, 8, 8), pipe._condition(["star"] * 3)[0]
    assert condition is not None
    z[1, 0, 2, 2] = math.nan
    with pytest.raises(UserError, match=r"^picture 1 of 3 came out not finite from block 1 on: the noise of picture 1"):
        sample(pipe.flow, z, condition)
    condition[2] = math.inf
    with pytest.raises(UserError, match=r"^picture 2 of 3 .* the condition of picture 2 is not finite$"):
        sample(pipe.flow, torch.zeros(3, 3, 8, 8), condition)


def test_an_endless_guidance_is_named() -> None:
    with pytest.raises(UserError, match=r"not finite from block \d on: guidance is 1e\+30, lower it"):
        pipeline()("star", guidance=1e30, cleaning="none")


def test_a_candidate_that_is_not_finite_is_not_kept() -> None:
    """Only where all of a picture's are broken is there nothing to give."""
    assert pipeline()("star", candidates=3).latents.isfinite().all()


def test_a_broken_autoencoder_is_named() -> None:
    class Broken(PixelLatents):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return super().decode(latents) * math.nan

    pipe = pipeline()
    pipe.autoencoder = Broken()
    with pytest.raises(UserError, match="picture 0 was decoded to values that are not finite"):
        pipe("star")
