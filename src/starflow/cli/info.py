"""`starflow info` prints what a model is made of, or the memory it takes, from its configuration and file sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from starflow.cli.options import Argument, Flag
from starflow.flow.memory import GIB
from starflow.io import files, weights

if TYPE_CHECKING:
    from starflow.flow.config import ModelConfig
    from starflow.pipeline.config import PipelineConfig

GPU_SIZES = (4, 6, 8, 12, 16, 24, 32, 40, 48, 80, 141, 192)
"""GiB of memory that GPUs are sold with."""

USABLE_SHARE = 0.92
"""Of a memory that one process may use: the rest is the driver's, the allocator's and other programs'."""


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
    """Run `starflow info`."""
    from starflow.pipeline.locate import find_pipeline

    if options.memory:
        from starflow.bench.memory import predict_memory

        predicted = predict_memory(options.model)
        print(json.dumps(predicted, indent=2) if options.json else memory_text(predicted))
        return
    folder = find_pipeline(options.model)
    facts = describe_model(folder)
    if options.verify:
        facts |= {"files": _verified(folder)}
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else _text(facts))


def _verified(folder: Path) -> dict[str, Any]:
    """The number of files that equal their digests, and the weights that have none."""
    from tqdm import tqdm

    from starflow.pipeline.folder import read_config
    from starflow.pipeline.locate import part_folders, total_bytes, verify

    config = read_config(folder)
    total = total_bytes(part_folders(folder, config))
    with tqdm(total=total, unit="B", unit_scale=True, desc="sha256", leave=False, disable=None, delay=2) as bar:

        def count(read: int) -> None:
            bar.update(read)

        found = verify(folder, config, count)
    unknown = [str(one.path) for one in found if one.state == "unknown" and one.path.suffix == ".safetensors"]
    return {"verified": sum(one.state == "ok" for one in found), "without_a_digest": unknown}


def describe_model(folder: Path) -> dict[str, Any]:
    """Facts about a pipeline's folder, ready for JSON; its weights are counted, not read.

    Raises:
        UserError: the folder holds no pipeline, or a file of it is missing.
    """
    from starflow.flow.config import config_from_dict
    from starflow.pipeline.config import default_size, size_multiple, trained_sizes
    from starflow.pipeline.folder import read_config

    config = read_config(folder)
    flow = config_from_dict(files.read_json(folder / "flow" / "config.json"))
    multiple, (width, height) = size_multiple(config, flow), default_size(config, flow)
    return {
        "name": config.name,
        "folder": str(folder),
        "default_size": f"{width}x{height}",
        "trained_sizes": [f"{wide}x{high}" for wide, high in trained_sizes(config, flow)],
        "size_multiple": multiple,
        "tokens": (width // multiple) * (height // multiple),
        "noise_std": config.noise_std,
        "guidance": config.guidance,
        "temperature": config.temperature,
        "candidates": config.candidates,
        "cleaning": config.cleaning,
        "flow": _flow(folder / "flow", flow),
        "autoencoder": _autoencoder(folder / "autoencoder", config),
        "conditioner": _conditioner(config),
        **_companions(folder),
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


def _companions(folder: Path) -> dict[str, Any]:
    """Facts about what stands beside the flow: a student and a denoiser, each named where there is one."""
    facts = {}
    for name in ("student", "denoiser"):
        if (folder / name / "config.json").is_file():
            values = files.read_json(folder / name / "config.json")
            own = ("temperature", "guidance", "largest_guidance") if name == "student" else ("noise_std",)
            facts[name] = {
                "approximates": "the flow's samples" if name == "student" else "the Tweedie step",
                "layers": sum(values["layers"]),
                "width": values["channels"],
                "megabytes": _megabytes(folder / name),
                "teacher": values["teacher"][:12],
                **{key: values[key] for key in own if values.get(key) is not None},
            }
    return facts


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
        shown = " ".join(map(str, value[:12])) or "none"
        return shown + (f" ... ({len(value)} in all)" if len(value) > 12 else "")
    if isinstance(value, int) and value >= 100_000:
        return f"{value:,}"
    return "none" if value is None or value == "" else str(value)


def memory_text(facts: dict[str, Any]) -> str:
    """Two tables of at most 80 columns, of sampling and of training, with the memories that each row fits."""
    available = facts["available"]
    largest = max(row["peak"] for row in facts["sampling"])
    unit, name = (GIB, "GiB") if largest > GIB else (GIB // 1024, "MiB")
    parts = ("weights", "cache", "passes", "coders", "peak", "packed", "cpu_peak")
    lines = [
        f"{facts['model']}: {facts['parameters']:,} parameters",
        f"{_pictures(facts)}{', with guidance' if facts['guided'] else ''}; predicted, in {name}",
        "",
        f"{'sampling':16} {'batch':>5}{_heads(parts, 7)} fits",
    ]
    for row in facts["sampling"]:
        summed = row | {
            "coders": row["autoencoder"] + row["decoding"] + row["text_encoder"] + row["companions"],
            "passes": max(row["activations"], row["denoising"]),
        }
        lines.append(f"{row['kind']:16} {row['batch']:5d}{_numbers(summed, parts, unit, 7)} {_fits(row, available)}")
    lines += ["", "fits: the smallest GPU, in GiB; with * it fits this machine's processor too"]
    tweedie, denoiser = facts["denoised"], facts["companions"]["width"]
    way = "a Tweedie step what its backward pass needs" if tweedie else "the denoiser those of its own pass"
    lines += [f"passes: activations; with {way}" if tweedie or denoiser else "passes: activations"]
    lines += ["coders: autoencoder, what it takes to decode, and the text encoder, which is"]
    lines += ["released before pictures are drawn where it has over a gigabyte"]
    if facts["companions"]["parameters"]:
        lines += [f"and {4 * facts['companions']['parameters'] / unit:.2f} {name} of student and denoiser"]
    lines += ["packed: what a processor's compiled loop reads; cpu: the peak there, with it"]
    training = ("parameters", "gradients", "moments", "average", "gathered", "activations", "peak")
    lines += ["", f"training, {facts['training_batch']} pictures a GPU and pass, bfloat16 products; of one GPU"]
    lines.append(f"{'':10} {'GPUs':>4} {'ckpt':>4}{_heads(training)} fit")
    for row in facts["training"]:
        kept = "yes" if row["checkpointing"] else "no"
        of = next((f"{size}" for size in GPU_SIZES if row["peak"] <= USABLE_SHARE * size * GIB), "-")
        lines.append(f"{row['sharding']:10} {row['gpus']:4d} {kept:>4}{_numbers(row, training, unit)} {of:>3}")
    whole = facts["training"][0]["parameters"] / unit
    lines.append("ckpt: activations are computed again; sample grids of a model whose")
    lines.append(f"weights are shared take {whole:.2f} {name} more of the first GPU")
    return "\n".join([*lines, "", *(f"{name}: {size / GIB:.1f} GiB" for name, size in available.items())])


def _pictures(facts: dict[str, Any]) -> str:
    """The pictures whose memory is predicted."""
    count, size = len(facts["sizes"]), facts["size"]
    return f"pictures of {size} ({facts['tokens']} tokens{f', the most of {count} sizes' if count > 1 else ''})"


_SHORT = {
    "weights": "flow",
    "activations": "activ.",
    "cpu_peak": "cpu",
    "parameters": "params",
    "gradients": "grads",
    "gathered": "gather",
}


def _heads(parts: tuple[str, ...], width: int = 8) -> str:
    return "".join(f"{_SHORT.get(part, part):>{width}}" for part in parts)


def _numbers(row: dict[str, Any], parts: tuple[str, ...], unit: int, width: int = 8) -> str:
    return "".join(f"{row[part] / unit:{width}.{2 if row[part] < 1000 * unit else 0}f}" for part in parts)


def _fits(row: dict[str, Any], available: dict[str, int]) -> str:
    """The smallest GPU that a row fits, and a star where it fits this machine's processor with its packed copies."""
    from starflow.bench.memory import HOST

    gpu = next((f"{size}" for size in GPU_SIZES if row["peak"] <= USABLE_SHARE * size * GIB), "-")
    here = "offload" not in row["kind"] and row["cpu_peak"] <= USABLE_SHARE * available.get(HOST, 0)
    return f"{gpu + ('*' if here else ''):>4}"
