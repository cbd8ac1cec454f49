"""The ways out of the noise see the same latents, and each is what its name says."""

from __future__ import annotations

import pytest
import torch

from experiments import cleaning
from starflow.conditioning import ClassLabels
from starflow.data.images import from_pil
from starflow.data.views import TrainingViews
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.denoise import Denoiser, DenoiserConfig
from starflow.sampling.student import inputs_of
from tests.cli.conftest import CLASSES, random_pipeline


@pytest.fixture
def pipe() -> StarFlowPipeline:
    """A pipeline whose decoder knows no noise, with a denoiser and another decoder."""
    sizes = SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1)
    torch.manual_seed(1)
    plain, for_noise = SmallLatents(SmallAutoencoder(sizes), 0.0), SmallLatents(SmallAutoencoder(sizes), 0.1)
    pipeline = random_pipeline("cleaning", plain, ClassLabels(CLASSES))
    pipeline.denoiser = Denoiser(
        DenoiserConfig(**inputs_of(pipeline.flow), channels=16, layers=(1,), head_dim=16, noise_std=0.1)
    )
    torch.nn.init.normal_(pipeline.denoiser.proj_out.weight)
    pipeline.decoder = for_noise
    return pipeline


def test_every_way_differs_and_leaves_the_pipeline_as_it_was(pipe: StarFlowPipeline) -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    views = TrainingViews(images, ["star"] * 3, ["star"] * 3, ["a", "b", "c"], ["heldout"] * 3)
    noised, condition = cleaning.noised_latents(pipe, views, [0, 2])
    found = {way: cleaning.clean(pipe, noised, condition, way) for way in cleaning.WAYS}
    again = cleaning.clean(pipe, noised, condition, "denoiser")
    assert torch.equal(found["denoiser"], again)
    ways = list(found)
    for number, way in enumerate(ways):
        assert found[way].shape == (2, 3, 8, 8)
        assert all(not torch.allclose(found[way], found[other], atol=1e-3) for other in ways[number + 1 :])
    latents = pipe("star", seed=0, cleaning="none").latents
    assert pipe.decoder is not None
    with torch.no_grad():
        expected = pipe.decoder.decode(latents)
    drawn = from_pil(cleaning.samples(pipe, ["star"], "decoder")[0])
    assert float((drawn - expected).abs().max()) < 0.01


def test_the_table_has_a_row_a_way() -> None:
    one = {"psnr": 20.0, "psnr_error": 0.5, "kid": 1.5, "seconds": 0.01}
    found = {way: {**one, "kid_samples": 30.0} for way in cleaning.WAYS} | {cleaning.CLEAN: one}
    heads, *rows = cleaning.table(found)
    assert rows[1] == ["Tweedie step", "20.00 ± 0.50", "1.5", "30.0", "10"]
    assert rows[4] == ["clean latents, for comparison", "20.00 ± 0.50", "1.5", "", "10"]
    assert len(heads) == len(rows[0])
    assert len(rows) == 5


def test_clean_latents_and_noised_ones_differ_by_the_flows_noise(pipe: StarFlowPipeline) -> None:
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    views = TrainingViews(images, ["star"] * 40, ["star"] * 40, [f"{i}" for i in range(40)], ["heldout"] * 40)
    rows = list(range(40))
    (noised, _), (plain, _) = (cleaning.noised_latents(pipe, views, rows, noise=noise) for noise in (True, False))
    assert float((noised - plain).std()) == pytest.approx(0.1, rel=0.1)
    with torch.no_grad():
        expected = pipe.autoencoder.decode(plain)
    assert torch.allclose(cleaning.clean(pipe, plain, None, cleaning.CLEAN), expected)
