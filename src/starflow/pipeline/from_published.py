"""A published checkpoint is converted into a pipeline: its options name the parts around the flow for config.json.

The published YAML names autoencoder, text encoder, noise and guidance; a TarFlow is of pixels. Where the options name
no autoencoder and none is given, the flow is written alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from starflow.conditioning import ClassLabels, ConditionerSpec
from starflow.conditioning.text import encoder_width, find_text_encoder
from starflow.config import to_dict
from starflow.data.buckets import Aspect
from starflow.errors import UserError
from starflow.flow.config import ModelConfig, STARFlowConfig, TarFlowConfig
from starflow.flow.memory import parameter_count
from starflow.io import files
from starflow.io.hub import HubOptions
from starflow.latents import AutoencoderSpec, load_trainable
from starflow.pipeline.config import Cleaning, PipelineConfig
from starflow.pipeline.folder import AUTOENCODER, BUNDLED, FLOW, bundled_folder
from starflow.published.checkpoint import AUTOENCODER_FACTORS, ignored_options, open_published, pipeline_options
from starflow.published.convert import SHARD_BYTES, ByteProgress, convert_flow, no_progress

SD_SCALING = 0.18215
"""Factor of Stable Diffusion's latents."""


@dataclass(frozen=True)
class PipelineOverrides:
    """The parts around the flow, where the options do not name them or are to be overruled; None keeps the options."""

    autoencoder: str | None = None
    """Folder or hub id."""
    text_encoder: str | None = None
    """Folder or hub id."""
    noise_std: float | None = None
    """Standard deviation of the noise in the training data."""
    guidance: float | None = None
    """Default guidance weight."""
    aspects: tuple[Aspect, ...] = ()
    """Ratios that the model was trained on, which published options do not name; empty is squares only."""


NO_OVERRIDES = PipelineOverrides()
"""The parts as the options name them."""


@dataclass(frozen=True)
class ConvertedPipeline:
    """The outcome of a conversion: where it lies, its size, and what of the input was ignored."""

    folder: Path
    whole: bool
    """Whether it is a pipeline, rather than a flow alone."""
    parameters: int
    bytes: int
    """Of the written weights, on the disk."""
    ignored_keys: list[str]
    """Of the checkpoint: deprecated, or made anew from the options."""
    ignored_options: list[str]
    """Settings of a training run."""


def convert(
    file: Path,
    options: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    overrides: PipelineOverrides = NO_OVERRIDES,
    *,
    name: str = "",
    shard_bytes: int = SHARD_BYTES,
    progress: ByteProgress = no_progress,
) -> ConvertedPipeline:
    """Write a checkpoint as a pipeline's folder, or where no autoencoder is known as a flow's.

    Keys, shapes, options, what is around the flow and the room on the disk are looked at before anything is written.

    Args:
        file: a `.pth` (one of torch before 1.6 is read as a whole) or `.safetensors`.
        options: the published configuration, as `load_published` takes it.
        folder: made where it is missing.
        dtype: of the written weights.
        overrides: of what the options say around the flow.
        name: of the model; "" is the file's.
        shard_bytes: size that a file stays under.
        progress: told the bytes written so far and in all.

    Raises:
        UserError: as `load_published`; a video model; an autoencoder or a text encoder that is nowhere, or does not
            fit; the folder cannot be written, or the disk has no room.
    """
    checkpoint, stated = open_published(file, options), pipeline_options(options)
    whole = bool(overrides.autoencoder or stated.get("vae")) or isinstance(checkpoint.config, TarFlowConfig)
    config = pipeline_config(name or file.stem, checkpoint.config, stated, overrides) if whole else None
    lost = [name for name, value in vars(overrides).items() if value not in (None, ())]
    if lost and not whole:
        raise UserError(
            f"the options name no autoencoder, so a flow alone is written, which keeps no {', '.join(lost)}: give an "
            "autoencoder (--autoencoder), or leave that out"
        )
    files.check_output_folder(folder)
    (folder / "config.json").unlink(missing_ok=True)  # it comes last, so its presence means that all is there
    size = convert_flow(
        checkpoint, folder / FLOW if whole else folder, dtype, shard_bytes=shard_bytes, progress=progress
    )
    if config is not None:
        files.write_json(folder / "config.json", to_dict(config))
    return ConvertedPipeline(
        folder, whole, parameter_count(checkpoint.config), size, checkpoint.ignored, ignored_options(options)
    )


def pipeline_config(
    name: str, flow: ModelConfig, stated: Mapping[str, Any], overrides: PipelineOverrides
) -> PipelineConfig:
    """config.json of a pipeline, from the flow's and what options say around it.

    Raises:
        UserError: an autoencoder or a text encoder that cannot be found, or does not fit.
    """
    autoencoder_spec = _autoencoder(overrides.autoencoder or stated.get("vae"), flow)
    if overrides.noise_std is None and "noise_std" not in stated:
        warnings.warn(
            "the options name no noise level (noise_std): it is taken as 0, and samples are not cleaned; "
            "published latent models have 0.3, give it by --noise-std"
        )
    if overrides.guidance is None and "cfg" not in stated:
        warnings.warn(
            "the options name no guidance weight (cfg): samples are unguided by default; give it by --guidance"
        )
    noise = float(stated.get("noise_std", 0.0) if overrides.noise_std is None else overrides.noise_std)
    conditioner_spec = _conditioner(overrides.text_encoder or stated.get("text"), flow)
    guidance = float(stated.get("cfg", 0.0) if overrides.guidance is None else overrides.guidance)
    cleaning: Cleaning = "decoder" if autoencoder_spec.noise_std else "tweedie" if noise else "none"
    side, aspects = flow.img_size * autoencoder_spec.factor, overrides.aspects
    parts = (autoencoder_spec, conditioner_spec)
    return PipelineConfig(name, side, noise, *parts, guidance, cleaning, aspects=aspects)


def _autoencoder(source: str | None, flow: ModelConfig) -> AutoencoderSpec:
    if source is None:
        return AutoencoderSpec("pixels", flow.in_channels, 1)
    if source in BUNDLED and not Path(source).is_dir():
        source = str(bundled_folder(source) / AUTOENCODER)
    if source in AUTOENCODER_FACTORS and not Path(source).is_dir():
        found = AutoencoderSpec("diffusers_kl", 4, AUTOENCODER_FACTORS[source], SD_SCALING, 0.0, source)
    else:
        found = load_trainable(source).spec
    if Path(source).expanduser().is_dir():
        found = dataclasses.replace(found, source=str(Path(source).expanduser().resolve()))
    if found.channels != flow.in_channels:
        raise UserError(
            f"the autoencoder '{source}' has {found.channels} channels, the flow {flow.in_channels}: "
            "name the one that it was trained with"
        )
    return found


def _conditioner(source: str | None, flow: ModelConfig) -> ConditionerSpec | None:
    """A text encoder where one is named, else classes by their numbers where the model has any."""
    if isinstance(flow, TarFlowConfig):
        return _numbered_classes(flow.num_classes) if flow.num_classes else None
    assert isinstance(flow, STARFlowConfig)
    if not flow.txt_size:
        return None
    if source is None and flow.txt_size == 1:
        return _numbered_classes(flow.txt_dim - 1)
    if source is None:
        raise UserError(
            f"the model reads {flow.txt_size} tokens of width {flow.txt_dim}, and its options name no text encoder: "
            "name it, as 'text' there or by --text-encoder"
        )
    folder = _local_encoder(source)
    if folder is not None and (width := encoder_width(folder)) != flow.txt_dim:
        raise UserError(
            f"the text encoder '{source}' has width {width}, the model expects {flow.txt_dim}: "
            "name the one that it was trained with"
        )
    named = Path(source).expanduser()
    place = str(named.resolve()) if named.is_dir() else source
    return ConditionerSpec("text", flow.txt_size, flow.txt_dim, place, dtype="bfloat16")


def _local_encoder(source: str) -> Path | None:
    """The folder of a text encoder as far as it is on this machine; nothing is fetched."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        return find_text_encoder(source, HubOptions(offline=True))
    except UserError:
        return None


def _numbered_classes(classes: int) -> ConditionerSpec:
    return ClassLabels([str(number) for number in range(classes)]).spec
