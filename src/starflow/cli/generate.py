"""`starflow generate` makes pictures from prompts and writes them as PNG files."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from starflow.cli.options import (
    Argument,
    CacheDtype,
    Device,
    Flag,
    OutputTarget,
    Precision,
    WeightFormat,
    check_seed,
    collection_off,
    parse_size,
    pick_device,
    pick_dtype,
)
from starflow.data.buckets import ASPECTS, Aspect, aspect_size
from starflow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from starflow.pipeline.pipeline import StarFlowPipeline


@dataclass(frozen=True)
class GenerateOptions:
    """Make pictures from prompts (or class names) and write them as PNG files."""

    EXAMPLES: ClassVar[str] = """
        starflow generate "a red apple"
        starflow generate "a red apple" --num-images 4 --seed 7 --guidance 3 --grid
        starflow generate "a blue car" --output car.png
        starflow generate --prompts prompts.txt --output out --json
        starflow generate --class star --model runs/tiny
        starflow generate "a red apple" --aspect 16:9
        starflow generate "a red apple" --model OWNER/NAME@REVISION --decoder madebyollin/taesd
        starflow generate "a red apple" --model apple/starflow --weights int8 --offload
    """

    prompt: Annotated[str, Argument("what to show; an empty prompt samples unconditionally")] = ""
    num_images: Annotated[int, Flag("pictures of every prompt", "N")] = 1
    seed: Annotated[int, Flag("seed of the first picture; the others count from it", "S")] = 0
    guidance: Annotated[
        float | None,
        Flag("how strongly to follow the prompt; 0 is unguided (default: the model's)", "W"),
    ] = None
    temperature: Annotated[
        float | None,
        Flag("factor on the noise: 1 is the model's own distribution, less is simpler (default: the model's)", "T"),
    ] = None
    candidates: Annotated[
        int | None,
        Flag("pictures drawn for each that is kept, the likeliest under its prompt (default: the model's)", "K"),
    ] = None
    size: Annotated[str, Flag("width and height in pixels, e.g. 64x64 (default: the model's)", "WxH")] = ""
    aspect: Annotated[Aspect | None, Flag("a ratio instead of a size: " + ", ".join(ASPECTS), "W:H")] = None
    sampler: Annotated[
        Literal["flow", "student"], Flag("the flow, or the model's student: one pass, an approximation")
    ] = "flow"
    solver: Annotated[Literal["auto", "sequential", "jacobi"], Flag("how blocks are solved")] = "auto"
    cleaning: Annotated[
        Literal["decoder", "tweedie", "denoiser", "none"] | None,
        Flag(
            "how samples lose the noise of training: decoder, tweedie, denoiser or none (default: the model's)", "WAY"
        ),
    ] = None
    decoder: Annotated[
        str, Flag("another autoencoder to decode with, e.g. TAESD, or one of train-decoder: folder or hub id", "NAME")
    ] = ""
    model: Annotated[str, Flag("bundled name, folder, or hub repository (owner/name@revision)")] = "glyphs"
    output: Annotated[str, Flag("a folder, or a name ending in .png for one picture", "PATH")] = "out"
    label: Annotated[str, Flag("a class's name or number, for a model that has classes", "NAME", "class")] = ""
    prompts: Annotated[str, Flag("a text file, one prompt a line; lines that start with # are skipped", "FILE")] = ""
    grid: Annotated[bool, Flag("write all pictures side by side as well, as grid.png")] = False
    batch_size: Annotated[int, Flag("pictures at once: memory depends on it, pictures do not", "N")] = 16
    device: Annotated[Device, Flag("where to compute")] = "auto"
    dtype: Annotated[
        Precision | None,
        Flag("precision of the network (default: float32, or as stored from a billion parameters on)", "DTYPE"),
    ] = None
    weights: Annotated[
        WeightFormat | None,
        Flag("format of the layers' weights, fewer bits for speed and memory (default: --dtype)", "FORMAT"),
    ] = None
    offload: Annotated[bool, Flag("only the block at work on the device, the others on the CPU, for memory")] = False
    cache_dtype: Annotated[CacheDtype, Flag("precision of the attention's cache")] = "network"
    tile: Annotated[int | None, Flag("decode in tiles of so many latent pixels, for memory", "N")] = None
    overwrite: Annotated[bool, Flag("replace files of another setting, rather than take the next free name")] = False
    json: Annotated[bool, Flag("print paths, prompts, seeds and seconds as JSON")] = False

    def __post_init__(self) -> None:
        counts = (
            ("--num-images", self.num_images),
            ("--batch-size", self.batch_size),
            ("--candidates", self.candidates),
        )
        for name, value in counts:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        if self.guidance is not None and not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise UserError(f"--guidance is {self.guidance:g}, expected at least 0 (0 is unguided)")
        if self.temperature is not None and not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature is {self.temperature:g}, expected above 0 (1 is the model's distribution)")
        if sum(map(bool, (self.prompt, self.label, self.prompts))) > 1:
            raise UserError("more than one of PROMPT, --class and --prompts is given: choose one")
        if self.size and self.aspect:
            raise UserError(f"both --size {self.size} and --aspect {self.aspect} are given: choose one")
        check_seed(self.seed)


@dataclass(frozen=True)
class WrittenImage:
    """One image that is on the disk, and what it was drawn from."""

    path: Path
    prompt: str
    seed: int
    image: Image


def generate(options: GenerateOptions) -> None:
    """Run `starflow generate`."""
    size = parse_size(options.size) if options.size else None
    prompts = [prompt for prompt in read_prompts(options) for _ in range(options.num_images)]
    target = OutputTarget.of(options.output, len(prompts), grid=options.grid)
    started = time.perf_counter()
    with collection_off():
        pipeline = _load(options)
        if options.aspect:
            size = aspect_size(options.aspect, pipeline.config.image_size, pipeline.size_multiple)
        pipeline.remember_prompts(prompts, size)
    loaded = time.perf_counter()
    written = list(_write(pipeline, prompts, size, options, target))
    grid = _write_grid(written, options, target) if options.grid else None
    seconds = {"load": round(loaded - started, 3), "sample": round(time.perf_counter() - loaded, 3)}
    _print_result(options, written, grid, seconds)


def read_prompts(options: GenerateOptions) -> list[str]:
    """The prompts that the options give, at least one."""
    return read_prompt_file(Path(options.prompts)) if options.prompts else [options.label or options.prompt]


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a text file, one a line; "-" is the standard input.

    Raises:
        UserError: the file is missing, is no text, or holds no prompt.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; --prompts takes a text file with one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text ({error}): --prompts takes one prompt a line") from None
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path} holds no prompt, expected one a line")
    return prompts


def _load(options: GenerateOptions) -> StarFlowPipeline:
    from starflow.pipeline.pipeline import StarFlowPipeline

    pipeline = StarFlowPipeline.from_pretrained(
        options.model,
        pick_device(options.device),
        pick_dtype(options.dtype) if options.dtype else None,
        weights=options.weights,
        offload=options.offload,
        decoder=options.decoder or None,
    )
    kind = pipeline.config.conditioner.kind if pipeline.config.conditioner else "none"
    if options.label and kind != "class":
        raise UserError(f"'{options.model}' has no classes (its condition: {kind}): give a prompt instead of --class")
    return pipeline


def _write(
    pipeline: StarFlowPipeline,
    prompts: list[str],
    size: tuple[int, int] | None,
    options: GenerateOptions,
    target: OutputTarget,
) -> Iterator[WrittenImage]:
    """Sample batch by batch; each batch is on the disk before the next, so that Ctrl-C keeps what is finished."""
    from tqdm import tqdm

    from starflow.data.images import save_png

    known = _drawn_as(pipeline, options)
    form = "{l_bar}{bar}| {n:.0f}/{total} pictures [{elapsed}<{remaining}]"
    with tqdm(total=len(prompts), bar_format=form, disable=None) as bar:
        for start in range(0, len(prompts), options.batch_size):
            some = prompts[start : start + options.batch_size]

            def progress(done: int, total: int, start: int = start, images: int = len(some)) -> None:
                bar.update(start + images * done / total - bar.n)

            out = _sample(pipeline, some, options, options.seed + start, size, progress)
            for image, prompt, seed in zip(out.images, out.prompts, out.seeds, strict=True):
                texts = {"prompt": prompt, "seed": str(seed), **known}
                path = target.path(prompt, seed)
                path = path if options.overwrite else free_path(path, image, texts)
                save_png(image, path, texts)
                yield WrittenImage(path, prompt, seed, image)


def _drawn_as(pipeline: StarFlowPipeline, options: GenerateOptions) -> dict[str, str]:
    """What the files say of how they were drawn, beside prompt and seed."""
    from starflow.pipeline.config import own_guidance, with_sampling_options

    student = pipeline.student if options.sampler == "student" else None
    drawn_as = with_sampling_options(
        pipeline.config, options.temperature, options.candidates, student.config if student else None
    )
    weight = own_guidance(pipeline.config, student) if options.guidance is None else options.guidance
    texts = {"guidance": f"{weight:g}", "temperature": f"{drawn_as.temperature:g}"}
    texts |= {"candidates": f"{drawn_as.candidates}", "model": options.model}
    return texts | ({"sampler": "student, an approximation of the flow"} if student else {})


def free_path(path: Path, image: Image, texts: Mapping[str, str]) -> Path:
    """The path itself where nothing or this very picture is there, else the first that is free: NAME-2, NAME-3, ..."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists() or _holds(one, image, texts))


def _holds(path: Path, image: Image, texts: Mapping[str, str]) -> bool:
    """Whether a file holds this picture with these texts."""
    from PIL import Image

    try:
        with Image.open(path) as held:
            same = held.size == image.size and held.convert("RGB").tobytes() == image.convert("RGB").tobytes()
            return same and all(held.info.get(key) == value for key, value in texts.items())
    except (OSError, SyntaxError, ValueError):
        return False


def _sample(
    pipeline: StarFlowPipeline,
    prompts: list[str],
    options: GenerateOptions,
    seed: int,
    size: tuple[int, int] | None,
    progress: Any,
) -> Any:
    import torch

    try:
        return pipeline(
            prompts,
            guidance=options.guidance,
            temperature=options.temperature,
            candidates=options.candidates,
            seed=seed,
            size=size,
            sampler=options.sampler,
            solver=options.solver,
            cleaning=options.cleaning,
            batch_size=options.batch_size,
            cache_dtype=options.cache_dtype,
            tile=options.tile,
            progress=progress,
        )
    except RuntimeError as error:
        # torch has a type for a full GPU; a full CPU is a plain RuntimeError, known by its text alone.
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        raise UserError(
            f"{len(prompts)} pictures at once do not fit the memory of {pipeline.device}: lower --batch-size or --size"
        ) from None


def _write_grid(written: list[WrittenImage], options: GenerateOptions, target: OutputTarget) -> Path:
    """Write all images side by side: a row a prompt where each has several, else about as many columns as rows."""
    import torch

    from starflow.data.images import from_pil, make_grid, save_png

    several = 1 < options.num_images < len(written)
    columns = options.num_images if several else math.ceil(math.sqrt(len(written)))
    sheet = make_grid(torch.cat([from_pil(one.image) for one in written]), columns)
    path = target.grid_path if options.overwrite else free_path(target.grid_path, sheet, {})
    save_png(sheet, path)
    return path


def _print_result(
    options: GenerateOptions, written: list[WrittenImage], grid: Path | None, seconds: dict[str, float]
) -> None:
    if options.json:
        images = [{"path": str(one.path), "prompt": one.prompt, "seed": one.seed} for one in written]
        result = {"model": options.model, "images": images, "grid": str(grid) if grid else None, "seconds": seconds}
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for path in [one.path for one in written] + ([grid] if grid else []):
        print(path)
