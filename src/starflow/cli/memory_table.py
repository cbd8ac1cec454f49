"""What `starflow info --memory` prints: predicted memory of sampling and training, and what fits this machine."""

from __future__ import annotations

import os
from dataclasses import asdict, fields, replace
from typing import Any

from starflow import files, memory
from starflow.config import from_dict
from starflow.memory import AUTOENCODERS, GIB, AutoencoderShape, Precision, Sharding
from starflow.model_config import ModelConfig, STARFlowConfig, config_from_dict

BATCHES = (1, 4, 16, 64)
WEIGHTS: tuple[tuple[Precision, bool], ...] = (("float32", False), ("bfloat16", False), ("bfloat16", True))
TRAINING: tuple[tuple[Sharding, int], ...] = (
    ("replicated", 1),
    ("replicated", 8),
    ("sharded", 8),
    ("hybrid", 64),
    ("sharded", 64),
)
TRAINING_BATCH = 8
GPU_SIZES = (8, 16, 24, 32, 40, 48, 80, 141, 192)
HERE = "this machine"
SHARE = 0.92
"""Of a memory that one process may use: the rest is the driver's, the allocator's and other programs'."""


def describe_memory(model: str) -> dict[str, Any]:
    """Predicted bytes for a preset or a model's folder, ready for JSON.

    Raises:
        UserError: neither a preset nor a model.
    """
    config, coder = _shapes(model)
    room = available()
    guided = not isinstance(config, STARFlowConfig) or config.txt_size > 0
    sampling = [
        {"kind": "int8" if int8 else dtype, "batch": batch, **_with_peak(prediction)}
        for dtype, int8 in WEIGHTS
        for batch in BATCHES
        for prediction in [
            memory.sampling_memory(config, batch, guided=guided, dtype=dtype, int8=int8, autoencoder=coder)
        ]
    ]
    training = [
        {"sharding": sharding, "gpus": gpus, "checkpointing": checkpointing, **_with_peak(prediction)}
        for sharding, gpus in TRAINING
        for checkpointing in (False, True)
        for prediction in [
            memory.training_memory(config, TRAINING_BATCH, gpus=gpus, sharding=sharding, checkpointing=checkpointing)
        ]
    ]
    facts = {"model": model, "parameters": memory.parameters(config), "tokens": config.grid_side**2, "guided": guided}
    return facts | {"available": room, "training_batch": TRAINING_BATCH, "sampling": sampling, "training": training}


def _shapes(model: str) -> tuple[ModelConfig, AutoencoderShape | None]:
    """The flow's config and its autoencoder's shape, without loading either."""
    from starflow.presets import PRESETS

    if model in PRESETS:
        known = PRESETS[model]
        return known.config, AUTOENCODERS["pixels" if known.latents == "pixels" else "diffusers_kl"]
    from starflow.weights.hub import find_model

    folder = find_model(model)
    values = files.read_json(folder / "config.json")
    if "autoencoder" not in values:  # a flow alone
        return config_from_dict(values), None
    coder = AUTOENCODERS[values["autoencoder"]["kind"]]
    own = folder / "autoencoder" / "config.json"
    if values["autoencoder"]["kind"] == "small" and own.is_file():
        coder = replace(coder, parameters=_small_parameters(files.read_json(own)))
    return config_from_dict(files.read_json(folder / "flow" / "config.json")), coder


def _small_parameters(values: dict[str, Any]) -> int:
    """Counted on a model without memory."""
    import torch

    from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig

    known = {field.name for field in fields(SmallAutoencoderConfig)}
    config = from_dict(SmallAutoencoderConfig, {name: value for name, value in values.items() if name in known})
    with torch.device("meta"):
        return sum(one.numel() for one in SmallAutoencoder(config).parameters())


def _with_peak(prediction: memory.SamplingMemory | memory.TrainingMemory) -> dict[str, int]:
    return {**asdict(prediction), "peak": prediction.peak}


def available() -> dict[str, int]:
    """Bytes of memory of this machine and its first GPU, whether in use or not."""
    import torch

    room = {}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        room[HERE] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        room[torch.cuda.get_device_name(0)] = torch.cuda.get_device_properties(0).total_memory
    return room


def memory_text(facts: dict[str, Any]) -> str:
    """Two tables, and what fits."""
    room = facts["available"]
    largest = max(row["peak"] for row in facts["sampling"])
    unit, name = (GIB, "GiB") if largest > GIB else (GIB // 1024, "MiB")
    parts = ("weights", "cache", "activations", "autoencoder", "decoding", "peak", "packed")
    lines = [
        f"{facts['model']}: {facts['parameters']:,} parameters, {facts['tokens']} tokens a picture"
        f"{', with guidance' if facts['guided'] else ''}; predicted, in {name}",
        "",
        f"{'sampling':>18} {'batch':>6} {_heads(parts)}  fits",
    ]
    for row in facts["sampling"]:
        lines.append(f"{row['kind']:>18} {row['batch']:6d} {_numbers(row, parts, unit)}  {_fits(row, room)}")
    lines.append("packed: copies that a CPU's compiled loop reads; they add to the peak of this machine, not of a GPU")
    training = ("parameters", "gradients", "moments", "average", "gathered", "activations", "peak")
    lines += ["", f"training, {facts['training_batch']} pictures a GPU and pass, bfloat16 products; of one GPU"]
    lines.append(f"{'':10} {'GPUs':>5} {'checkpoints':>12} {_heads(training)}  fits GPUs of")
    for row in facts["training"]:
        kept = "yes" if row["checkpointing"] else "no"
        of = next((f"{size} GiB" for size in GPU_SIZES if row["peak"] <= SHARE * size * GIB), "-")
        lines.append(f"{row['sharding']:10} {row['gpus']:5d} {kept:>12} {_numbers(row, training, unit)}  {of}")
    whole = facts["training"][0]["parameters"] / unit
    lines.append(f"where weights are shared, drawing sample grids takes {whole:.2f} {name} more of the first GPU")
    return "\n".join([*lines, "", *(f"{name}: {size / GIB:.1f} GiB" for name, size in room.items())])


def _heads(parts: tuple[str, ...]) -> str:
    return " ".join(f"{part:>11}" for part in parts)


def _numbers(row: dict[str, Any], parts: tuple[str, ...], unit: int) -> str:
    return " ".join(f"{row[part] / unit:11.2f}" for part in parts)


def _fits(row: dict[str, Any], room: dict[str, int]) -> str:
    needed = {name: row["peak"] + (row["packed"] if name == HERE else 0) for name in room}
    return ", ".join(name for name, size in room.items() if needed[name] <= SHARE * size) or "-"
