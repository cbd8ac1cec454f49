"""`starflow info`: what a model is made of, from its configuration and the sizes of its files, without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from starflow import files, shards
from starflow.cli.options import Argument, Flag
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.components.config import PipelineConfig
    from starflow.model_config import ModelConfig


@dataclass(frozen=True)
class InfoOptions:
    """Say what a model is made of: its parts, parameters, sizes, training noise and default guidance.

    With --memory: what sampling and training it take, computed from its configuration before anything is loaded.
    With --verify: every file is read and compared with its sha256.
    """

    EXAMPLES: ClassVar[str] = """
        starflow info
        starflow info runs/tiny/model --json
        starflow info starflow-t2i-3b --memory
        starflow info recipes/starflow-imagenet-256.yaml --memory
        starflow info OWNER/NAME@REVISION --verify
    """

    model: Annotated[str, Argument("bundled name, folder, hub repository; with --memory also a preset or a recipe")] = (
        "glyphs"
    )
    memory: Annotated[bool, Flag("predict the memory of sampling and training")] = False
    verify: Annotated[bool, Flag("compare every file with its sha256; exit code 2 if one differs")] = False
    json: Annotated[bool, Flag("print it as JSON")] = False


def info(options: InfoOptions) -> None:
    """Run the command."""
    from starflow.components.releases import find_pipeline

    if options.memory:
        from starflow.cli.memory_table import describe_memory, memory_text

        predicted = describe_memory(options.model)
        print(json.dumps(predicted, indent=2) if options.json else memory_text(predicted))
        return
    folder = find_pipeline(options.model)
    facts = describe_model(folder)
    if options.verify:
        facts |= {"files": _verified(folder)}
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else _text(facts))


def _verified(folder: Path) -> dict[str, Any]:
    """How many files are what they should be, and which cannot be compared with anything."""
    from tqdm import tqdm

    from starflow.cli.verify import places, total_bytes, verify

    config = read_config(folder)
    total = total_bytes(places(folder, config))
    with tqdm(total=total, unit="B", unit_scale=True, desc="sha256", leave=False, disable=None, delay=2) as bar:

        def count(read: int) -> None:
            bar.update(read)

        found = verify(folder, config, count)
    unknown = [str(one.path) for one in found if one.state == "unknown" and one.path.suffix == ".safetensors"]
    return {"verified": sum(one.state == "ok" for one in found), "without_a_digest": unknown}


def read_config(folder: Path) -> PipelineConfig:
    """A pipeline's configuration.

    Raises:
        UserError: the folder holds no pipeline, or an unknown key.
    """
    from starflow.components.config import PipelineConfig
    from starflow.config import from_dict

    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict) or "autoencoder" not in values:
        raise UserError(f"{folder} holds no pipeline: expected a config.json with an 'autoencoder', as train writes it")
    return from_dict(PipelineConfig, values)


def describe_model(folder: Path) -> dict[str, Any]:
    """Facts about a pipeline's folder, ready for JSON; its weights are counted, not read.

    Raises:
        UserError: the folder holds no pipeline, or a file of it is missing.
    """
    from starflow.model_config import config_from_dict

    config = read_config(folder)
    flow = config_from_dict(files.read_json(folder / "flow" / "config.json"))
    multiple = config.autoencoder.factor * flow.patch_size
    return {
        "name": config.name,
        "folder": str(folder),
        "image_size": config.image_size,
        "size_multiple": multiple,
        "tokens": (config.image_size // multiple) ** 2,
        "noise_std": config.noise_std,
        "guidance": config.guidance,
        "temperature": config.temperature,
        "candidates": config.candidates,
        "cleaning": config.cleaning,
        "flow": _flow(folder / "flow", flow),
        "autoencoder": _autoencoder(folder / "autoencoder", config),
        "conditioner": _conditioner(config),
    }


def _flow(folder: Path, config: ModelConfig) -> dict[str, Any]:
    import torch

    from starflow.flow.model import STARFlow, TarFlow
    from starflow.model_config import STARFlowConfig

    with torch.device("meta"):  # shapes without memory
        model = STARFlow(config) if isinstance(config, STARFlowConfig) else TarFlow(config)
    blocks = range(config.num_blocks)
    return {
        "kind": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "megabytes": _megabytes(folder),
        "channels": config.in_channels,
        "patch_size": config.patch_size,
        "layers_per_block": [config.layers(block) for block in blocks],
        "width": config.channels,
    }


def _autoencoder(folder: Path, config: PipelineConfig) -> dict[str, Any]:
    spec = config.autoencoder
    facts = {"kind": spec.kind, "channels": spec.channels, "factor": spec.factor, "noise_std": spec.noise_std}
    if spec.kind != "small":
        return facts | {"source": spec.source}
    from starflow.latents.small import load_small

    network = load_small(folder).network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return facts | {"parameters": parameters, "megabytes": _megabytes(folder)}


def _conditioner(config: PipelineConfig) -> dict[str, Any] | None:
    spec = config.conditioner
    if spec is None:
        return None
    facts: dict[str, Any] = {"kind": spec.kind, "tokens": spec.size, "width": spec.dim}
    return facts | ({"source": spec.source} if spec.kind != "class" else {"classes": list(spec.names)})


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in shards.weight_files(folder)) / 1e6, 3)


def _text(facts: dict[str, Any]) -> str:
    """One fact a line; a part's facts in one line."""
    width = max(map(len, facts))
    return "\n".join(f"{name.replace('_', ' '):{width}}  {_value(value)}" for name, value in facts.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        shown = " ".join(map(str, value[:12]))
        return shown + (f" ... ({len(value)} in all)" if len(value) > 12 else "")
    if isinstance(value, int) and value >= 100_000:
        return f"{value:,}"
    return "none" if value is None or value == "" else str(value)
