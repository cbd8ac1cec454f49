"""dB in closed form, and noise of the asked size between encoding and decoding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from starflow.errors import UserError
from starflow.evaluate import FeatureExtractor, samples
from starflow.evaluate.samples import measure_reconstruction, noisy_reconstruction, psnr, reconstruct
from starflow.latents import PixelLatents
from starflow.sampling.sampler import noise_from_seeds
from tests.cli.conftest import random_pipeline


def test_psnr_in_closed_form() -> None:
    """An error of e everywhere, the range being 2 wide, is 20 log10(2 / e) dB."""
    zeros = torch.zeros(3, 3, 4, 4)
    errors = torch.tensor([0.2, 0.02, 1.0]).view(3, 1, 1, 1)
    expected = [20 * math.log10(2 / error) for error in (0.2, 0.02, 1.0)]
    assert psnr(zeros + errors, zeros).tolist() == pytest.approx(expected, abs=1e-5)


def test_what_leaves_the_range_is_clamped() -> None:
    ones = torch.ones(1, 3, 4, 4)
    assert psnr(ones * 7, ones).tolist() == [100.0]
    with pytest.raises(UserError, match="expected equal ones"):
        psnr(ones, ones[:, :, :2])


def test_the_mean_is_over_pictures_not_batches() -> None:
    pictures = torch.zeros(3, 3, 2, 2)
    errors = torch.tensor([0.2, 0.02, 0.02]).view(3, 1, 1, 1)
    batches = [(pictures + errors)[:1], (pictures + errors)[1:]]
    found = measure_reconstruction(batches, torch.zeros_like)
    assert found.psnr == pytest.approx((20 + 40 + 40) / 3, abs=1e-5)
    assert found.count == 3
    with pytest.raises(UserError, match="no pictures"):
        measure_reconstruction([], torch.zeros_like)


def test_noise_of_the_asked_size_reaches_the_decoder() -> None:
    """Latents 2x, decoded by /2: noise s on them is s / 2 on pictures, so 20 log10(4 / s) dB."""
    batches = torch.zeros(8, 3, 32, 32).split(4)
    for std in (0.1, 0.3):
        noisy = noisy_reconstruction(lambda x: x * 2, lambda z: z / 2, std, torch.Generator().manual_seed(0))
        assert measure_reconstruction(batches, noisy).psnr == pytest.approx(20 * math.log10(4 / std), abs=0.1)
    clean = noisy_reconstruction(lambda x: x * 2, lambda z: z / 2, 0.0, torch.Generator())
    assert measure_reconstruction(batches, clean).psnr == 100.0


def test_one_seed_one_result_and_each_batch_its_own_noise() -> None:
    def once() -> torch.Tensor:
        noisy = noisy_reconstruction(lambda x: x, lambda z: z, 0.5, torch.Generator().manual_seed(7))
        return torch.stack([noisy(torch.zeros(2, 3, 4, 4)) for _ in range(2)])

    assert torch.equal(once(), once())
    assert not torch.equal(*once())


def test_reconstructions_have_the_noise_of_their_rows() -> None:
    """Pixels are their own latents, so what is left of a grey image is the noise of its row's seed."""
    pipeline = random_pipeline("pixels", PixelLatents(), None)
    images = torch.full((5, 3, 8, 8), 128, dtype=torch.uint8)
    found = reconstruct(pipeline, images, [4, 1], 0.25) - reconstruct(pipeline, images, [4, 1], 0.0)
    torch.testing.assert_close(found, 0.25 * noise_from_seeds([4, 1], (3, 8, 8)), rtol=0, atol=1e-6)
    torch.testing.assert_close(reconstruct(pipeline, images, [0], 0.0), torch.full((1, 3, 8, 8), 128 / 127.5 - 1))


def test_a_process_without_rows_has_no_features_and_keeps_their_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are fewer images than processes; it takes part in the exchange like any other."""
    extractor = FeatureExtractor("means", Means())
    monkeypatch.setattr(samples, "own_rows", lambda count: range(count, count))
    monkeypatch.setattr(samples, "gather_rows", lambda rows, count: rows)
    found = samples.gathered_features(extractor, iter(()), 3, torch.zeros(1, 3, 4, 4))
    assert found.features.shape == (0, 3)
    monkeypatch.setattr(samples, "own_rows", range)
    found = samples.gathered_features(extractor, [torch.ones(2, 3, 4, 4)], 2, torch.zeros(1, 3, 4, 4))
    assert found.features.tolist() == [[1.0] * 3] * 2


class Means(nn.Module):
    """Features (B, 3) that are the means of the channels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))
