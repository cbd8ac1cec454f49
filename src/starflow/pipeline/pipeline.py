"""From a prompt to a picture and back: conditioner + flow + autoencoder.

    pipe = StarFlowPipeline.from_pretrained("glyphs")
    pipe("a red apple", num_images=4, guidance=2.0, seed=0).images[0].save("apple.png")
    pipe.log_prob(image, "a red apple", seed=0)      # LogProb(nats, bits_per_dim, dimensions)
    z = pipe.encode(image, "a red apple"); image = pipe.decode(z, "a red apple")

Contract: picture i of a call depends on the weights, its prompt, its guidance weight, seed + i and the number of
candidates alone, not on the batch it is in.
Sizes are (width, height) in pixels. A pipeline is a folder: config.json, flow/, and the
parts that it holds itself, autoencoder/ and conditioner/ (`starflow.pipeline`).
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from starflow.conditioning import ClassLabels, Conditioner, OnDemandTextEncoder
from starflow.config import from_dict, to_dict
from starflow.data.images import dequantise, from_pil, to_pil
from starflow.errors import UserError
from starflow.flow.memory import parameter_count
from starflow.flow.model import STARFlow, TarFlow, token_log_prob
from starflow.flow.quantize import is_quantized, quantize_int8
from starflow.io import files
from starflow.io.hub import HubOptions
from starflow.io.weights import SHARD_BYTES
from starflow.latents import Autoencoder
from starflow.latents.tiled import decode_in_tiles
from starflow.pipeline import config as sizes
from starflow.pipeline import folder as components
from starflow.pipeline.config import Cleaning as Cleaning
from starflow.pipeline.config import PipelineConfig as PipelineConfig
from starflow.pipeline.folder import Parts, facts_of, model_card
from starflow.pipeline.locate import find_pipeline, push_folder
from starflow.sampling.calibrate import CalibrationData, calibrate
from starflow.sampling.denoise import denoise
from starflow.sampling.policy import CacheDtype, Policy, SampleSettings, SolverChoice, keep_policy
from starflow.sampling.sampler import best_candidates, candidate_noise, noise_from_seeds, offset_progress, sample

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 16
"""Pictures sampled at once by default."""

CALIBRATION_PICTURES = 8

LARGE = 10**9
"""Parameters of a flow from which on it is not widened unless that is asked for."""


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
    """Exact log-density of one noised latent (or noised pixels, where there is no autoencoder).

    Of "8-bit pixels" it is a log-probability: the mean over uniform dequantisations, a lower bound (Theis et al.,
    arXiv 1511.01844, section 3.1).
    """

    nats: float
    """log p(x | prompt), natural logarithm, the Gaussian's constant included."""
    bits_per_dim: float
    """-nats / (dimensions ln 2), of the flow's own input."""
    dimensions: int
    space: str
    """What the density is of: "noised latent", "noised pixels" or "8-bit pixels"."""
    draws: int = 1
    """Draws of the noise that nats is the mean of."""
    standard_error: float | None = None
    """Of nats, over the draws; None for a single one."""


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
        self.decoder: Autoencoder | None = None
        """What decodes instead of the autoencoder, if anything."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        int8: bool = False,
        offload: bool = False,
        decoder: str | None = None,
        keep_text_encoder: bool | None = None,
        revision: str | None = None,
        cache: str | Path | None = None,
        offline: bool = False,
    ) -> StarFlowPipeline:
        """Load a pipeline: the bundled "glyphs", a folder of `save_pretrained` or `starflow train`, or a hub id.

        A published repository ("apple/starflow") is converted into a cache the first time, and its licence named.

        Args:
            model: name, folder (of a pipeline, or of a training run) or hub id, "owner/name" or "owner/name@revision".
            device: where everything is put.
            dtype: of the flow's network; densities and autoencoder stay in float32. None is float32, or the precision
                that is stored where the flow has over a billion parameters.
            int8: round the weights of the block next to the noise to 8 bits, for memory.
            offload: keep the flow's blocks on the CPU, and on `device` the one that is at work, for memory.
            decoder: folder or hub id of another autoencoder that turns latents into pictures: a small one of the same
                latents, such as TAESD for sd-vae's, or one with a decoder of `starflow train-decoder`.
            keep_text_encoder: whether it stays in memory between calls; None keeps one whose files are under a
                gigabyte, and loads and releases a larger one where it is needed.
            revision: of the repository: a branch, tag or commit.
            cache: folder of downloads; None is huggingface_hub's own.
            offline: take only what is cached.

        Raises:
            UserError: nothing there, or its files are damaged or do not fit each other.
        """
        hub = HubOptions(revision, cache, offline)
        folder = find_pipeline(str(model), hub, "float32" if dtype == torch.float32 else "bfloat16")
        values = files.read_json(folder / "config.json")
        if not isinstance(values, dict) or "autoencoder" not in values:
            raise UserError(
                f"{folder} holds no pipeline: expected a config.json with an 'autoencoder', as train writes it"
            )
        config = from_dict(PipelineConfig, values)
        flow = components.open_flow(folder).requires_grad_(False)
        conditioner = None
        if config.conditioner:
            conditioner = components.open_conditioner(config.conditioner, folder, hub, keep_text_encoder)
        autoencoder = components.open_autoencoder(config.autoencoder, folder, hub)
        pipeline = cls(flow, autoencoder, conditioner, config)
        if decoder is not None:
            pipeline.decoder = components.open_decoder(decoder, config.autoencoder, hub)
        dtype = dtype or _usual_dtype(flow)
        if int8:
            quantize_int8(flow.to(dtype))  # where the weights are: whole, they may not fit the device
        if offload:
            flow.to(dtype).offload(device)
        pipeline.to(device, dtype)
        return pipeline

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        parts: Parts = "own",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write the pipeline; `config.json` comes last, so its presence means that the folder is whole.

        Args:
            folder: made where it is missing.
            dtype: of the stored weights.
            parts: which of autoencoder and text encoder are written into the folder: "own" are those that the pipeline
                itself holds, "local" those that come from any folder here as well, and "all" those from the hub too;
                what is not written is named in config.json.
            shard_bytes: size that a file of the flow stays under.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        if is_quantized(self.flow):
            raise UserError("the weights are rounded to int8, which is not saved: load the model without int8 first")
        folder = files.check_output_folder(Path(folder))
        self.flow.save_pretrained(folder / components.FLOW, dtype, shard_bytes=shard_bytes)
        coder = components.save_autoencoder(self.autoencoder, self.config.autoencoder, folder, parts, dtype)
        reader = self.config.conditioner
        if self.conditioner is not None and reader is not None:
            reader = components.save_conditioner(self.conditioner, reader, folder, parts)
        stored = dataclasses.replace(self.config, autoencoder=coder, conditioner=reader)
        files.write_json(folder / "config.json", to_dict(stored))

    def push_to_hub(
        self,
        repository: str,
        private: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        parts: Parts = "local",
        licence: str = "",
    ) -> str:
        """Upload the pipeline to the hub with a generated model card; returns the commit's address.

        Args:
            repository: "owner/name", made where it is missing.
            private: whether a new one is.
            dtype: of the stored weights.
            parts: see `save_pretrained`.
            licence: the hub's name of the weights' licence, for the card.

        Raises:
            UserError: not logged in, no right to write, or the hub cannot be reached.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder, dtype, parts=parts)
            prompt = "" if self.conditioner is None else '"a red apple", '
            if isinstance(self.conditioner, ClassLabels):
                prompt = f'"{self.conditioner.spec.names[0]}", '
            example = f"({prompt}guidance={self.config.guidance:g}, seed=0)"
            card = model_card(repository, facts_of(self.config, self.flow), example, licence)
            files.write_text(folder / "README.md", card)
            return push_folder(folder, repository, private)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> StarFlowPipeline:
        """Move everything to `device`, and the flow to `dtype`; of one that is offloaded, what is at work."""
        try:
            if self.flow.offloaded_to is None:
                self.flow.to(device=device, dtype=dtype)
            else:
                torch.empty(0, device=device)  # whether there is one
                self.flow.to(dtype=dtype or self.flow.network_dtype).offload(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"cannot use device '{device}': {str(error).splitlines()[0]}; try --device cpu") from None
        for part in (self.autoencoder, self.decoder, self.conditioner):
            network = getattr(part, "network", None)
            if network is not None:
                network.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the flow computes."""
        return self.flow.device

    @property
    def size_multiple(self) -> int:
        """What both sides of a picture must be multiples of, in pixels."""
        return sizes.multiple(self.config, self.flow.config)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError: (width, height) in pixels that the model cannot make."""
        sizes.check(self.config, self.flow.config, size)

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        num_images: int = 1,
        guidance: float | Sequence[float] | Tensor | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        solver: SolverChoice = "auto",
        guidance_rule: Literal["gaussian", "linear"] = "gaussian",
        guidance_schedule: Literal["constant", "linear"] = "constant",
        temperature: float | None = None,
        candidates: int | None = None,
        cleaning: Cleaning | None = None,
        batch_size: int = BATCH,
        cache_dtype: CacheDtype = "network",
        tile: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generated:
        """Draw `num_images` pictures of every prompt; picture i of the whole call has the seed `seed + i`.

        Args:
            prompt: text, or a class's name or number; "" is unconditional.
            num_images: pictures a prompt.
            guidance: weight w >= 0, 0 is unguided: one, or one a picture of the whole call; by default the model's own.
            seed: of the first picture.
            size: (width, height) in pixels; by default that of training.
            solver: "sequential" | "jacobi" | "auto" | a policy a block; see `starflow.sample`.
            guidance_rule: "gaussian" (STARFlow) or "linear" (TarFlow).
            guidance_schedule: "constant" or "linear" (annealed).
            temperature: factor on the noise: 1 is the model's own distribution, less is nearer its modes, simpler and
                cleaner (Glow, arXiv 1807.03039, section 6); by default the model's own.
            candidates: pictures drawn for each one that is kept, which is the likeliest of them under its prompt; by
                default the model's own. 1, and a temperature of 1, sample from the model.
            cleaning: the samples' way out of the noise, "decoder", "tweedie" or "none"; by default the model's own,
                and with another `decoder` that one's if it was trained for noise, else a Tweedie step.
            batch_size: pictures or candidates sampled at once; changes memory, not pictures.
            cache_dtype: precision of keys and values: the "network"'s, or "bfloat16" to halve a float32 cache.
            tile: side in latent pixels of the tiles that are decoded one by one, for memory; None is whole batches.
            progress: called with (steps done, steps in all).

        Raises:
            UserError: a prompt or size that the model cannot take, negative guidance, not one weight a picture, a
                temperature of 0 or less, no candidates.
        """
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images)]
        if not prompts or batch_size < 1:
            raise UserError(f"{len(prompts)} pictures in batches of {batch_size}: both must be at least 1")
        weights = _weights(self.config.guidance if guidance is None else guidance, len(prompts))
        drawn_as = self._drawn_as(temperature, candidates)
        settings = SampleSettings(0.0, solver, guidance_rule, guidance_schedule, cache_dtype=cache_dtype)
        shape = self._latent_shape(size)
        way = self._way_out(cleaning)
        if size is not None and (note := sizes.untrained(self.config, self.flow.config, size)):
            warnings.warn(note, stacklevel=2)
        self._prepare(prompts, shape)
        seeds = [seed + index for index in range(len(prompts))]
        images: list[Image] = []
        latents = []
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            condition, null = self._condition(some, shape)
            noise = candidate_noise(seeds[start : start + batch_size], shape, drawn_as.candidates)
            drawn = best_candidates(
                self.flow,
                drawn_as.temperature * noise.to(self.device),
                condition,
                null,
                dataclasses.replace(settings, guidance=weights[start : start + batch_size]),
                batch_size,
                offset_progress(progress, start // batch_size, math.ceil(len(prompts) / batch_size)),
            )
            latents.append(drawn)
            images += to_pil(self._picture(drawn, condition, way, tile))
        return Generated(images, torch.cat(latents), prompts, seeds)

    def calibrate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        guidance: float | None = None,
        batches: Sequence[int] = (1, 4, 16),
        tolerance: float = 1e-3,
        repeats: int = 3,
        note: Callable[[str], None] = lambda _: None,
    ) -> Policy:
        """Choose by measuring how each block is solved here; `solver="auto"` and `save_pretrained` use it then.

        Args:
            prompts: of the kind that will be drawn; None is some of our own, or the model's classes.
            guidance: weight to measure with; by default the model's own.
            batches: sizes to time; each block gets one choice for all of them.
            tolerance: bound on the residual of every block and picture.
            repeats: timed runs, of which the fastest counts.
            note: told what is being measured.

        Raises:
            UserError: a prompt that the model cannot take.
        """
        data = self.calibration_data(prompts, guidance=guidance, tolerance=tolerance)
        policy = calibrate(self.flow, data, batches, repeats, note)
        keep_policy(self.flow, policy)
        return policy

    def calibration_data(
        self, prompts: Sequence[str] | None = None, *, guidance: float | None = None, tolerance: float = 1e-3
    ) -> CalibrationData:
        """Noise and encoded conditions to measure with, a picture a prompt; as for `calibrate`."""
        drawn = list(prompts or self._usual_prompts())
        weight = self.config.guidance if guidance is None else guidance
        condition, null = self._condition(drawn)
        noise = self.config.temperature * noise_from_seeds(range(len(drawn)), self._latent_shape(None)).to(self.device)
        return CalibrationData(noise, condition, null, SampleSettings(weight, tolerance=tolerance))

    def _usual_prompts(self) -> list[str]:
        if self.conditioner is None:
            return [""] * CALIBRATION_PICTURES
        if isinstance(self.conditioner, ClassLabels):
            names = self.conditioner.spec.names
            return [names[index % len(names)] for index in range(CALIBRATION_PICTURES)]
        return [f"a {colour} {thing}" for thing in ("apple", "car", "cat", "tree") for colour in ("red", "blue")]

    def log_prob(self, image: Image, prompt: str = "", *, seed: int = 0, draws: int = 1) -> LogProb:
        """Exact log-density of a picture's latent with the model's training noise added under `seed`.

        Args:
            image: its sides must fit the model.
            prompt: what it is said to show.
            seed: of the noise; draw d has the seed `seed + d`.
            draws: of the noise, to average over.

        Raises:
            UserError: the picture's sides do not fit the model, or no draws.
        """
        if draws < 1:
            raise UserError(f"draws is {draws}, expected at least 1")
        picture = from_pil(image).to(self.device)
        found = [self.log_probs(picture, [prompt], [seed + draw]) for draw in range(draws)]
        values, dimensions = torch.cat([nats for nats, _ in found]).double(), found[0][1]
        nats = float(values.mean())
        error = float(values.std()) / math.sqrt(draws) if draws > 1 else None
        return LogProb(nats, -nats / (dimensions * math.log(2)), dimensions, self.density_space, draws, error)

    @property
    def density_space(self) -> str:
        """What `log_prob` is the density of; see `LogProb.space`."""
        if self.config.autoencoder.kind != "pixels":
            return "noised latent"
        return "8-bit pixels" if self.config.noise == "uniform" else "noised pixels"

    @torch.no_grad()
    def log_probs(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, int]:
        """`log_prob` of pictures (B, 3, H, W) in [-1, 1]: nats (B,), and the dimensions of each latent."""
        latents = self._noised(images, seeds)
        condition, _ = self._condition(prompts, latents.shape)
        dimensions = latents[0].numel()
        return self.flow.log_prob(latents, condition) - dimensions * self._level_nats, dimensions

    @torch.no_grad()
    def log_prob_maps(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Each token's part of `log_probs`, in nats (B, h, w); see `starflow.flow.model`."""
        latents = self._noised(images, seeds)
        condition, _ = self._condition(prompts, latents.shape)
        maps = token_log_prob(self.flow, latents, condition)
        return maps - latents[0].numel() / maps[0].numel() * self._level_nats

    @property
    def _level_nats(self) -> float:
        """log of the levels in a unit of the flow's input, which turns a density into a probability of a level."""
        return math.log(128) if self.config.noise == "uniform" else 0.0

    def _noised(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Pictures as the flow is trained on them: latents with the noise of each seed."""
        latents = self.autoencoder.encode(images)
        if self.config.noise == "uniform":
            draws = [torch.rand(latents.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return dequantise(latents, torch.stack(draws).to(self.device))
        return latents + self.config.noise_std * noise_from_seeds(seeds, tuple(latents.shape[1:])).to(self.device)

    @torch.no_grad()
    def encode(self, image: Image, prompt: str = "") -> Tensor:
        """A picture to the flow's noise z (1, C, h, w), through its latent, without added noise."""
        latents = self._latents(image)
        condition, _ = self._condition([prompt], latents.shape)
        z: Tensor = self.flow(latents, condition)[0]
        return z

    def decode(self, z: Tensor, prompt: str = "") -> Image:
        """Noise z (1, C, h, w) to a picture: the exact inverse of `encode` on latents, not through the autoencoder."""
        condition, _ = self._condition([prompt] * len(z), z.shape)
        latents = sample(self.flow, z.to(self.device), condition)
        return to_pil(self._decode(latents))[0]

    def _latents(self, image: Image) -> Tensor:
        return self.autoencoder.encode(from_pil(image).to(self.device))

    def _decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        with torch.no_grad():
            decoder = self.decoder or self.autoencoder
            return decode_in_tiles(decoder, latents, tile) if tile else decoder.decode(latents)

    def _picture(
        self, latents: Tensor, condition: Tensor | None, cleaning: Cleaning, tile: int | None = None
    ) -> Tensor:
        """Sampled latents to pictures (B, 3, H, W) in [-1, 1], cleaned of the noise."""
        if cleaning == "tweedie":
            latents = denoise(self.flow, latents, condition, sigma=self.config.noise_std)
        return self._decode(latents, tile)

    def _way_out(self, asked: Cleaning | None) -> Cleaning:
        """The cleaning that is asked for, or else the one that fits what decodes."""
        config, trained = self.config, (self.decoder or self.autoencoder).spec.noise_std > 0
        if asked == "tweedie" and not config.noise_std:
            raise UserError(
                f"cleaning is 'tweedie', but '{config.name}' was trained without Gaussian noise: use 'none'"
            )
        if asked == "decoder" and config.noise_std and not trained:
            warnings.warn("cleaning is 'decoder', but the decoder was not trained for noise: it stays", stacklevel=3)
        if asked is not None or self.decoder is None or config.cleaning == "none":
            return asked or config.cleaning
        return "decoder" if trained else "tweedie"

    def prepare(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> None:
        """Encode prompts that several calls are going to draw at a size, so that a text encoder is loaded once.

        Raises:
            UserError: a size that the model cannot make.
        """
        self._prepare(prompts, self._latent_shape(size))

    def _prepare(self, prompts: Sequence[str], shape: Sequence[int]) -> None:
        if isinstance(self.conditioner, OnDemandTextEncoder):
            self.conditioner.encode_ahead(sizes.told(self.config, prompts, shape))

    def _drawn_as(self, temperature: float | None, candidates: int | None) -> PipelineConfig:
        """The configuration with what is asked for in place of its defaults; it refuses what no model may have."""
        own = self.config
        return dataclasses.replace(
            own,
            temperature=own.temperature if temperature is None else temperature,
            candidates=own.candidates if candidates is None else candidates,
        )

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        width, height = size or (self.config.image_size, self.config.image_size)
        self.check_size((width, height))
        factor = self.config.autoencoder.factor
        return self.flow.config.in_channels, height // factor, width // factor

    def _condition(self, prompts: Sequence[str], shape: Sequence[int] = (1, 1)) -> tuple[Tensor | None, Tensor | None]:
        """Condition and null condition of a batch, as the flow takes them; `shape` ends with the latents' (h, w)."""
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
        if self.conditioner.spec.kind != "class":
            prompts = sizes.told(self.config, prompts, shape)
        return self.conditioner.encode(prompts), self.conditioner.null(len(prompts))


def _usual_dtype(flow: STARFlow | TarFlow) -> torch.dtype:
    """Of the network where nobody says: float32, or what is stored where that is half of something large."""
    large = parameter_count(flow.config) > LARGE
    return flow.network_dtype if large and flow.network_dtype == torch.bfloat16 else torch.float32


def _weights(guidance: float | Sequence[float] | Tensor, pictures: int) -> Tensor:
    """The weight of each picture.

    Raises:
        UserError: neither one weight for all nor one a picture.
    """
    weights = torch.as_tensor(guidance, dtype=torch.float64).cpu()
    if weights.shape not in ((), (1,), (pictures,)):
        got = f"{len(weights)} weights" if weights.ndim == 1 else f"shape {tuple(weights.shape)}"
        raise UserError(f"guidance has {got}, expected one weight, or one for each of {pictures} pictures")
    return weights.expand(pictures)
