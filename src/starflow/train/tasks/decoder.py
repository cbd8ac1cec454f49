"""Fine-tuning of a decoder on noisy latents, the encoder frozen: the third way out of the noise.

Source: STARFlow, arXiv 2506.06276, section 3.3, with an L2, a perceptual and an adversarial loss. The latents are
encoded once; every update crops some of them, adds fresh noise, and compares the decoded crops with the images' own.
Whole images are encoded, so that a crop's latents know what lies beside it, as those of a flow do.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from starflow.data.images import save_grid, to_float
from starflow.errors import UserError
from starflow.evaluate import MobileNetV2, load_mobilenet, psnr
from starflow.evaluate.features import MEAN, STD
from starflow.latents import DecoderModule, TrainableAutoencoder, memory_layout, save_trainable
from starflow.train.loader import BatchOrder, check_splits
from starflow.train.settings import TrainSettings, generator, network_precision

PerceptualName = Literal["mobilenetv2", "lpips"]

DEPTHS = (1, 3, 6, 10)
"""Layers of MobileNetV2 after which features are compared: 16, 24, 32 and 64 channels at strides 2 to 16."""

EPS = 1e-8
"""Added to the norm of features, which may be zero."""


class Perceptual(Protocol):
    """A distance of two batches of images (B, 3, H, W) in [-1, 1]: a scalar, 0 for equal ones."""

    def __call__(self, images: Tensor, references: Tensor) -> Tensor: ...


class MobileNetDistance:
    """Distance of MobileNetV2's inner features, at the images' own size.

    Features of several depths are normalised over channels, and their squared differences averaged over positions and
    added: Zhang et al., arXiv 1801.03924, equation 1, with equal weights instead of learned ones.
    """

    def __init__(self, network: MobileNetV2, device: torch.device) -> None:
        layers = list(network.features.to(device).children())
        ends = [depth + 1 for depth in DEPTHS]
        self._stages = [nn.Sequential(*layers[start:end]) for start, end in pairwise([0, *ends])]
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """See `Perceptual`."""
        return self.between(self.features(images), self.features(references))

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> what is compared: (B, 16, H / 2, W / 2) to (B, 64, H / 16, W / 16), float32."""
        found, inner = [], ((images + 1) / 2 - self._mean) / self._std
        for stage in self._stages:
            inner = stage(inner)
            found.append(inner.float())
        return found

    def between(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The distance of images by their features."""
        pairs = zip(ours, theirs, strict=True)
        return torch.stack([(_normalised(a) - _normalised(b)).square().sum(1).mean() for a, b in pairs]).sum()


def load_perceptual(name: PerceptualName, device: torch.device) -> Perceptual:
    """The distance of that name, frozen: LPIPS where it is installed, MobileNetV2's features anywhere.

    Raises:
        UserError: the package that carries its weights is not installed.
    """
    if name == "mobilenetv2":
        return MobileNetDistance(load_mobilenet(), device)
    try:
        lpips: Any = importlib.import_module("lpips")
    except ImportError:
        raise UserError("LPIPS is not installed: run 'pip install lpips', or take --features mobilenetv2") from None
    network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

    def distance(images: Tensor, references: Tensor) -> Tensor:
        mean: Tensor = network(images, references).mean()
        return mean

    return distance


def _normalised(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + EPS).sqrt()


EVALUATION_BATCH = 16


@dataclass(frozen=True)
class DecoderLoss:
    """Weights of the loss's terms; images are in [-1, 1]. A weight of 0 leaves a term out.

    Raises:
        UserError: a weight below 0, or no squared error.
    """

    squared: float = 1.0
    """Weight of the mean squared error."""
    perceptual: float = 0.1
    """Weight of the distance of features; see `load_perceptual`."""
    adversarial: float = 0.01
    """Weight of the critic's mean score of decoded crops."""
    adversarial_from: int = 500
    """Update at which the critic starts, once there is something to judge."""

    def __post_init__(self) -> None:
        if min(self.squared, self.perceptual, self.adversarial, self.adversarial_from) < 0 or self.squared == 0:
            raise UserError("the loss needs a squared weight above 0, and no weight below 0")


class Critic(nn.Module):
    """A patch discriminator: images (B, 3, H, W) to scores (B, 1, H / 8, W / 8), higher for real ones.

    Source: Isola et al., arXiv 1611.07004, section 3.2.2.

    Example:
        >>> Critic(width=8)(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 1, 2, 2])
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(2):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> scores (B, 1, H / 8, W / 8)."""
        scores: Tensor = self.layers(images)
        return scores


class FeatureCritic(nn.Module):
    """Scores of pictures by their features and prompts, higher for real ones: a few convolutions for each depth.

    Source: Sauer et al., arXiv 2111.01007, on frozen features; the projection of the prompt is Miyato and Koyama's,
    arXiv 1802.05637. Every weight's spectral norm is 1 (Miyato et al., arXiv 1802.05957), which bounds a picture's
    gradient.

    Example:
        >>> features = [torch.zeros(2, 16, 32, 32), torch.zeros(2, 24, 16, 16)]
        >>> FeatureCritic((16, 24), (32, 16), num_classes=0, txt_dim=8)(features, torch.zeros(2, 5, 8)).shape
        torch.Size([2, 32])
    """

    SMALLEST = 4
    """Side at which features are scored."""

    def __init__(
        self, channels: Sequence[int], sides: Sequence[int], num_classes: int, txt_dim: int, width: int = 48
    ) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(self._trunk(*sizes, width) for sizes in zip(channels, sides, strict=True))
        self.scores = nn.ModuleList(spectral_norm(nn.Conv2d(width, 1, 3, 1, 1)) for _ in channels)
        self.embed = spectral_norm(nn.Embedding(num_classes + 1, width)) if num_classes else None
        self.project = spectral_norm(nn.Linear(txt_dim, width)) if txt_dim else None

    def _trunk(self, channels: int, side: int, width: int) -> nn.Sequential:
        layers: list[nn.Module] = [spectral_norm(nn.Conv2d(channels, width, 3, 1, 1)), nn.LeakyReLU(0.2)]
        while side > self.SMALLEST:
            layers += [spectral_norm(nn.Conv2d(width, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
            side //= 2
        return nn.Sequential(*layers)

    def forward(self, features: Sequence[Tensor], condition: Tensor | None) -> Tensor:
        """Features by depth, each (B, c, h, w), and the flow's conditions -> scores (B, positions of all depths)."""
        if self.embed is not None:
            assert condition is not None
            vector = self.embed(condition + 1)  # -1 is no class
        elif self.project is not None:
            assert condition is not None
            mean = condition.float().mean(1)
            vector = self.project(F.layer_norm(mean, mean.shape[-1:]))
        else:
            vector = None
        found = []
        for inner, trunk, score in zip(features, self.trunks, self.scores, strict=True):
            hidden = trunk(inner)
            scores = score(hidden).flatten(1)
            if vector is not None:
                scores = scores + (hidden.mean((2, 3)) * vector).sum(1, keepdim=True)
            found.append(scores)
        return torch.cat(found, 1).float()


class DecoderObjective(nn.Module):
    """Decoder and critic with one loss for both, in which each term has gradients for one of them alone.

    The decoder's adversarial term goes through a copy of the critic without gradients, the critic's hinge through
    images without gradients, so that one backward pass and one optimiser update both.
    """

    def __init__(self, decoder: DecoderModule, loss: DecoderLoss, perceptual: Perceptual | None) -> None:
        super().__init__()
        self.decoder = decoder
        self.critic = Critic() if loss.adversarial else None
        self._weights = loss
        # Not a submodule: its weights are not trained, averaged or saved.
        self._perceptual = (perceptual,)

    def forward(self, latents: Tensor, images: Tensor, use_critic: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Noisy latents (B, C, h, w) and images (B, 3, H, W) -> scalar loss and its terms, float32."""
        output = self.decoder(latents).float()
        terms = {"squared": (output - images).square().mean()}
        loss = self._weights.squared * terms["squared"]
        (perceptual,) = self._perceptual
        if perceptual is not None:
            terms["perceptual"] = perceptual(output, images)
            loss = loss + self._weights.perceptual * terms["perceptual"]
        if self.critic is not None and use_critic:
            terms |= adversarial_terms(self.critic, output, images)
            loss = loss + self._weights.adversarial * terms["adversarial"] + terms["critic"]
        return loss, terms


def adversarial_terms(critic: Critic, output: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Decoded and original images (B, 3, H, W) -> "adversarial", the decoder's term, and "critic", the critic's hinge.

    The first goes through the critic without gradients to its weights, the second through images without gradients.
    """
    weights = {name: tensor.detach() for name, tensor in critic.named_parameters()}
    scores: Tensor = functional_call(critic, weights, (output,))
    real, decoded = critic(images).float(), critic(output.detach()).float()
    hinge = F.relu(1 - real).mean() + F.relu(1 + decoded).mean()
    return {"adversarial": -scores.float().mean(), "critic": hinge}


def feature_critic_terms(
    critic: FeatureCritic, ours: Sequence[Tensor], theirs: Sequence[Tensor], condition: Tensor | None
) -> dict[str, Tensor]:
    """Features of the student's and of real pictures, whose prompts are the same -> "adversarial" and "critic".

    The first goes through the critic without gradients to its weights, the second, the critic's hinge, through features
    without gradients. Real pictures with the next picture's prompt count as wrong too (Reed et al., arXiv 1605.05396).
    """
    weights = {name: tensor.detach() for name, tensor in critic.named_parameters()}
    scores: Tensor = functional_call(critic, weights, (ours, condition))
    real, drawn = critic(theirs, condition), critic([one.detach() for one in ours], condition)
    hinge = F.relu(1 - real).mean() + F.relu(1 + drawn).mean()
    if condition is not None:
        hinge = hinge + 0.5 * F.relu(1 + critic(theirs, condition.roll(1, 0))).mean()
    return {"adversarial": -scores.mean(), "critic": hinge}


@dataclass(frozen=True)
class EncodedImages:
    """Images (N, 3, H, W) uint8, and the mean and standard deviation of their latents (N, C, h, w), float16."""

    images: Tensor
    mean: Tensor
    std: Tensor | None
    names: list[str]

    def latents(self, rows: Tensor, draw: torch.Generator) -> Tensor:
        """Latents of these rows, float32, drawn from the posterior where there is one."""
        mean = self.mean[rows].float()
        return mean if self.std is None else mean + self.std[rows].float() * torch.randn(mean.shape, generator=draw)


class DecoderTask:
    """Noisy-latent reconstruction of crops; see `starflow.train.loop.Task`."""

    flops = 0.0

    def __init__(
        self,
        autoencoder: TrainableAutoencoder,
        objective: DecoderObjective,
        train: EncodedImages,
        heldout: EncodedImages,
        noise_std: float,
        crop: int,
        loss: DecoderLoss,
        settings: TrainSettings,
    ) -> None:
        """Train the decoder of this autoencoder.

        Args:
            autoencoder: whose decoder `objective` holds.
            objective: decoder, critic and loss.
            train: encoded training images.
            heldout: encoded images that evaluations and sample grids show.
            noise_std: standard deviation of the latent noise.
            crop: side of a crop in pixels, a multiple of the autoencoder's factor; 0 is the whole image.
            loss: the weights, and when the critic starts.
            settings: see `TrainSettings`.

        Raises:
            UserError: a split has no images, or crops of another size than the autoencoder takes.
        """
        check_splits([train.images], [heldout.images])
        factor, side = autoencoder.spec.factor, train.images.shape[-1]
        crop = crop or side
        if crop % factor or not factor <= crop <= side:
            raise UserError(f"crops of {crop} px: expected a multiple of {factor} up to the pictures' side, {side}")
        self.model: nn.Module = objective
        self.autoencoder, self.train, self.heldout = autoencoder, train, heldout
        self.noise_std, self.crop, self.weights, self.settings = noise_std, crop, loss, settings
        self.order = BatchOrder([torch.arange(len(train.images))], settings.batch, settings.seed)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _indices(self, step: int, rows: range) -> Tensor:
        return self.order(step)[rows.start : rows.stop]

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor, bool]:
        """Noisy latents and images, one crop an image, cut at the same position; and whether the critic is used."""
        indices = self._indices(step, rows).tolist()
        crops = [self._crop(index, row, step) for index, row in zip(indices, rows, strict=True)]
        latents, images = zip(*crops, strict=True)
        pair = torch.stack(latents).to(self._device), to_float(torch.stack(images).to(self._device))
        return *pair, step >= self.weights.adversarial_from

    def _crop(self, index: int, row: int, step: int) -> tuple[Tensor, Tensor]:
        """A crop of one image: noisy latents (C, h, w), and pixels (3, crop, crop) uint8."""
        draw = generator(self.settings.seed, f"decoder/{row}", step)
        latents = self.train.latents(torch.tensor([index]), draw)[0]
        factor = self.autoencoder.spec.factor
        cells, side = self.crop // factor, latents.shape[-1]
        y, x = torch.randint(0, side - cells + 1, (2,), generator=draw).tolist()
        cut = latents[:, y : y + cells, x : x + cells]
        top, left = y * factor, x * factor
        pixels = self.train.images[index, :, top : top + self.crop, left : left + self.crop]
        return cut + self.noise_std * torch.randn(cut.shape, generator=draw), pixels

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of decoder and critic, and its terms; see `DecoderObjective`."""
        with network_precision(self.settings, self._device):
            loss: tuple[Tensor, dict[str, Tensor]] = model(*batch)
        return loss

    def batch_names(self, step: int, rows: range) -> list[str]:
        """Names of the images in these rows."""
        return [self.train.names[index] for index in self._indices(step, rows).tolist()]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB of whole held-out images without noise and with the decoder's; the loss is minus the latter."""
        values = {f"psnr_noise_{sigma:g}": self.psnr(model, sigma) for sigma in (0.0, self.noise_std)}
        return {"loss": -values[f"psnr_noise_{self.noise_std:g}"], **values}

    @torch.no_grad()
    def psnr(self, model: nn.Module, sigma: float) -> float:
        """Mean PSNR in dB over the held-out images; the noise of an image is the same at every call."""
        total = 0.0
        for start in range(0, len(self.heldout.images), EVALUATION_BATCH):
            rows = torch.arange(start, min(start + EVALUATION_BATCH, len(self.heldout.images)))
            images = to_float(self.heldout.images[rows].to(self._device))
            total += float(psnr(self._decoded(model, rows, sigma), images).sum())
        return total / len(self.heldout.images)

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Rows: held-out images, their reconstructions, and those with the noise."""
        rows = torch.arange(0, len(self.heldout.images), max(1, len(self.heldout.images) // 8))[:8]
        images = to_float(self.heldout.images[rows].to(self._device))
        grid = [images, *(self._decoded(model, rows, sigma) for sigma in (0.0, self.noise_std))]
        save_grid(torch.cat(grid), path, columns=len(rows))

    def _decoded(self, model: nn.Module, rows: Tensor, sigma: float) -> Tensor:
        assert isinstance(model, DecoderObjective)
        latents = self.heldout.mean[rows].float()
        noise = [torch.randn(latents.shape[1:], generator=generator(0, "heldout", row)) for row in rows.tolist()]
        with network_precision(self.settings, self._device):
            images: Tensor = model.decoder((latents + sigma * torch.stack(noise)).to(self._device))
        return images.float().clamp(-1, 1)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The autoencoder with the decoder of `model`, which may be a copy of the one that is trained."""
        assert isinstance(model, DecoderObjective)
        autoencoder = copy.deepcopy(self.autoencoder)
        DecoderModule(autoencoder).load_state_dict(model.decoder.state_dict())
        save_trainable(autoencoder, folder, self.noise_std)

    def describe(self, terms: Mapping[str, float]) -> dict[str, str]:
        """The loss and the mean squared error."""
        return {"loss": f"{terms['loss']:.4f}", "mse": f"{terms['squared']:.5f}"}


@torch.no_grad()
def encode_latents(
    autoencoder: TrainableAutoencoder, images: Tensor, device: torch.device, show_progress: bool
) -> dict[str, Tensor]:
    """Latents of uint8 images: `mean` and, where the autoencoder has a posterior, `std`, float16 on the CPU."""
    parts: dict[str, list[Tensor]] = {"mean": []}
    layout = memory_layout(autoencoder)
    for batch in tqdm(images.split(EVALUATION_BATCH), desc="latents", unit="batch", disable=not show_progress):
        unit = to_float(batch.to(device)).contiguous(memory_format=layout)
        posterior = getattr(autoencoder, "posterior", None)
        mean, std = posterior(unit) if posterior else (autoencoder.encode(unit), None)
        parts["mean"].append(mean.to("cpu", torch.float16))
        if std is not None:
            parts.setdefault("std", []).append(std.to("cpu", torch.float16))
    return {name: torch.cat(values) for name, values in parts.items()}
