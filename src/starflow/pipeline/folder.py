"""The card of a model that goes to the hub.

The parts of a pipeline as folders beside each other: flow/, autoencoder/ and conditioner/.

Contract: a part whose source in config.json is "./autoencoder" or "./conditioner" (or "autoencoder", for one of our
own) lies in the pipeline's folder, wherever that is moved to. Any other source is a folder elsewhere or a repository
of the hub, which is found, or fetched, when the pipeline is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from starflow.conditioning import Conditioner, ConditionerSpec, OnDemandTextEncoder, TextEncoder, load_conditioner
from starflow.errors import UserError
from starflow.flow.model import Flow, STARFlow, TarFlow
from starflow.io import files
from starflow.io.hub import HubOptions
from starflow.latents import Autoencoder, AutoencoderSpec, load_autoencoder
from starflow.latents.load import load_trainable, save_trainable
from starflow.latents.small import SmallLatents, save_small
from starflow.pipeline import config as sizes
from starflow.pipeline.config import PipelineConfig


def facts_of(config: PipelineConfig, model: Flow) -> dict[str, str]:
    """What a model is, in words: a table's rows."""
    flow, coder, reader = model.config, config.autoencoder, config.conditioner
    count = sum(parameter.numel() for parameter in model.parameters())
    layers = " ".join(str(flow.layers(block)) for block in range(flow.num_blocks))
    condition = f"{reader.kind}, {reader.size} x {reader.dim}, {reader.source}" if reader else "none"
    if reader and reader.kind == "class":
        condition = f"{len(reader.names)} classes"
    return {
        "flow": f"{type(model).__name__}, {count:,} parameters, layers a block {layers}, width {flow.channels}",
        "pictures": f"{config.image_size} px, sides in multiples of {sizes.multiple(config, flow)}"
        + (f", ratios {' '.join(config.aspects)}" if config.aspects else ""),
        "autoencoder": f"{coder.kind}, {coder.channels} channels, factor {coder.factor}"
        + (f", {coder.source}" if coder.source else ""),
        "condition": condition.rstrip(", "),
        "training noise": f"{config.noise}, {config.noise_std:g}" if config.noise == "gaussian" else config.noise,
        "samples are cleaned by": config.cleaning,
        "guidance": f"{config.guidance:g}",
        "temperature": f"{config.temperature:g}",
        "candidates a picture": f"{config.candidates}",
    }


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


FLOW, AUTOENCODER, CONDITIONER = "flow", "autoencoder", "conditioner"

Parts = Literal["own", "local", "all"]
"""Which parts are written into a pipeline's folder: those that lie in it already, those of any folder here, or all."""


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
    source = place_of(spec, folder)
    return load_autoencoder(dataclasses.replace(spec, source=source), hub.without_revision)


def open_conditioner(spec: ConditionerSpec, folder: Path, hub: HubOptions, keep: bool | None) -> Conditioner:
    """The conditioner that a pipeline's config.json describes; see `load_conditioner` for `keep`.

    Raises:
        UserError: it cannot be found, is damaged, or is another than described.
    """
    source = place_of(spec, folder)
    return load_conditioner(dataclasses.replace(spec, source=source), hub.without_revision, keep)


def open_decoder(source: str, spec: AutoencoderSpec, hub: HubOptions) -> Autoencoder:
    """Another autoencoder that decodes the latents of the one that `spec` describes.

    Raises:
        UserError: it cannot be found, is damaged, or its latents are of another shape.
    """
    found = load_trainable(source, hub.without_revision)
    shapes = [f"{one.channels} channels, {one.factor} pixels a side" for one in (found.spec, spec)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the decoder '{source}' is for latents of {shapes[0]}, the model's have {shapes[1]}: "
            "name one of the same autoencoder"
        )
    return found


def place_of(spec: AutoencoderSpec | ConditionerSpec, folder: Path) -> str:
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
    if not _inside(stored.source, parts):
        return dataclasses.replace(stored, source=_absolute(stored.source))
    save_trainable(autoencoder, folder / AUTOENCODER, autoencoder.spec.noise_std)
    return dataclasses.replace(stored, source=f"./{AUTOENCODER}")


def save_conditioner(conditioner: Conditioner, stored: ConditionerSpec, folder: Path, parts: Parts) -> ConditionerSpec:
    """As `save_autoencoder`, of a text encoder with its tokenizer; of a T5 the encoder alone."""
    if not isinstance(conditioner, (TextEncoder, OnDemandTextEncoder)):
        return dataclasses.replace(stored, source=_absolute(stored.source))
    if not _inside(stored.source, parts):
        return dataclasses.replace(stored, source=_absolute(stored.source))
    conditioner.save(folder / CONDITIONER)
    return dataclasses.replace(stored, source=f"./{CONDITIONER}")


def _inside(source: str, parts: Parts) -> bool:
    if source.startswith("./") and source[2:] in (AUTOENCODER, CONDITIONER):
        return True
    return parts == "all" or (parts == "local" and Path(source).expanduser().is_dir())


def _absolute(source: str) -> str:
    """A folder's name that holds in any working directory; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if source and folder.is_dir() else source
