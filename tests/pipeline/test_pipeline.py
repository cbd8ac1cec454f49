"""The pipeline: one seed a picture, exact encodings, honest densities, and the way to disk and back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from starflow.conditioning import ClassLabels
from starflow.data.images import from_pil, to_pil
from starflow.errors import UserError
from starflow.flow.config import TarFlowConfig
from starflow.flow.model import TarFlow
from starflow.latents import PixelLatents
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.pipeline.config import PipelineConfig, latent_shape
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.sampling.sampler import candidate_noise, noise_from_seeds, sample
from tests.cli.conftest import CLASSES, random_pipeline


@pytest.fixture(scope="module")
def pixels() -> StarFlowPipeline:
    return random_pipeline("pixels", PixelLatents(), ClassLabels(CLASSES))


@pytest.fixture(scope="module")
def small() -> StarFlowPipeline:
    torch.manual_seed(0)
    network = SmallAutoencoder(SmallAutoencoderConfig(channels=4, widths=(8,), encoder_pairs=1, decoder_pairs=1))
    return random_pipeline("small", SmallLatents(network, 0.2), ClassLabels(CLASSES))


@pytest.fixture(scope="module")
def tarflow() -> StarFlowPipeline:
    torch.manual_seed(0)
    flow = TarFlow(TarFlowConfig(3, 8, 4, 64, 2, 1, num_classes=3))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    labels = ClassLabels(CLASSES)
    return StarFlowPipeline(
        flow, PixelLatents(), labels, PipelineConfig("tarflow", 8, 0.1, PixelLatents().spec, labels.spec, 1.0)
    )


def test_a_picture_depends_on_its_prompt_and_seed_alone(pixels: StarFlowPipeline) -> None:
    prompts = ["circle", "square", "star", ""]
    together = pixels(prompts, num_images=2, seed=5).latents
    in_threes = pixels(prompts, num_images=2, seed=5, batch_size=3).latents
    torch.testing.assert_close(together, in_threes, rtol=0, atol=1e-4 * float(together.abs().max()))
    alone = pixels("star", seed=5 + 5).latents
    torch.testing.assert_close(together[5:6], alone, rtol=0, atol=1e-4 * float(together.abs().max()))


def test_a_batch_may_hold_different_prompts_weights_and_seeds(pixels: StarFlowPipeline) -> None:
    prompts, weights = ["circle", "square", "star", "circle"], [0.0, 1.0, 3.0, 2.5]
    together = pixels(prompts, guidance=weights, seed=3)
    in_threes = pixels(prompts, guidance=torch.tensor(weights), seed=3, batch_size=3)
    for index, (prompt, weight) in enumerate(zip(prompts, weights, strict=True)):
        alone = pixels(prompt, guidance=weight, seed=3 + index).latents[0]
        for batch in (together, in_threes):
            torch.testing.assert_close(batch.latents[index], alone, rtol=1e-4, atol=1e-4)
    other = pixels(prompts, guidance=weights[::-1], seed=3).latents
    assert all(not torch.allclose(one, two, atol=1e-3) for one, two in zip(together.latents, other, strict=True))


def test_seeds_and_prompts_are_reported_in_order(pixels: StarFlowPipeline) -> None:
    made = pixels(["circle", "star"], num_images=2, seed=7)
    assert made.prompts == ["circle", "circle", "star", "star"]
    assert made.seeds == [7, 8, 9, 10]
    assert [image.size for image in made.images] == [(8, 8)] * 4


def test_temperature_scales_the_noise(pixels: StarFlowPipeline) -> None:
    z = 0.5 * noise_from_seeds([3], latent_shape(pixels.config, pixels.flow.config))
    condition, _ = pixels._condition(["star"])
    cool = pixels("star", guidance=0.0, temperature=0.5, seed=3).latents
    assert torch.equal(cool, sample(pixels.flow, z, condition))
    own = dataclasses.replace(pixels.config, temperature=0.5)
    default = StarFlowPipeline(pixels.flow, pixels.autoencoder, pixels.conditioner, own)
    assert torch.equal(cool, default("star", guidance=0.0, seed=3).latents)
    with pytest.raises(UserError, match="temperature is -1.0, expected above 0"):
        pixels("star", temperature=-1.0)


def test_of_several_candidates_the_likeliest_is_kept(pixels: StarFlowPipeline) -> None:
    prompts = ["circle", "star", ""]
    kept = pixels(prompts, candidates=4, seed=3, batch_size=5).latents
    condition, null = pixels._condition(prompts)
    assert condition is not None
    assert null is not None
    for index, noise in enumerate(candidate_noise([3, 4, 5], latent_shape(pixels.config, pixels.flow.config), 4)):
        given, none = (tensor[index : index + 1].expand(4, -1, -1) for tensor in (condition, null))
        drawn = sample(pixels.flow, noise, given, none, pixels.config.guidance)
        best = pixels.flow.log_prob(drawn, given).argmax()
        torch.testing.assert_close(kept[index], drawn[best], rtol=0, atol=1e-4)
    own = dataclasses.replace(pixels.config, candidates=4)
    default = StarFlowPipeline(pixels.flow, pixels.autoencoder, pixels.conditioner, own)
    again = default(prompts, seed=3).latents
    torch.testing.assert_close(kept, again, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="candidates is 0, expected at least 1"):
        pixels("star", candidates=0)


def test_guidance_and_prompt_change_the_picture_and_the_seed_fixes_it(pixels: StarFlowPipeline) -> None:
    plain = pixels("circle", guidance=0.0, seed=1).latents
    assert torch.equal(plain, pixels("circle", guidance=0.0, seed=1).latents)
    for other in (pixels("circle", guidance=2.0, seed=1), pixels("star", guidance=0.0, seed=1)):
        assert not torch.allclose(plain, other.latents, atol=1e-3)


@pytest.mark.parametrize("name", ["pixels", "small", "tarflow"])
def test_disk_there_and_back(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pipeline: StarFlowPipeline = request.getfixturevalue(name)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = StarFlowPipeline.from_pretrained(tmp_path / "model")
    assert type(loaded.flow) is type(pipeline.flow)
    before, after = (one("star", seed=2) for one in (pipeline, loaded))
    torch.testing.assert_close(after.latents, before.latents, rtol=0, atol=1e-5)  # products round by where tensors lie
    assert (from_pil(before.images[0]) - from_pil(after.images[0])).abs().max() <= 2 / 127.5
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


def test_a_moved_folder_still_loads(small: StarFlowPipeline, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "here", torch.float16)
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = StarFlowPipeline.from_pretrained(tmp_path / "there")
    assert next(loaded.flow.parameters()).dtype == torch.float32  # computed in float32, stored in half of it
    assert (loaded("star").latents - small("star").latents).abs().max() < 0.05


@pytest.mark.parametrize("name", ["pixels", "small", "tarflow"])
def test_decode_inverts_encode_on_latents(name: str, request: pytest.FixtureRequest) -> None:
    pipeline: StarFlowPipeline = request.getfixturevalue(name)
    image = to_pil(torch.rand(1, 3, 8, 8) * 2 - 1)[0]
    decoded = pipeline.decode(pipeline.encode(image, "circle"), "circle")
    assert not isinstance(decoded, list)
    reconstructed = to_pil(pipeline.autoencoder.decode(pipeline.autoencoder.encode(from_pil(image))))[0]
    difference = from_pil(decoded) - from_pil(reconstructed)
    assert difference.abs().max() <= 2 / 127.5  # one step of rounding to eight bits


def test_log_prob_is_the_flows_density_of_the_noised_latent(small: StarFlowPipeline) -> None:
    image = to_pil(torch.rand(1, 3, 8, 8) * 2 - 1)[0]
    found = small.log_prob(image, "star", seed=3)
    latents = small.autoencoder.encode(from_pil(image))
    noised = latents + 0.1 * noise_from_seeds([3], tuple(latents.shape[1:]))
    assert small.conditioner is not None
    expected = float(small.flow.log_prob(noised, small.conditioner.encode(["star"])))
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.dimensions == 4 * 4 * 4
    assert found.bits_per_dim == pytest.approx(-expected / (64 * math.log(2)), rel=1e-5)
    assert found.space == "noised latent"
    assert small.log_prob(image, "star", seed=4).nats != found.nats


def test_pixels_are_called_pixels(pixels: StarFlowPipeline) -> None:
    image = to_pil(torch.zeros(1, 3, 8, 8))[0]
    assert pixels.log_prob(image, "circle").space == "noised pixels"


def test_no_class_is_the_null_label_of_a_tarflow(tarflow: StarFlowPipeline) -> None:
    image = to_pil(torch.zeros(1, 3, 8, 8))[0]
    latents = from_pil(image) + 0.1 * noise_from_seeds([0], (3, 8, 8))
    assert tarflow.log_prob(image).nats == pytest.approx(float(tarflow.flow.log_prob(latents, None)), rel=1e-5)


def test_other_sizes_by_rescaled_positions(pixels: StarFlowPipeline) -> None:
    assert pixels("star", size=(12, 8)).images[0].size == (12, 8)


def test_progress_counts_up_to_the_whole(pixels: StarFlowPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pixels("star", num_images=3, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    done = [a for a, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_bad_input_is_refused(pixels: StarFlowPipeline, tarflow: StarFlowPipeline) -> None:
    with pytest.raises(UserError, match="size 10x8 cannot be made: both sides must be multiples of 4 pixels"):
        pixels("star", size=(10, 8))
    with pytest.raises(UserError, match="guidance"):
        pixels("star", guidance=-1.0)
    with pytest.raises(UserError, match="guidance has 2 weights, expected one weight, or one for each of 3 pictures"):
        pixels("star", num_images=3, guidance=[1.0, 2.0])
    with pytest.raises(UserError, match="unknown class 'stra': did you mean 'star'"):
        pixels("stra")
    with pytest.raises(UserError, match="the seed is -1, expected 0 to"):
        pixels("star", seed=-1)
    with pytest.raises(UserError, match="num_images is 0"):
        pixels("star", num_images=0)
    with pytest.raises(UserError, match="learned positions"):
        tarflow("star", size=(16, 8))
    nothing = random_pipeline("nothing", PixelLatents(), None)
    with pytest.raises(UserError, match="'nothing' takes no prompt, got 'star'"):
        nothing("star")


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model '/nowhere'"):
        StarFlowPipeline.from_pretrained("/nowhere")
    with pytest.raises(UserError, match="no such file"):
        StarFlowPipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "starflow"}))
    with pytest.raises(UserError, match="holds no pipeline but a flow alone"):
        StarFlowPipeline.from_pretrained(tmp_path)
