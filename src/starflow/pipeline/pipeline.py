"""A pipeline draws pictures from prompts and reads densities from pictures: conditioner, flow, autoencoder.

    pipe = StarFlowPipeline.from_pretrained("glyphs")
    pipe("a red apple", num_images=4, guidance=2.0, seed=0).images[0].save("apple.png")
    pipe.log_prob(image, "a red apple", seed=0)      # LogProb(nats, bits_per_dim, dimensions)
    z = pipe.encode(image, "a red apple"); image = pipe.decode(z, "a red apple")

Contract: picture i of a call depends on the weights, its prompt, its guidance weight, seed + i and the number of
candidates alone, not on the batch it is in. Sizes are (width, height) in pixels. A pipeline is a folder: config.json,
flow/, and the parts that it holds itself, autoencoder/ and conditioner/ (see `starflow.pipeline.folder`).
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from starflow.conditioning import Conditioner
from starflow.data.images import to_pil
from starflow.errors import UserError
from starflow.flow.finite import NotFiniteError, broken_rows, check_finite, check_trace
from starflow.flow.model import STARFlow, TarFlow
from starflow.flow.quantize import is_rounded, set_weight_format
from starflow.flow.tokens import check_tensor
from starflow.io import files
from starflow.io.hub import HubOptions
from starflow.io.weights import SHARD_BYTES
from starflow.latents import Autoencoder
from starflow.latents.base import decode_in_tiles
from starflow.nn.quantize import WeightFormat
from starflow.pipeline.config import (
    Cleaning,
    PipelineConfig,
    choose_cleaning,
    guidance_weights,
    latent_shape,
    own_guidance,
    size_multiple,
    untrained_size_warning,
    with_sampling_options,
)
from starflow.pipeline.editing import PictureEditing
from starflow.pipeline.folder import (
    Parts,
    default_dtype,
    load_parts,
    open_decoder,
    open_denoiser,
    open_student,
    save_companions,
    save_parts,
    write_card,
)
from starflow.pipeline.inputs import (
    check_counts,
    check_memory,
    check_pair,
    check_prompts,
    check_seed,
    check_student_call,
    encode_prompts,
    read_image,
    remember_prompts,
)
from starflow.pipeline.likelihood import PictureLikelihood
from starflow.pipeline.locate import find_pipeline, push_folder
from starflow.sampling.denoise import Denoiser, denoise
from starflow.sampling.policy import CacheDtype, SampleSettings, SolverChoice
from starflow.sampling.sampler import ProgressCallback, best_candidates, candidate_noise, offset_progress, sample
from starflow.sampling.student import Student, draw_by_student

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 16
"""Pictures sampled at once by default."""


@dataclass(frozen=True)
class Generated:
    """What a call returns."""

    images: list[Image]
    latents: Tensor
    """(B, C, h, w): what the flow sampled, before cleaning."""
    prompts: list[str]
    seeds: list[int]


class StarFlowPipeline(PictureEditing, PictureLikelihood):
    """A conditioner, a flow and an autoencoder that belong together.

    >>> from starflow.conditioning import ClassLabels
    >>> from starflow.flow.config import TarFlowConfig
    >>> from starflow.latents import PixelLatents
    >>> flow = TarFlow(TarFlowConfig(3, 8, 4, 64, num_blocks=2, layers_per_block=1, num_classes=2))
    >>> labels, pixels = ClassLabels(("circle", "star")), PixelLatents()
    >>> config = PipelineConfig("untrained", 8, 0.1, pixels.spec, labels.spec, cleaning="none")
    >>> pipe = StarFlowPipeline(flow, pixels, labels, config)
    >>> made = pipe("star", num_images=2, seed=5, solver="sequential")
    >>> made.images[0].size, made.seeds
    ((8, 8), [5, 6])
    >>> pipe.log_prob(made.images[0], "star", seed=0).dimensions
    192
    """

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
        self.student: Student | None = None
        """What draws in one parallel pass, an approximation of the flow, where the model has one."""
        self.denoiser: Denoiser | None = None
        """What has learned to take the noise off, where the model has it."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        weights: WeightFormat | None = None,
        offload: bool = False,
        decoder: str | None = None,
        keep_text_encoder: bool | None = None,
        conditioner: Conditioner | None = None,
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
            weights: format of the weights of the flow's layers, for speed and memory: "int8" or "int4", or "bfloat16"
                under float32 arithmetic; None is `dtype`. On other devices than a CPU integers need torchao.
            offload: keep the flow's blocks on the CPU, and on `device` the one that is at work, for memory.
            decoder: folder or hub id of another autoencoder that turns latents into pictures: a small one of the same
                latents, such as TAESD for sd-vae's, or one with a decoder of `starflow train-decoder`.
            keep_text_encoder: whether it stays in memory between calls; None keeps one whose files are under a
                gigabyte, and loads and releases a larger one where it is needed.
            conditioner: one of your own in place of the stored one; see `starflow.conditioning.base.Conditioner`.
            revision: of the repository: a branch, tag or commit.
            cache: folder of downloads; None is huggingface_hub's own.
            offline: take only what is cached.

        Raises:
            UserError: nothing there, or its files are damaged or do not fit each other.
        """
        hub = HubOptions(revision, cache, offline)
        folder = find_pipeline(str(model), hub, "float32" if dtype == torch.float32 else "bfloat16")
        pipeline = cls(*load_parts(folder, hub, keep_text_encoder, conditioner))
        pipeline.student = open_student(folder, pipeline.flow)
        pipeline.denoiser = open_denoiser(folder, pipeline.flow)
        if decoder is not None:
            pipeline.decoder = open_decoder(decoder, pipeline.autoencoder, pipeline.config.autoencoder, hub)
        flow, dtype = pipeline.flow, dtype or default_dtype(pipeline.flow)
        if weights is not None:
            set_weight_format(flow.to(dtype), weights, device)  # before they move: whole, they may not fit the device
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
        if is_rounded(self.flow):
            raise UserError("the weights are rounded, which is not saved: load the model without weights= first")
        folder = files.check_output_folder(Path(folder))
        save_companions(self.student, self.denoiser, folder, dtype)
        save_parts(self.flow, self.autoencoder, self.conditioner, self.config, folder, dtype, parts, shard_bytes)

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
            write_card(folder, repository, self.config, self.flow, self.conditioner, licence)
            return push_folder(folder, repository, private)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> StarFlowPipeline:
        """Move everything to `device`, and the flow to `dtype`; of one that is offloaded, what is at work."""
        try:
            if self.flow.offloaded_to is None:
                self.flow.to(device=device, dtype=dtype)
            else:
                torch.empty(0, dtype=torch.float32, device=device)  # whether there is one
                self.flow.to(dtype=dtype or self.flow.network_dtype).offload(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"cannot use device '{device}': {str(error).splitlines()[0]}; try --device cpu") from None
        networks = [getattr(part, "network", None) for part in (self.autoencoder, self.decoder, self.conditioner)]
        for network in (*networks, self.student, self.denoiser):
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
        return size_multiple(self.config, self.flow.config)

    def remember_prompts(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> None:
        """Encode prompts that several calls will draw at a size, so that a text encoder is loaded once."""
        remember_prompts(
            check_prompts(prompts), self.conditioner, self.config, latent_shape(self.config, self.flow.config, size)
        )

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        num_images: int = 1,
        guidance: float | Sequence[float] | Tensor | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        sampler: Literal["flow", "student"] = "flow",
        solver: SolverChoice = "auto",
        guidance_rule: Literal["gaussian", "linear"] = "gaussian",
        guidance_schedule: Literal["constant", "linear"] = "constant",
        temperature: float | None = None,
        candidates: int | None = None,
        cleaning: Cleaning | None = None,
        batch_size: int = BATCH,
        cache_dtype: CacheDtype = "network",
        tile: int | None = None,
        progress: ProgressCallback | None = None,
        not_finite: Literal["raise", "keep"] = "raise",
    ) -> Generated:
        """Draw `num_images` pictures of every prompt; picture i of the whole call has the seed `seed + i`.

        Args:
            prompt: text, or a class's name or number; "" is unconditional.
            num_images: pictures a prompt.
            guidance: weight w >= 0, 0 is unguided: one, or one a picture of the whole call; by default the model's own.
            seed: of the first picture.
            size: (width, height) in pixels; by default that of training.
            sampler: "flow", or the model's "student", an approximation of it in one parallel pass, which draws by
                default one candidate at a temperature of its own, of latents without noise.
            solver: "sequential" | "jacobi" | "auto" | a policy a block; see `starflow.sample`.
            guidance_rule: "gaussian" (STARFlow) or "linear" (TarFlow).
            guidance_schedule: "constant" or "linear" (annealed).
            temperature: factor on the noise: 1 is the model's own distribution, less is nearer its modes, simpler and
                cleaner (Glow, arXiv 1807.03039, section 6); by default the model's own.
            candidates: pictures drawn for each one that is kept, which is the likeliest of them under its prompt; by
                default the model's own. 1, and a temperature of 1, sample from the model.
            cleaning: the samples' way out of the noise, "decoder", "tweedie", "denoiser" or "none"; by default the
                model's own, and with another `decoder` that one's if it was trained for noise, else a Tweedie step.
            batch_size: pictures or candidates sampled at once; changes memory, not pictures.
            cache_dtype: precision of keys and values: the "network"'s, or "bfloat16" to halve a float32 cache.
            tile: side in latent pixels of the tiles that are decoded one by one, for memory; None is whole batches.
            progress: called with (steps done, steps in all).
            not_finite: "keep" returns pictures whose latents are not finite, which show nothing, for who counts them.

        Raises:
            UserError: a prompt or size that the model cannot take, negative guidance, not one weight a picture, a
                temperature of 0 or less, no candidates, more memory than is free, or pictures that are not finite.
        """
        check_counts(num_images, batch_size, candidates, tile, not_finite)
        prompts = [text for text in check_prompts(prompt, least=1) for _ in range(num_images)]
        size = None if size is None else check_pair(size)
        seed = check_seed(seed, len(prompts))
        own = own_guidance(self.config, self.student if sampler == "student" else None)
        weights = guidance_weights(own if guidance is None else guidance, len(prompts))
        settings = SampleSettings(0.0, solver, guidance_rule, guidance_schedule, cache_dtype=cache_dtype)
        student = check_student_call(sampler, self.student, self.config.name, settings, cleaning, weights)
        drawn_as = with_sampling_options(self.config, temperature, candidates, student.config if student else None)
        shape = latent_shape(self.config, self.flow.config, size)
        cleaning = "none" if student else self._cleaning(cleaning)
        if size is not None and (note := untrained_size_warning(self.config, self.flow.config, size)):
            warnings.warn(note, stacklevel=2)
        at_once = min(batch_size, len(prompts) * drawn_as.candidates)
        decoder = (self.decoder or self.autoencoder).spec
        check_memory(self.flow, shape, at_once, cache_dtype, decoder, tile, denoised=cleaning == "tweedie")
        remember_prompts(prompts, self.conditioner, self.config, shape)
        seeds = [seed + index for index in range(len(prompts))]
        images: list[Image] = []
        latents = []
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            drawn, condition = self._sample(
                prompts[some],
                candidate_noise(seeds[some], shape, drawn_as.candidates + (1 if student else 0)),
                drawn_as.temperature,
                dataclasses.replace(settings, guidance=weights[some]),
                batch_size,
                offset_progress(progress, start // batch_size, math.ceil(len(prompts) / batch_size)),
                student,
                keep=not_finite == "keep",
            )
            latents.append(drawn)
            images += to_pil(self._decode_clean(drawn, condition, cleaning, tile, keep=not_finite == "keep"))
        return Generated(images, torch.cat(latents), prompts, seeds)

    @torch.no_grad()
    def encode(self, image: Image | str | Path, prompt: str = "") -> Tensor:
        """A picture, or a file of one, to the flow's noise z (1, C, h, w), through its latent, without added noise."""
        latents = self.autoencoder.encode(read_image(image).to(self.device))
        return self._check_pass(latents, check_prompts(prompt, 1))

    def decode(self, z: Tensor, prompt: str | Sequence[str] = "") -> Image | list[Image]:
        """Noise z (B, C, h, w) to a picture, or to a list of them where B is not 1.

        It is the exact inverse of `encode` on latents, not through the autoencoder. A prompt is for each, or for all.

        Raises:
            UserError: a shape that the model cannot take, values that are not finite, or not as many prompts.
        """
        check_tensor("z", z)
        condition, _ = self._condition(check_prompts(prompt, len(z)), z.shape)
        latents = sample(self.flow, z.to(self.device), condition)
        pictures = to_pil(self._decode(latents)) if len(latents) else []
        return pictures[0] if len(pictures) == 1 else pictures

    @torch.no_grad()
    def _check_pass(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Noise z of latents; UserError where it is not finite."""
        condition, _ = self._condition(prompts, latents.shape)
        trace = self.flow.trace(latents, condition)
        check_trace(self.flow, trace, {"latent": latents, "condition": condition})
        return trace.z

    def _sample(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        temperature: float,
        settings: SampleSettings,
        batch_size: int,
        progress: ProgressCallback | None,
        student: Student | None = None,
        *,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Latents (B, C, h, w) of a batch from its candidates' noise, and their condition.

        For a student's draws the last noise of each picture is what its candidates are scored with.
        """
        condition, null = self._condition(prompts, noise.shape)
        if student is not None:
            noise, weight = noise.to(self.device), torch.as_tensor(settings.guidance, dtype=torch.float32, device="cpu")
            own = self.config.noise_std * noise[:, -1]
            drawn = draw_by_student(
                student, self.flow, temperature * noise[:, :-1], condition, weight, own, batch_size, progress
            )
            return drawn, condition
        drawn = best_candidates(
            self.flow, temperature * noise.to(self.device), condition, null, settings, batch_size, progress, keep=keep
        )
        return drawn, condition

    def _cleaning(self, asked: Cleaning | None) -> Cleaning:
        decoder = (self.decoder or self.autoencoder).spec
        replaced, denoiser = self.decoder is not None, self.denoiser is not None
        return choose_cleaning(self.config, asked, decoder, replaced=replaced, denoiser=denoiser)

    def _decode(self, latents: Tensor, tile: int | None = None, *, keep: bool = False) -> Tensor:
        with torch.no_grad():
            decoder = self.decoder or self.autoencoder
            images = decoder.decode(latents) if tile is None else decode_in_tiles(decoder, latents, tile)
        if not keep and (broken := broken_rows(images)):
            raise NotFiniteError(f"picture {broken[0]} was decoded to values that are not finite: use another decoder")
        return images

    def _decode_clean(
        self,
        latents: Tensor,
        condition: Tensor | None,
        cleaning: Cleaning,
        tile: int | None = None,
        *,
        keep: bool = False,
    ) -> Tensor:
        """Sampled latents to pictures (B, 3, H, W) in [-1, 1], cleaned of the noise."""
        if cleaning == "tweedie":
            latents = denoise(self.flow, latents, condition, sigma=self.config.noise_std)
        if cleaning == "denoiser":
            assert self.denoiser is not None
            latents = self.denoiser.clean(latents, condition)
        if cleaning in ("tweedie", "denoiser") and not keep:
            check_finite(self.flow, latents, {"condition": condition}, {}, "cleaning overflows: use 'none'")
        return self._decode(latents, tile, keep=keep)

    def _condition(self, prompts: Sequence[str], shape: Sequence[int] = (1, 1)) -> tuple[Tensor | None, Tensor | None]:
        """Condition and null condition of a batch, as the flow takes them; `shape` ends with the latents' (h, w)."""
        return encode_prompts(prompts, self.conditioner, self.flow, self.config, shape)
