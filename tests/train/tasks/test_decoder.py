"""Fine-tuning decoders: crops in place, gradients apart; and distances of features, which have gradients to pixels."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from starflow.errors import UserError
from starflow.evaluate import MobileNetV2
from starflow.latents import DecoderModule
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, SmallLatents
from starflow.train.settings import TrainSettings
from starflow.train.tasks.decoder import (
    DecoderLoss,
    DecoderObjective,
    DecoderTask,
    EncodedImages,
    FeatureCritic,
    MobileNetDistance,
    feature_critic_terms,
    load_perceptual,
)

SETTINGS = TrainSettings(steps=6, batch=4, lr=1e-2, warmup=1, evaluate_every=3, sample_every=6, checkpoint_every=2)
CPU = torch.device("cpu")


def ours() -> SmallLatents:
    torch.manual_seed(0)
    return SmallLatents(
        SmallAutoencoder(SmallAutoencoderConfig(channels=3, widths=(8,), encoder_pairs=1, decoder_pairs=1)), 0.0
    )


def task(noise: float = 0.0, crop: int = 8, loss: DecoderLoss | None = None) -> DecoderTask:
    """Pictures of noise whose latents are the means of 2 x 2 pixels."""
    loss = loss or DecoderLoss(perceptual=0, adversarial=0)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 16, 16), generator=draw, dtype=torch.uint8)
    pooled = F.avg_pool2d(images.float() / 127.5 - 1, 2).half()
    pictures = EncodedImages(images, pooled, None, [f"p{number}" for number in range(12)])
    autoencoder = ours()
    objective = DecoderObjective(DecoderModule(autoencoder), loss, None)
    return DecoderTask(autoencoder, objective, pictures, pictures, noise, crop, loss, SETTINGS)


def test_latents_and_pixels_are_cut_at_the_same_place() -> None:
    latents, images, use_critic = task().batch(3, range(4))
    assert latents.shape == (4, 3, 4, 4)
    assert images.shape == (4, 3, 8, 8)
    assert not use_critic
    torch.testing.assert_close(F.avg_pool2d(images, 2), latents, rtol=0, atol=1e-3)


def test_a_batch_is_the_same_in_parts() -> None:
    latents, images, _ = task(noise=0.3).batch(2, range(4))
    halves = [task(noise=0.3).batch(2, range(first, first + 2)) for first in (0, 2)]
    assert torch.equal(torch.cat([half[0] for half in halves]), latents)
    assert torch.equal(torch.cat([half[1] for half in halves]), images)


def test_noise_has_its_spread() -> None:
    clean, noisy = task().batch(0, range(4))[0], task(noise=0.5).batch(0, range(4))[0]
    assert float((noisy - clean).std()) == pytest.approx(0.5, rel=0.15)


def test_each_term_trains_its_own_network() -> None:
    """The critic's gradients are those of its hinge alone, the decoder's those of the rest, the critic held still."""
    loss = DecoderLoss(squared=2.0, perceptual=0, adversarial=0.5, adversarial_from=0)
    made = task(loss=loss)
    objective = made.model
    assert isinstance(objective, DecoderObjective)
    assert objective.critic is not None
    latents, images, use_critic = made.batch(0, range(4))
    assert use_critic
    total, terms = objective(latents, images, True)
    total.backward()
    found = {
        name: parameter.grad.clone() for name, parameter in objective.named_parameters() if parameter.grad is not None
    }
    assert set(terms) == {"squared", "adversarial", "critic"}

    objective.zero_grad()
    output = objective.decoder(latents)
    objective.critic.requires_grad_(False)
    (2.0 * (output - images).square().mean() - 0.5 * objective.critic(output).mean()).backward()
    objective.critic.requires_grad_(True)
    real, fake = objective.critic(images), objective.critic(output.detach())
    (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_the_critic_waits() -> None:
    made = task(loss=DecoderLoss(perceptual=0, adversarial=0.5, adversarial_from=4))
    assert [made.batch(step, range(4))[2] for step in (3, 4)] == [False, True]
    _, terms = made.loss(made.model, made.batch(3, range(4)))
    assert set(terms) == {"squared"}


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="crops of 7 px"):
        task(crop=7)
    with pytest.raises(UserError, match="crops of 32 px"):
        task(crop=32)
    with pytest.raises(UserError, match="squared weight above 0"):
        DecoderLoss(squared=0)


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_pictures_are_at_no_distance_and_others_are() -> None:
    torch.manual_seed(0)
    distance = MobileNetDistance(MobileNetV2().eval().requires_grad_(False), CPU)
    one, two = pictures(0), pictures(1)
    assert float(distance(one, one)) == 0
    assert float(distance(one, two)) > float(distance(one, 0.9 * one + 0.1 * two)) > 0
    assert float(distance(one, two)) == pytest.approx(float(distance(two, one)))
    moved = one.clone().requires_grad_()
    distance(moved, two).backward()
    assert moved.grad is not None
    assert float(moved.grad.abs().sum()) > 0


def test_lpips_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class LPIPS(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(one, two, reduction="none").mean((1, 2, 3), keepdim=True) * self.weight

    package: Any = types.ModuleType("lpips")
    package.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    one, two = pictures(0), pictures(1)
    assert float(load_perceptual("lpips", CPU)(one, two)) == pytest.approx(float(F.mse_loss(one, two)))
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips"):
        load_perceptual("lpips", CPU)


class LinearCritic(nn.Module):
    """The features' mean times the prompt's, so that a prompt of another picture tells."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, features: list[torch.Tensor], condition: torch.Tensor | None) -> torch.Tensor:
        score = self.slope * features[0].mean((1, 2, 3))
        return (score if condition is None else score * condition.mean((1, 2)))[:, None]


def test_the_critics_terms_are_those_of_the_formula() -> None:
    """Hinge of real and drawn pictures, half of one of real pictures under the picture before's prompt."""
    critic: Any = LinearCritic()
    ours, theirs = ([torch.tensor(means).view(3, 1, 1, 1)] for means in ([0.2, -0.4, 1.0], [1.0, 3.0, -1.0]))
    condition = torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1)
    terms = {name: term.detach() for name, term in feature_critic_terms(critic, ours, theirs, condition).items()}
    assert float(terms["adversarial"]) == pytest.approx(-(0.1 + 0.2 + 1.0) / 3)
    real, drawn, wrong = (0.5 + 2.5 + 2.0) / 3, (1.1 + 1.2 + 2.0) / 3, (2.0 + 2.5 + 1.5) / 3
    assert float(terms["critic"]) == pytest.approx(real + drawn + 0.5 * wrong)
    unprompted = feature_critic_terms(critic, ours, theirs, None)["critic"].detach()
    assert float(unprompted) == pytest.approx((0.5 + 0.0 + 1.5) / 3 + (1.1 + 0.8 + 1.5) / 3)


def test_a_feature_critic_projects_the_prompt_by_its_direction() -> None:
    torch.manual_seed(0)
    critic = FeatureCritic((3, 5), (16, 8), num_classes=0, txt_dim=6).eval()
    features, prompts = [torch.randn(2, 3, 16, 16), torch.randn(2, 5, 8, 8)], torch.randn(2, 4, 6)
    with torch.no_grad():
        scores, plain = critic(features, prompts), critic(features, torch.zeros(2, 4, 6))
        assert critic.project is not None
        vectors = critic.project(F.layer_norm(prompts.mean(1), (6,))) - critic.project(torch.zeros(2, 6))
        inner = [trunk(one).mean((2, 3)) for trunk, one in zip(critic.trunks, features, strict=True)]
    assert torch.allclose(critic(features, 10 * prompts), scores, atol=1e-3)
    for part, hidden in zip((scores - plain).split(16, 1), inner, strict=True):  # 4 x 4 positions of each depth
        assert torch.allclose(part, (hidden * vectors).sum(1, keepdim=True).expand(-1, 16), atol=1e-5)
    layers = [module for module in critic.modules() if isinstance(module, nn.Conv2d)]
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers]
    assert norms == pytest.approx([1.0] * len(norms), rel=0.1)


def test_a_feature_critic_tells_classes_and_none_apart() -> None:
    torch.manual_seed(0)
    critic = FeatureCritic((3,), (4,), num_classes=2, txt_dim=0).eval()
    scores = critic([torch.randn(1, 3, 4, 4).expand(3, -1, -1, -1)], torch.tensor([-1, 0, 1]))
    assert len({round(float(row.sum().detach()), 4) for row in scores}) == 3
