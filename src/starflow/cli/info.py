"""`starflow info`: what a model is made of, from its configuration and the sizes of its files, without its weights.

What `starflow info --memory` prints: predicted memory of sampling and training, and what fits this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from starflow.cli.options import Argument, Flag
from starflow.errors import UserError
from starflow.io import files, weights

if TYPE_CHECKING:
    from starflow.flow.config import ModelConfig
    from starflow.pipeline.config import PipelineConfig

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace

from starflow.config import from_dict
from starflow.flow import memory
from starflow.flow.config import ModelConfig, STARFlowConfig, config_from_dict
from starflow.flow.memory import AUTOENCODERS, GIB, AutoencoderShape, Precision, Sharding


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
    from starflow.pipeline.locate import find_pipeline

    if options.memory:
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

    from starflow.pipeline.locate import places, total_bytes, verify

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
    from starflow.config import from_dict
    from starflow.pipeline.config import PipelineConfig

    values = files.read_json(folder / "config.json")
    if not isinstance(values, dict) or "autoencoder" not in values:
        raise UserError(f"{folder} holds no pipeline: expected a config.json with an 'autoencoder', as train writes it")
    return from_dict(PipelineConfig, values)


def describe_model(folder: Path) -> dict[str, Any]:
    """Facts about a pipeline's folder, ready for JSON; its weights are counted, not read.

    Raises:
        UserError: the folder holds no pipeline, or a file of it is missing.
    """
    from starflow.flow.config import config_from_dict

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

    from starflow.flow.config import STARFlowConfig
    from starflow.flow.model import STARFlow, TarFlow

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
    return round(sum(path.stat().st_size for path in weights.weight_files(folder)) / 1e6, 3)


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


BATCHES = (1, 4, 16, 64)


@dataclass(frozen=True)
class MemoryScenario:
    """How the weights are held while pictures are drawn, and what it is called."""

    name: str
    dtype: Precision
    int8: bool = False
    offload: bool = False


SCENARIOS = (
    MemoryScenario("float32", "float32"),
    MemoryScenario("bfloat16", "bfloat16"),
    MemoryScenario("int8", "bfloat16", int8=True),
    MemoryScenario("bfloat16 offload", "bfloat16", offload=True),
    MemoryScenario("int8 offload", "bfloat16", int8=True, offload=True),
)

TRAINING: tuple[tuple[Sharding, int], ...] = (
    ("replicated", 1),
    ("replicated", 8),
    ("sharded", 8),
    ("hybrid", 64),
    ("sharded", 64),
)

TRAINING_BATCH = 8

HOST = "this machine"

GPU_SIZES = (4, 6, 8, 12, 16, 24, 32, 40, 48, 80, 141, 192)

SHARE = 0.92
"""Of a memory that one process may use: the rest is the driver's, the allocator's and other programs'."""


def describe_memory(model: str) -> dict[str, Any]:
    """Predicted bytes for a recipe, a preset, a published repository or any model, ready for JSON.

    Of a model on the hub only the configuration is fetched.

    Raises:
        UserError: none of these.
    """
    subject = _subject(model)
    config = subject.config
    guided = not isinstance(config, STARFlowConfig) or config.txt_size > 0
    training = [
        {"sharding": sharding, "gpus": gpus, "checkpointing": checkpointing, **_with_peak(prediction)}
        for sharding, gpus in TRAINING
        for checkpointing in (False, True)
        for prediction in [
            memory.training_memory(config, TRAINING_BATCH, gpus=gpus, sharding=sharding, checkpointing=checkpointing)
        ]
    ]
    facts = {
        "model": model,
        "parameters": memory.parameter_count(config),
        "tokens": config.grid_side**2,
        "guided": guided,
    }
    sampling = [_sampling(subject, way, batch, guided=guided) for way in SCENARIOS for batch in BATCHES]
    facts |= {"available": available(), "text_encoder": _text_encoder(subject.text)}
    return facts | {"training_batch": TRAINING_BATCH, "sampling": sampling, "training": training}


@dataclass(frozen=True)
class MemorySubject:
    """What memory depends on of a pipeline."""

    config: ModelConfig
    coder: AutoencoderShape | None
    text: str
    """Where the text encoder is from; "" is none."""


def _subject(model: str) -> MemorySubject:
    """The parts' shapes, from configurations alone."""
    from starflow.flow.config import PRESETS
    from starflow.pipeline.locate import is_release
    from starflow.published.convert import RELEASES

    if model.endswith((".yaml", ".yml")):
        from starflow.train.init_from import expected_flow
        from starflow.train.recipe import load_recipe

        recipe = load_recipe(Path(model))
        config, kind = expected_flow(recipe)
        condition = recipe.conditioning
        return MemorySubject(config, AUTOENCODERS[kind], condition.encoder if condition.kind == "text" else "")
    name = RELEASES[model.partition("@")[0]].preset if is_release(model) else model
    if name in PRESETS:
        known = PRESETS[name]
        coder = AUTOENCODERS["pixels" if known.latents == "pixels" else "diffusers_kl"]
        return MemorySubject(known.config, coder, known.text)
    with _configs_of(model) as folder:
        values = files.read_json(folder / "config.json")
        if "autoencoder" not in values:  # a flow alone
            return MemorySubject(config_from_dict(values), None, "")
        flow = config_from_dict(files.read_json(folder / "flow" / "config.json"))
        coder = AUTOENCODERS[values["autoencoder"]["kind"]]
        own = folder / "autoencoder" / "config.json"
        if values["autoencoder"]["kind"] == "small" and own.is_file():
            coder = replace(coder, parameters=_small_parameters(files.read_json(own)))
    reader = values.get("conditioner") or {}
    return MemorySubject(flow, coder, reader.get("source", ""))


@contextmanager
def _configs_of(model: str) -> Iterator[Path]:
    """The folder of a model; of one on the hub that is not here, only its configurations, for a while."""
    from starflow.io.hub import HubOptions, snapshot
    from starflow.pipeline.locate import find_model

    try:
        folder = find_model(model, HubOptions(offline=True))
    except UserError as error:
        if "the hub" not in str(error):
            raise
        with tempfile.TemporaryDirectory() as cache:
            wanted = ("config.json", "flow/config.json")
            yield snapshot(model, wanted, required=["config.json"], hub=HubOptions(cache=cache))
        return
    yield folder


def _sampling(subject: MemorySubject, way: MemoryScenario, batch: int, *, guided: bool) -> dict[str, Any]:
    """One row: bytes on the device that computes, and what a CPU holds beside it."""
    found = memory.sampling_memory(
        subject.config,
        batch,
        guided=guided,
        dtype=way.dtype,
        int8=way.int8,
        offload=way.offload,
        autoencoder=subject.coder,
    )
    return {"kind": way.name, "batch": batch, **_with_peak(found)}


def _text_encoder(source: str) -> dict[str, Any] | None:
    """What a large one takes while it encodes; it is gone before pictures are drawn."""
    count = memory.TEXT_ENCODER_PARAMETERS.get(source)
    return None if count is None else {"source": source, "bytes": count * memory.BYTES["bfloat16"]}


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
        room[HOST] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
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
    lines += ["", "packed: copies that a CPU's compiled loop reads; they add to this machine's peak, not to a GPU's"]
    lines += _remarks(facts, unit, name)
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


def _remarks(facts: dict[str, Any], unit: int, name: str) -> list[str]:
    """What the rows do not hold."""
    if encoder := facts["text_encoder"]:
        size = encoder["bytes"] / unit
        return [f"the text encoder {encoder['source']} takes {size:.2f} {name} before that, and is released"]
    return []


def _fits(row: dict[str, Any], room: dict[str, int]) -> str:
    """Where a row fits: on a GPU what it says, on this machine's processor the packed copies too."""
    found = []
    for name, size in room.items():
        on_the_host = name == HOST
        if on_the_host and "offload" in row["kind"]:
            continue
        needed = row["peak"] + (row["packed"] if on_the_host else 0)
        if needed <= SHARE * size:
            found.append(name)
    if gpu := next((size for size in GPU_SIZES if row["peak"] <= SHARE * size * GIB), None):
        found.append(f"GPUs of {gpu} GiB")
    return ", ".join(found) or "-"
