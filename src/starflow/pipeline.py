"""From a prompt to a picture and back: conditioner + flow + autoencoder.

    pipe = StarFlowPipeline.from_pretrained("glyphs")
    pipe("a red apple", num_images=4, guidance=2.0, seed=0).images[0].save("apple.png")
    pipe.log_prob(image, "a red apple", seed=0)      # LogProb(nats, bits_per_dim, dimensions)
    z = pipe.encode(image, "a red apple"); image = pipe.decode(z, "a red apple")

Contract: picture i of a call depends on the weights, its prompt, its guidance weight and seed + i alone, not on the
batch it is in.
Sizes are (width, height) in pixels. A pipeline is a folder: config.json, flow/, and autoencoder/ where it is our own.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from starflow import files
from starflow.conditioning import ClassLabels, Conditioner, ConditionerSpec, load_conditioner
from starflow.config import from_dict, to_dict
from starflow.data.pictures import from_pil, to_pil
from starflow.errors import UserError
from starflow.flow.model import STARFlow, TarFlow
from starflow.latents import Autoencoder, AutoencoderSpec, load_autoencoder
from starflow.latents.small import SmallLatents, save_small
from starflow.sampling.denoise import denoise
from starflow.sampling.sampler import sample
from starflow.sampling.settings import SolverChoice
from starflow.weights.hub import find_model, model_card, push_folder

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 16
"""Pictures sampled at once by default."""


@dataclass(frozen=True)
class PipelineConfig:
    """What config.json of a pipeline holds."""

    name: str
    image_size: int
    """Side in pixels that the model was trained at."""
    noise_std: float
    """Standard deviation of the noise in the flow's training data, in the flow's units."""
    autoencoder: AutoencoderSpec
    conditioner: ConditionerSpec | None = None
    guidance: float = 0.0
    """Default guidance weight."""
    cleaning: Literal["decoder", "tweedie"] = "decoder"
    """How samples lose the noise: a decoder trained for it, or one Tweedie step before decoding."""
    format: int = 1


@dataclass(frozen=True)
class Generated:
    """What a call returns."""

    images: list[Image]
    latents: Tensor
    """(B, C, h, w): what the flow sampled, before cleaning."""
    prompts: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class LogProb:
    """Exact log-density of one noised latent (or noised pixels, where there is no autoencoder)."""

    nats: float
    """log p(x | prompt), natural logarithm, the Gaussian's constant included."""
    bits_per_dim: float
    """-nats / (dimensions ln 2), of the flow's own input."""
    dimensions: int
    space: str
    """What the density is of: "noised latent" or "noised pixels"."""


class StarFlowPipeline:
    """A conditioner, a flow and an autoencoder that belong together."""

    def __init__(
        self,
        flow: STARFlow | TarFlow,
        autoencoder: Autoencoder,
        conditioner: Conditioner | None,
        config: PipelineConfig,
    ) -> None:
        self.flow, self.autoencoder, self.conditioner, self.config = flow.eval(), autoencoder, conditioner, config

    @classmethod
    def from_pretrained(
        cls, model: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> StarFlowPipeline:
        """Load a pipeline: the bundled "glyphs", a folder of `save_pretrained` or `starflow train`, or a hub id.

        Args:
            model: name, folder or hub id.
            device: where everything is put.
            dtype: of the flow's network; densities and autoencoder stay in float32.

        Raises:
            UserError: nothing there, or its files are damaged or do not fit each other.
        """
        folder = find_model(str(model))
        values = files.read_json(folder / "config.json")
        if not isinstance(values, dict) or "autoencoder" not in values:
            raise UserError(
                f"{folder} holds no pipeline: expected a config.json with an 'autoencoder', as train writes it"
            )
        config = from_dict(PipelineConfig, values)
        flow = _load_flow(folder / "flow").requires_grad_(False)
        spec = config.autoencoder
        if spec.kind == "small":
            spec = dataclasses.replace(spec, source=str(folder / spec.source))
        conditioner = load_conditioner(config.conditioner) if config.conditioner else None
        pipeline = cls(flow, load_autoencoder(spec), conditioner, config)
        return pipeline.to(device, dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the pipeline; `config.json` comes last, so its presence means that the folder is whole.

        Args:
            folder: made where it is missing.
            dtype: of the stored weights.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        folder = files.check_output_folder(Path(folder))
        self.flow.save_pretrained(folder / "flow", dtype)
        if isinstance(self.autoencoder, SmallLatents):
            save_small(self.autoencoder.network, folder / "autoencoder", self.autoencoder.spec.noise_std, dtype)
        files.write_json(folder / "config.json", to_dict(_portable(self.config)))

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Upload the pipeline to the hub with a generated model card; returns the commit's address.

        Raises:
            UserError: not logged in, no right to write, or the hub cannot be reached.
        """
        count = sum(parameter.numel() for parameter in self.flow.parameters())
        condition = self.config.conditioner.kind if self.config.conditioner else "no"
        facts = (
            f"A normalizing flow ({type(self.flow).__name__}, {count / 1e6:.1f} M parameters, {condition} condition) "
            f"for pictures of {self.config.image_size} px, trained with noise of {self.config.noise_std:g}."
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder)
            files.write_text(folder / "README.md", model_card(repository, facts, "", self.config.guidance))
            return push_folder(folder, repository, private)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> StarFlowPipeline:
        """Move everything to `device`, and the flow to `dtype`."""
        try:
            self.flow.to(device=device, dtype=dtype)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"cannot use device '{device}': {str(error).splitlines()[0]}; try --device cpu") from None
        for part in (self.autoencoder, self.conditioner):
            network = getattr(part, "network", None)
            if network is not None:
                network.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the flow is."""
        return next(self.flow.parameters()).device

    @property
    def size_multiple(self) -> int:
        """What both sides of a picture must be multiples of, in pixels."""
        return self.config.autoencoder.factor * self.flow.config.patch_size

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError: (width, height) in pixels that the model cannot make."""
        width, height = size
        unit = self.size_multiple
        if width < unit or height < unit or width % unit or height % unit:
            raise UserError(f"size {width}x{height} cannot be made: both sides must be multiples of {unit} pixels")

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        num_images: int = 1,
        guidance: float | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        solver: SolverChoice = "auto",
        guidance_rule: Literal["gaussian", "linear"] = "gaussian",
        guidance_schedule: Literal["constant", "linear"] = "constant",
        batch_size: int = BATCH,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generated:
        """Draw `num_images` pictures of every prompt; picture i of the whole call has the seed `seed + i`.

        Args:
            prompt: text, or a class's name or number; "" is unconditional.
            num_images: pictures a prompt.
            guidance: weight w >= 0, 0 is unguided; by default the model's own.
            seed: of the first picture.
            size: (width, height) in pixels; by default that of training.
            solver: "sequential" | "jacobi" | "auto" | a policy a block; see `starflow.sample`.
            guidance_rule: "gaussian" (STARFlow) or "linear" (TarFlow).
            guidance_schedule: "constant" or "linear" (annealed).
            batch_size: pictures sampled at once; changes memory, not pictures.
            progress: called with (steps done, steps in all).

        Raises:
            UserError: a prompt or size that the model cannot take, negative guidance.
        """
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images)]
        if not prompts or batch_size < 1:
            raise UserError(f"{len(prompts)} pictures in batches of {batch_size}: both must be at least 1")
        weight = self.config.guidance if guidance is None else guidance
        shape = self._latent_shape(size)
        seeds = [seed + index for index in range(len(prompts))]
        images: list[Image] = []
        latents = []
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            condition, null = self._condition(some)
            drawn = sample(
                self.flow,
                noise_of(seeds[start : start + batch_size], shape).to(self.device),
                condition,
                null_condition=null,
                guidance=weight,
                solver=solver,
                guidance_rule=guidance_rule,
                guidance_schedule=guidance_schedule,
                progress=_shifted(progress, start // batch_size, math.ceil(len(prompts) / batch_size)),
            )
            latents.append(drawn)
            images += to_pil(self._picture(drawn, condition))
        return Generated(images, torch.cat(latents), prompts, seeds)

    def log_prob(self, image: Image, prompt: str = "", *, seed: int = 0) -> LogProb:
        """Exact log-density of a picture's latent with the model's training noise added under `seed`.

        Raises:
            UserError: the picture's sides do not fit the model.
        """
        density, dimensions = self.log_probs(from_pil(image).to(self.device), [prompt], [seed])
        nats = float(density)
        space = "noised pixels" if self.config.autoencoder.kind == "pixels" else "noised latent"
        return LogProb(nats, -nats / (dimensions * math.log(2)), dimensions, space)

    @torch.no_grad()
    def log_probs(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, int]:
        """`log_prob` of pictures (B, 3, H, W) in [-1, 1]: nats (B,), and the dimensions of each latent."""
        latents = self.autoencoder.encode(images)
        noise = noise_of(seeds, tuple(latents.shape[1:])).to(self.device)
        condition, _ = self._condition(prompts)
        density = self.flow.log_prob(latents + self.config.noise_std * noise, condition)
        return density, latents[0].numel()

    @torch.no_grad()
    def encode(self, image: Image, prompt: str = "") -> Tensor:
        """A picture to the flow's noise z (1, C, h, w), through its latent, without added noise."""
        condition, _ = self._condition([prompt])
        z: Tensor = self.flow(self._latents(image), condition)[0]
        return z

    def decode(self, z: Tensor, prompt: str = "") -> Image:
        """Noise z (1, C, h, w) to a picture: the exact inverse of `encode` on latents, not through the autoencoder."""
        condition, _ = self._condition([prompt] * len(z))
        latents = sample(self.flow, z.to(self.device), condition)
        return to_pil(self._decode(latents))[0]

    def _latents(self, image: Image) -> Tensor:
        return self.autoencoder.encode(from_pil(image).to(self.device))

    def _decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.decode(latents)

    def _picture(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """Sampled latents to pictures (B, 3, H, W) in [-1, 1], cleaned of the noise."""
        if self.config.cleaning == "tweedie":
            latents = denoise(self.flow, latents, condition, sigma=self.config.noise_std)
        return self._decode(latents)

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        width, height = size or (self.config.image_size, self.config.image_size)
        self.check_size((width, height))
        factor = self.config.autoencoder.factor
        return self.flow.config.in_channels, height // factor, width // factor

    def _condition(self, prompts: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        """Condition and null condition of a batch, as the flow takes them."""
        if self.conditioner is None:
            if any(prompts):
                raise UserError(
                    f"'{self.config.name}' takes no prompt, got '{next(filter(None, prompts))}': leave it empty"
                )
            return None, None
        if isinstance(self.flow, TarFlow):
            assert isinstance(self.conditioner, ClassLabels)
            numbers = [self.conditioner.number(prompt) for prompt in prompts]
            labels = torch.tensor(numbers, device=self.device)
            return labels.where(labels < self.flow.config.num_classes, -1), None
        return self.conditioner.encode(prompts), self.conditioner.null(len(prompts))


def noise_of(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape), picture b a function of seeds[b] alone, on the CPU in float32.

    Raises:
        UserError: a seed outside 0 .. 2^63 - 1.
    """
    wrong = [seed for seed in seeds if not 0 <= seed < 2**63]
    if wrong:
        raise UserError(f"the seed is {wrong[0]}, expected 0 to {2**63 - 1}")
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _portable(config: PipelineConfig) -> PipelineConfig:
    """The config as it is stored: our own autoencoder lies in the pipeline's folder, wherever that is."""
    if config.autoencoder.kind != "small":
        return config
    return dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, source="autoencoder"))


def _load_flow(folder: Path) -> STARFlow | TarFlow:
    values: Any = files.read_json(folder / "config.json")
    kind = values.get("kind") if isinstance(values, dict) else None
    return TarFlow.from_pretrained(folder) if kind == "tarflow" else STARFlow.from_pretrained(folder)


def _shifted(
    progress: Callable[[int, int], None] | None, batch: int, batches: int
) -> Callable[[int, int], None] | None:
    """A batch's progress as that of the whole call."""
    if progress is None:
        return None
    return lambda done, total: progress(batch * total + done, batches * total)
