"""`starflow info`: what a model is made of, from its configuration and the sizes of its files, without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from starflow import files
from starflow.cli.options import Argument, Flag
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.model_config import ModelConfig
    from starflow.pipeline import PipelineConfig


@dataclass(frozen=True)
class InfoOptions:
    """Say what a model is made of: its parts, parameters, sizes, training noise and default guidance.

    With --memory: what sampling and training it take, computed from its configuration before anything is loaded.
    """

    EXAMPLES: ClassVar[str] = """
        starflow info
        starflow info runs/tiny/model --json
        starflow info starflow-t2i-3b --memory
    """

    model: Annotated[str, Argument("bundled name, folder, hub repository, or with --memory a preset")] = "glyphs"
    memory: Annotated[bool, Flag("predict the memory of sampling and training")] = False
    json: Annotated[bool, Flag("print it as JSON")] = False


def info(options: InfoOptions) -> None:
    """Run the command."""
    from starflow.weights.hub import find_model

    if options.memory:
        from starflow.cli.memory_table import describe_memory, memory_text

        predicted = describe_memory(options.model)
        print(json.dumps(predicted, indent=2) if options.json else memory_text(predicted))
        return
    facts = describe_model(find_model(options.model))
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else _text(facts))


def describe_model(folder: Path) -> dict[str, Any]:
    """Facts about a pipeline's folder, ready for JSON; its weights are counted, not read.

    Raises:
        UserError: the folder holds no pipeline, or a file of it is missing.
    """
    from starflow.config import from_dict
    from starflow.model_config import config_from_dict
    from starflow.pipeline import PipelineConfig

    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict) or "autoencoder" not in values:
        raise UserError(f"{folder} holds no pipeline: expected a config.json with an 'autoencoder', as train writes it")
    config = from_dict(PipelineConfig, values)
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
        "megabytes": _megabytes(folder / "model.safetensors"),
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
    return facts | {"parameters": parameters, "megabytes": _megabytes(folder / "model.safetensors")}


def _conditioner(config: PipelineConfig) -> dict[str, Any] | None:
    spec = config.conditioner
    if spec is None:
        return None
    facts: dict[str, Any] = {"kind": spec.kind, "tokens": spec.size, "width": spec.dim}
    return facts | ({"source": spec.source} if spec.kind != "class" else {"classes": list(spec.names)})


def _megabytes(path: Path) -> float:
    try:
        return round(path.stat().st_size / 1e6, 3)
    except OSError:
        raise UserError(f"no such file: {path}; the model is not whole, fetch or write it again") from None


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
