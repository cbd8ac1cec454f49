"""The folder of a pipeline: config.json, its parts in flow/, autoencoder/ and conditioner/, and a card for the hub.

Contract: a part whose source in config.json is "./autoencoder" or "./conditioner" (or "autoencoder", for one of our
own) lies in the pipeline's folder, wherever that is moved to. Any other source is a folder elsewhere or a repository
of the hub, which is found, or fetched, when the pipeline is loaded.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from starflow.conditioning import (
    ClassLabels,
    Conditioner,
    ConditionerSpec,
    OnDemandTextEncoder,
    TextEncoder,
    TokenEmbeddings,
    load_conditioner,
)
from starflow.config import from_dict, to_dict
from starflow.errors import UserError
from starflow.flow.config import KINDS, STARFlowConfig
from starflow.flow.memory import parameter_count
from starflow.flow.model import Flow, STARFlow, TarFlow
from starflow.io import files
from starflow.io.hub import HubOptions
from starflow.latents import Autoencoder, AutoencoderSpec, load_autoencoder, load_trainable, save_trainable
from starflow.latents.small import SmallLatents, save_small
from starflow.pipeline.config import FORMAT, PipelineConfig, default_size, size_multiple
from starflow.sampling.denoise import Denoiser
from starflow.sampling.student import Student

FLOW, AUTOENCODER, CONDITIONER = "flow", "autoencoder", "conditioner"
STUDENT, DENOISER = "student", "denoiser"

BUNDLED = ("glyphs",)
"""Names of the models that ship with the package."""

Parts = Literal["own", "local", "all"]
"""Which parts are written into a pipeline's folder: those that lie in it already, those of any folder here, or all."""

KNOWN_CONDITIONERS = (ClassLabels, TextEncoder, OnDemandTextEncoder, TokenEmbeddings)
"""The conditioners that config.json describes; any other is its user's own."""

LATENTS_AGREE = 0.5
"""Correlation of two autoencoders' latents from which on one may decode the other's."""

LARGE = 10**9
"""Parameters from which on a flow's stored bfloat16 is not widened to float32 unless that is asked for."""


def bundled_folder(name: str) -> Path:
    """Folder of a model that ships with the package."""
    folder = Path(str(resources.files("starflow"))) / "bundled" / name
    if not folder.is_dir():
        raise UserError(f"the bundled model '{name}' is missing from this installation: install starflow again")
    return folder


def read_config(folder: Path) -> PipelineConfig:
    """The configuration in a pipeline's folder.

    Raises:
        UserError: the folder holds no pipeline, one of a newer format, or an unknown key.
    """
    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict) or "autoencoder" not in values:
        if isinstance(values, dict) and ("in_channels" in values or values.get("kind") in KINDS):
            raise UserError(
                f"{folder} holds no pipeline but a flow alone: give it an autoencoder by "
                "`starflow convert FILE --options OPTIONS --autoencoder NAME`, or load it by STARFlow.from_pretrained"
            )
        raise UserError(f"{folder} holds no pipeline: expected a config.json with an 'autoencoder', as train writes it")
    found = values.get("format", FORMAT)
    if isinstance(found, int) and found > FORMAT:  # before its new keys are called unknown
        raise UserError(f"{folder / 'config.json'} has format {found}, expected {FORMAT} or less: update starflow")
    return from_dict(PipelineConfig, values)


def load_parts(
    folder: Path, hub: HubOptions, keep_text_encoder: bool | None, own: Conditioner | None = None
) -> tuple[STARFlow | TarFlow, Autoencoder, Conditioner | None, PipelineConfig]:
    """The flow, autoencoder, conditioner and configuration of a pipeline's folder; `own` stands for its conditioner.

    Raises:
        UserError: a part cannot be found, is damaged, or is another than described.
    """
    config = read_config(folder)
    flow = open_flow(folder).requires_grad_(False)
    autoencoder, conditioner_spec = open_autoencoder(config.autoencoder, folder, hub), config.conditioner
    if own is not None:
        _check_own_conditioner(own, flow)
        return flow, autoencoder, own, dataclasses.replace(config, conditioner=own.spec)
    if conditioner_spec is None and isinstance(flow.config, STARFlowConfig) and flow.config.txt_size:
        raise UserError(
            f"the flow of {folder} reads {flow.config.txt_size} condition tokens, and its config.json names no "
            "conditioner: give the one that it was trained with, by from_pretrained(..., conditioner=YOURS)"
        )
    conditioner = open_conditioner(conditioner_spec, folder, hub, keep_text_encoder) if conditioner_spec else None
    return flow, autoencoder, conditioner, config


def _check_own_conditioner(own: Conditioner, flow: Flow) -> None:
    """Raises UserError: a conditioner whose tokens are not those that the flow reads."""
    if isinstance(flow.config, STARFlowConfig):
        given, wanted = (own.spec.size, own.spec.dim), (flow.config.txt_size, flow.config.txt_dim)
        if given != wanted:
            raise UserError(
                f"the conditioner gives {given[0]} tokens of width {given[1]}, the flow reads {wanted[0]} of width "
                f"{wanted[1]}: give the one that it was trained with"
            )


def default_dtype(flow: Flow) -> torch.dtype:
    """The precision of a loaded flow: float32, or the stored bfloat16 where the flow is large."""
    large = parameter_count(flow.config) > LARGE
    return flow.network_dtype if large and flow.network_dtype == torch.bfloat16 else torch.float32


def open_flow(folder: Path) -> STARFlow | TarFlow:
    """The flow in a pipeline's folder, of whichever kind.

    Raises:
        UserError: it is missing or damaged.
    """
    values: Any = files.read_json(folder / FLOW / "config.json")
    kind = values.get("kind") if isinstance(values, dict) else None
    return TarFlow.from_pretrained(folder / FLOW) if kind == "tarflow" else STARFlow.from_pretrained(folder / FLOW)


def open_autoencoder(spec: AutoencoderSpec, folder: Path, hub: HubOptions) -> Autoencoder:
    """The autoencoder that a pipeline's config.json describes.

    Raises:
        UserError: it cannot be found, is damaged, or is another than described.
    """
    source = part_source(spec, folder)
    return load_autoencoder(dataclasses.replace(spec, source=source), hub.without_revision)


def open_conditioner(spec: ConditionerSpec, folder: Path, hub: HubOptions, keep: bool | None) -> Conditioner:
    """The conditioner that a pipeline's config.json describes; see `load_conditioner` for `keep`.

    Raises:
        UserError: it cannot be found, is damaged, or is another than described.
    """
    source = part_source(spec, folder)
    return load_conditioner(dataclasses.replace(spec, source=source), hub.without_revision, keep)


def open_student(folder: Path, flow: Flow) -> Student | None:
    """The student in a pipeline's folder, or None.

    Raises:
        UserError: it is damaged, or another flow's.
    """
    if not (folder / STUDENT).is_dir():
        return None
    student = Student.from_pretrained(folder / STUDENT)
    student.check_teacher(flow)
    return student


def open_denoiser(folder: Path, flow: Flow) -> Denoiser | None:
    """As `open_student`, of the learned denoiser."""
    if not (folder / DENOISER).is_dir():
        return None
    denoiser = Denoiser.from_pretrained(folder / DENOISER)
    denoiser.check_teacher(flow)
    return denoiser


def save_companions(student: Student | None, denoiser: Denoiser | None, folder: Path, dtype: torch.dtype) -> None:
    """Write what stands beside the flow, if anything, into a pipeline's folder."""
    for network in (student, denoiser):
        if network is not None:
            network.save_pretrained(folder / network.kind, dtype)


def open_decoder(source: str, own: Autoencoder, spec: AutoencoderSpec, hub: HubOptions) -> Autoencoder:
    """Another autoencoder that decodes the latents of `own`, which `spec` describes.

    It brings its own encoder, so what that makes of a picture tells whether it is for these latents. Where it is of
    another architecture than `own`, which it may approximate, a difference is a warning.

    Raises:
        UserError: it cannot be found, is damaged, or is for other latents.
    """
    found = load_trainable(source, hub.without_revision)
    shapes = [f"{one.channels} channels, {one.factor} pixels a side" for one in (found.spec, spec)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the decoder '{source}' is for latents of {shapes[0]}, the model's have {shapes[1]}: "
            "name one of the same autoencoder"
        )
    agreement = latents_agreement(own, found)
    if agreement > LATENTS_AGREE:
        return found
    said = (
        f"the decoder '{source}' is for other latents than the model's (their correlation is {agreement:.2f}, "
        f"expected over {LATENTS_AGREE:g}): pictures would be wrong; name one of the same autoencoder"
    )
    if type(found) is type(own):
        raise UserError(f"{said}, or set pipeline.decoder yourself")
    warnings.warn(said, stacklevel=3)
    return found


def latents_agreement(own: Autoencoder, other: Autoencoder) -> float:
    """The correlation of what two autoencoders of the same shape encode of one picture: 1 for the same encoder.

    A distilled autoencoder, such as TAESD, comes near 1; one that was trained apart is around 0.
    """
    rows = torch.linspace(-1, 1, 8 * own.spec.factor, dtype=torch.float32, device="cpu")
    waves = torch.stack([rows[:, None] + 0 * rows, 0 * rows[:, None] + rows, torch.sin(9 * rows[:, None] * rows)])
    picture = torch.stack([waves, waves.flip(0), -waves])
    first, second = (one.encode(picture).double().flatten() for one in (own, other))
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def part_source(spec: AutoencoderSpec | ConditionerSpec, folder: Path) -> str:
    """Where a part is: its folder, or the name that the hub has it under."""
    if spec.kind == "small" or spec.source in (f"./{AUTOENCODER}", f"./{CONDITIONER}"):
        return str(folder / spec.source)
    return spec.source


def save_autoencoder(
    autoencoder: Autoencoder, stored: AutoencoderSpec, folder: Path, parts: Parts, dtype: torch.dtype
) -> AutoencoderSpec:
    """Write the autoencoder into a pipeline's folder where `parts` says so; returns what config.json is to say of it.

    Args:
        autoencoder: as it was loaded.
        stored: what the config says of it so far.
        folder: the pipeline's.
        parts: which sources are written.
        dtype: of the stored weights of one of our own; others keep theirs.

    Raises:
        UserError: the folder cannot be written.
    """
    if isinstance(autoencoder, SmallLatents):
        save_small(autoencoder.network, folder / AUTOENCODER, autoencoder.spec.noise_std, dtype)
        return dataclasses.replace(stored, source=AUTOENCODER)
    if stored.kind == "pixels":
        return stored
    if not _is_written(stored.source, parts):
        return dataclasses.replace(stored, source=_absolute(stored.source))
    save_trainable(autoencoder, folder / AUTOENCODER, autoencoder.spec.noise_std)
    return dataclasses.replace(stored, source=f"./{AUTOENCODER}")


def save_conditioner(conditioner: Conditioner, stored: ConditionerSpec, folder: Path, parts: Parts) -> ConditionerSpec:
    """As `save_autoencoder`, of a text encoder with its tokenizer; of a T5 the encoder alone."""
    if not isinstance(conditioner, (TextEncoder, OnDemandTextEncoder)):
        return dataclasses.replace(stored, source=_absolute(stored.source))
    if not _is_written(stored.source, parts):
        return dataclasses.replace(stored, source=_absolute(stored.source))
    conditioner.save(folder / CONDITIONER)
    return dataclasses.replace(stored, source=f"./{CONDITIONER}")


def _is_written(source: str, parts: Parts) -> bool:
    if source.startswith("./") and source[2:] in (AUTOENCODER, CONDITIONER):
        return True
    return parts == "all" or (parts == "local" and Path(source).expanduser().is_dir())


def save_parts(
    flow: Flow,
    autoencoder: Autoencoder,
    conditioner: Conditioner | None,
    config: PipelineConfig,
    folder: Path,
    dtype: torch.dtype,
    parts: Parts,
    shard_bytes: int,
) -> None:
    """Write a pipeline's parts into `folder`, and config.json last; see `StarFlowPipeline.save_pretrained`."""
    flow.save_pretrained(folder / FLOW, dtype, shard_bytes=shard_bytes)
    autoencoder_spec = save_autoencoder(autoencoder, config.autoencoder, folder, parts, dtype)
    conditioner_spec = config.conditioner
    if conditioner is not None and not isinstance(conditioner, KNOWN_CONDITIONERS):
        conditioner_spec = None
        warnings.warn(
            f"the conditioner, a {type(conditioner).__name__}, is your own and is not saved: "
            "load the model by from_pretrained(..., conditioner=YOURS)"
        )
    if conditioner is not None and conditioner_spec is not None:
        conditioner_spec = save_conditioner(conditioner, conditioner_spec, folder, parts)
    stored = dataclasses.replace(config, autoencoder=autoencoder_spec, conditioner=conditioner_spec)
    files.write_json(folder / "config.json", to_dict(stored))


def _absolute(source: str) -> str:
    """A folder's name that holds in any working directory; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if source and folder.is_dir() else source


def describe(config: PipelineConfig, model: Flow) -> dict[str, str]:
    """The rows of a card's table, name and value: what a model is made of and its defaults."""
    flow, encoder, conditioner_spec = model.config, config.autoencoder, config.conditioner
    count = sum(parameter.numel() for parameter in model.parameters())
    layers = " ".join(str(flow.layers(block)) for block in range(flow.num_blocks))
    width, height = default_size(config, flow)
    condition = (
        f"{conditioner_spec.kind}, {conditioner_spec.size} x {conditioner_spec.dim}, {conditioner_spec.source}"
        if conditioner_spec
        else "none"
    )
    if conditioner_spec and conditioner_spec.kind == "class":
        condition = f"{len(conditioner_spec.names)} classes"
    return {
        "flow": f"{type(model).__name__}, {count:,} parameters, layers a block {layers}, width {flow.channels}",
        "pictures": f"{width}x{height} px, sides in multiples of {size_multiple(config, flow)}"
        + (f", ratios {' '.join(config.aspects)}" if config.aspects else ""),
        "autoencoder": f"{encoder.kind}, {encoder.channels} channels, factor {encoder.factor}"
        + (f", {encoder.source}" if encoder.source else ""),
        "condition": condition.rstrip(", "),
        "training noise": f"{config.noise}, {config.noise_std:g}" if config.noise == "gaussian" else config.noise,
        "samples are cleaned by": config.cleaning,
        "guidance": f"{config.guidance:g}",
        "temperature": f"{config.temperature:g}",
        "candidates a picture": f"{config.candidates}",
    }


def write_card(
    folder: Path, repository: str, config: PipelineConfig, model: Flow, conditioner: Conditioner | None, licence: str
) -> None:
    """Write README.md, the card that the hub shows of a pipeline."""
    prompt = "" if conditioner is None else '"a red apple", '
    if isinstance(conditioner, ClassLabels):
        prompt = f'"{conditioner.spec.names[0]}", '
    example = f"({prompt}guidance={config.guidance:g}, seed=0)"
    files.write_text(folder / "README.md", model_card(repository, describe(config, model), example, licence))


def model_card(name: str, facts: Mapping[str, str], example: str, licence: str = "") -> str:
    """A card for the hub: what the model is, and how to use it.

    Args:
        name: the repository.
        facts: a table, what and value.
        example: the pipeline's call in Python, after `pipe`.
        licence: the hub's name for one, such as "apache-2.0"; "" says nothing.
    """
    kind = "unconditional-image-generation" if facts.get("condition", "none") == "none" else "text-to-image"
    head = ["library_name: starflow", f"pipeline_tag: {kind}", "tags: [normalizing-flow, starflow]"]
    head += [f"license: {licence}"] if licence else []
    table = [f"| {what} | {value} |" for what, value in facts.items()]
    return "\n".join(
        [
            *("---", *head, "---", f"# {name}", ""),
            "A normalizing flow for pictures (STARFlow, arXiv 2506.06276; TarFlow, arXiv 2412.06329): it samples, and",
            "it gives the exact likelihood of what it models.",
            "",
            *("| what | value |", "|---|---|", *table, ""),
            *("```python", "from starflow import StarFlowPipeline", ""),
            f'pipe = StarFlowPipeline.from_pretrained("{name}")',
            f'pipe{example}.images[0].save("picture.png")',
            *("```", ""),
            f"In a shell: `starflow generate --model {name}`. `starflow info {name} --verify` compares every file with",
            "its sha256.",
            "",
        ]
    )
