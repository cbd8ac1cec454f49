"""Autoencoder and flow together, with a constant latent noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from starflow.data.images import to_float
from starflow.data.sets.small import draw_shapes
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.recipe import AutoencoderRecipe, JointLoss, Objective, Recipe, load_recipe
from starflow.train.run import read_log, start_run
from starflow.train.stages import train_flow
from starflow.train.tasks.autoencoder import JointModel
from starflow.train.tasks.decoder import Perceptual

ROOT = Path(__file__).parent.parent.parent.parent
SIZES = SmallAutoencoderConfig(channels=4, widths=(8, 16), encoder_pairs=1, decoder_pairs=1, standardise=False)
FLOW = STARFlowConfig(in_channels=4, img_size=4, channels=32, num_blocks=2, layers_per_block=1, head_dim=32)
CPU = torch.device("cpu")


def make_model(**recipe: Any) -> tuple[JointModel, torch.Tensor, torch.Tensor]:
    """A model with a flow that is no identity, pictures (6, 3, 16, 16) and noise."""
    torch.manual_seed(0)
    flow = STARFlow(FLOW)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sizes = AutoencoderRecipe(joint=True, model=SIZES, **recipe)
    model = JointModel(SmallAutoencoder(SIZES), flow, Objective(noise_std=0.5, latent_penalty=0.0), sizes)
    return model, to_float(draw_shapes(6, 16, 0).images), torch.randn(6, 4, 4, 4)


def test_the_loss_is_the_bound_in_units_of_a_pixel() -> None:
    model, images, noise = make_model()
    loss, terms = model(images, noise, None)
    flow = model.density.flow
    z = model.autoencoder.encoder(images) + 0.5 * noise
    nats = -flow.log_prob(z).mean() / z[0].numel() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    assert float((terms["squares"] - terms["logdet"]).detach()) == pytest.approx(float(nats.detach()), rel=1e-5)
    share = z[0].numel() / images[0].numel()
    expected = terms["reconstruction"] + share * nats
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_flows_likelihood_reaches_the_encoder_and_not_the_decoder() -> None:
    """SimFlow detaches nothing: the encoder's gradient is that of both terms."""
    model, images, noise = make_model()
    encoder, decoder = list(model.autoencoder.encoder.parameters()), list(model.autoencoder.decoder.parameters())
    loss, terms = model(images, noise, None)
    nats = terms["squares"] - terms["logdet"]
    of_flow = torch.autograd.grad(nats, encoder + decoder, retain_graph=True, allow_unused=True)
    of_pictures = torch.autograd.grad(terms["reconstruction"], encoder, retain_graph=True)
    whole = torch.autograd.grad(loss, encoder)
    assert all(grad is None for grad in of_flow[len(encoder) :])
    assert any(float(grad.abs().max()) > 0 for grad in of_flow[: len(encoder)] if grad is not None)
    for both, one, other in zip(whole, of_pictures, of_flow, strict=False):
        assert other is not None
        assert torch.allclose(both, one + model.weight * other, atol=1e-6)


def test_the_latent_noise_is_constant() -> None:
    model, images, noise = make_model()
    one, _ = model(images, noise, None)
    model.sigma = 0.0
    assert float(model(images, noise, None)[0]) == pytest.approx(float(model(images, 0 * noise, None)[0]))
    assert float(one) != float(model(images, noise, None)[0])


def test_the_perceptual_and_the_adversarial_term_reach_what_they_are_for() -> None:
    """Both reach encoder and decoder; the critic learns from its own hinge alone, and starts when it is told to."""
    terms = JointLoss(perceptual=0.5, adversarial=0.1)
    model, images, noise = make_model(joint_loss=terms)

    def distance(own: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (own.mean((2, 3)) - wanted.mean((2, 3))).square().mean()

    plain, _ = model(images, noise, None)
    model._perceptual = (cast(Perceptual, distance),)
    with_distance, found = model(images, noise, None)
    assert float(with_distance.detach()) == pytest.approx(float((plain + 0.5 * found["perceptual"]).detach()), rel=1e-5)
    assert "critic" not in found
    whole, found = model(images, noise, None, use_critic=True)
    expected = with_distance + 0.1 * found["adversarial"] + found["critic"]
    assert float(whole.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert model.critic is not None
    judges, coders = list(model.critic.parameters()), list(model.autoencoder.parameters())
    to_judges = torch.autograd.grad(found["adversarial"], judges, retain_graph=True, allow_unused=True)
    assert all(grad is None for grad in to_judges)
    to_coders = torch.autograd.grad(found["critic"], coders, retain_graph=True, allow_unused=True)
    assert all(grad is None for grad in to_coders)
    for name in ("adversarial", "perceptual"):
        reached = torch.autograd.grad(found[name], coders, retain_graph=True, allow_unused=True)
        assert any(grad is not None and float(grad.abs().max()) > 0 for grad in reached), name


def test_both_losses_fall() -> None:
    """From latents of unit spread; a new encoder gives nearly none, and the flow's nats rise while it finds them."""
    model, images, noise = make_model()
    with torch.no_grad():
        last = model.autoencoder.encoder[-1]
        last.weight /= model.autoencoder.encode(images).std()  # type: ignore[operator, arg-type]
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    seen = []
    for step in range(60):
        noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(step))
        loss, terms = model(images, noise, None)
        seen.append((float(terms["squares"] - terms["logdet"]), float(terms["reconstruction"])))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for first, last10 in ((seen[0][part], sum(one[part] for one in seen[-10:]) / 10) for part in (0, 1)):
        assert last10 < 0.8 * first


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """recipes/tiny.yaml with the switch on."""
    folder = tmp_path_factory.mktemp("joint")
    values = {
        "autoencoder.joint": "true",
        "autoencoder.model": "{channels: 4, widths: [16, 32], encoder_pairs: 1, decoder_pairs: 1}",
        "data.shapes": "200",
        "data.views.size": "16",
        "flow": "{channels: 64, layers_per_block: [1, 2], head_dim: 32}",
        "objective.noise_std": "0.5",
        "train.steps": "80",
        "train.batch": "16",
        "train.evaluate_every": "40",
        "train.sample_every": "80",
        "train.checkpoint_every": "40",
        "train.average": "0.9",
    }
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", values)
    train_flow(start_run(recipe, folder, CPU, progress=False))
    return folder, recipe


def test_a_run_learns_both(trained: tuple[Path, Recipe]) -> None:
    lines = read_log(trained[0] / "log.jsonl")
    updates = [line for line in lines if "loss" in line]
    nats = [line["squares"] - line["logdet"] for line in updates]
    assert sum(nats[-10:]) / 10 < max(nats) - 0.05
    assert sum(line["reconstruction"] for line in updates[-10:]) / 10 < 0.6 * updates[0]["reconstruction"]
    first, last = (line for line in lines if "heldout_loss" in line)
    assert last["heldout_loss"] < first["heldout_loss"]
    assert last["heldout_psnr_noised"] > first["heldout_psnr_noised"]


def test_the_pipeline_needs_no_cleaning(trained: tuple[Path, Recipe]) -> None:
    pipeline = StarFlowPipeline.from_pretrained(trained[0] / "model")
    assert (pipeline.config.cleaning, pipeline.config.noise_std) == ("decoder", 0.5)
    assert pipeline.autoencoder.spec.noise_std == 0.5
    assert pipeline("star").images[0].size == (16, 16)
    assert not (trained[0] / "latents").exists(), "nothing is cached"
    assert not (trained[0] / "autoencoder").exists(), "there is no stage before"


def test_a_longer_joint_run_goes_on(trained: tuple[Path, Recipe]) -> None:
    folder, recipe = trained
    longer = replace(recipe, train=replace(recipe.train, steps=82))
    train_flow(start_run(longer, folder, CPU, progress=False))
    assert [line["step"] for line in read_log(folder / "log.jsonl") if "loss" in line] == list(range(1, 83))


def test_it_is_of_the_small_autoencoder_alone() -> None:
    with pytest.raises(UserError, match="joint training is of an autoencoder of kind 'small'"):
        AutoencoderRecipe(kind="pixels", joint=True)
