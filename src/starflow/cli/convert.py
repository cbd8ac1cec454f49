"""`starflow convert` writes a published checkpoint as a folder that every command reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from starflow.cli.options import Argument, Flag, Precision, pick_dtype
from starflow.data.buckets import ASPECTS, Aspect
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.pipeline.from_published import ConvertedPipeline

SHOWN_KEYS = 6
"""Ignored keys of one kind are shown by example."""


@dataclass(frozen=True)
class ConvertOptions:
    """Write a published checkpoint (STARFlow or TarFlow) as config.json and sharded safetensors with checksums.

    The file is mapped and converted tensor by tensor, in the memory of one shard. Loading is strict: every key and
    every option is accounted for, and those that are ignored are listed. Where the options name an autoencoder, and for
    TarFlow, which is of pixels, the folder is a model for `generate`; otherwise it is a flow alone.
    """

    EXAMPLES: ClassVar[str] = """
        starflow convert starflow_3B_t2i_256x256.pth --options starflow_3B_t2i_256x256.yaml --output starflow-3b
        starflow convert afhq.pth --options afhq.json --noise-std 0.07 --output afhq
        starflow convert xl.pth --options xl.json --autoencoder stabilityai/sd-vae-ft-ema --dtype float32 --output xl
    """

    file: Annotated[Path, Argument("the checkpoint, .pth or .safetensors")]
    options: Annotated[Path, Flag("the published configuration, JSON or YAML, in either of its dialects", "FILE")]
    output: Annotated[Path, Flag("a folder, made where it is missing", "FOLDER")]
    dtype: Annotated[Precision, Flag("precision of the written weights")] = "bfloat16"
    autoencoder: Annotated[str, Flag("folder or hub id, where the options name none, or another", "NAME")] = ""
    text_encoder: Annotated[str, Flag("folder or hub id, where the options name none, or another", "NAME")] = ""
    noise_std: Annotated[float | None, Flag("of the model's training, where the options do not say it", "S")] = None
    guidance: Annotated[float | None, Flag("default weight, where the options do not say it", "W")] = None
    aspects: Annotated[
        str, Flag("ratios that the model was trained on, e.g. 1:1,16:9, or 'all' nine: prompts name them", "W:H,...")
    ] = ""
    json: Annotated[bool, Flag("print what was done as JSON")] = False

    def __post_init__(self) -> None:
        for name, value in (("--noise-std", self.noise_std), ("--guidance", self.guidance)):
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value:g}, expected at least 0")
        for ratio in self.ratios:
            if ratio not in ASPECTS:
                raise UserError(f"--aspects names '{ratio}', expected 'all', or some of {', '.join(ASPECTS)}")

    @property
    def ratios(self) -> tuple[Aspect, ...]:
        """The ratios that are given."""
        if self.aspects == "all":
            return ASPECTS
        return cast("tuple[Aspect, ...]", tuple(ratio.strip() for ratio in self.aspects.split(",") if ratio.strip()))


def convert(options: ConvertOptions) -> None:
    """Run `starflow convert`."""
    from starflow.config import read_mapping
    from starflow.pipeline.from_published import PipelineOverrides
    from starflow.pipeline.from_published import convert as convert_published
    from starflow.pipeline.locate import progress_bar

    published = read_mapping(options.options)
    overrides = PipelineOverrides(
        options.autoencoder or None, options.text_encoder or None, options.noise_std, options.guidance, options.ratios
    )
    with progress_bar(f"converting {options.file.name}") as progress:
        done = convert_published(
            options.file, published, options.output, pick_dtype(options.dtype), overrides, progress=progress
        )
    facts = _facts(done, options)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else _text(done, options))


def _facts(done: ConvertedPipeline, options: ConvertOptions) -> dict[str, Any]:
    return {**asdict(done), "folder": str(done.folder), "dtype": options.dtype}


def _text(done: ConvertedPipeline, options: ConvertOptions) -> str:
    """What was made, what was ignored, and how to go on."""
    lines = [
        f"{done.folder}: {done.parameters:,} parameters in {options.dtype}, {done.bytes / 1e9:.3f} GB",
        f"ignored keys, which carry nothing: {_list(done.ignored_keys)}",
        f"ignored options, of the training run: {_list(done.ignored_options)}",
    ]
    if done.whole:
        lines.append(f"next: starflow generate --model {done.folder}")
    else:
        lines.append(
            "a flow alone, as no autoencoder is known: STARFlow.from_pretrained reads it (--autoencoder adds one)"
        )
    return "\n".join(lines)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more if names else "none"
