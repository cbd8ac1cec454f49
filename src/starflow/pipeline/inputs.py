"""What callers hand to a pipeline is checked here: one function a kind of input, which every method goes through.

Whatever is not as it should be is a `UserError` of one sentence, before anything is computed. The memory of a call is
predicted too and compared with what is free, as a system that runs out of it kills the process; the prediction is
`starflow.flow.memory`'s, without the weights, which are there already. Prompts that are checked become the condition of
a flow: tokens of a text encoder, a class's vector, or the labels of a TarFlow.
"""

from __future__ import annotations

import operator
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starflow.conditioning import ClassLabels, Conditioner, OnDemandTextEncoder
from starflow.data.buckets import caption_with_ratio, nearest_aspect
from starflow.data.images import from_pil, open_image, upright_colour
from starflow.errors import UserError
from starflow.flow.memory import AUTOENCODERS, GIB, sampling_memory
from starflow.flow.model import Flow, STARFlow, TarFlow
from starflow.latents import AutoencoderSpec
from starflow.latents.base import MIN_TILE
from starflow.pipeline.config import Cleaning, PipelineConfig
from starflow.sampling.policy import CacheDtype, SampleSettings
from starflow.sampling.student import Student

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_SEED = 2**63 - 1

RANGE_SLACK = 1.5
"""Values of pictures in [-1, 1] stay below it, whatever resizing has added."""


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        UserError: anything else.

    >>> check_whole("draws", 3)
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}, expected a whole number of at least {least}")
    if number < least:
        raise UserError(f"{name} is {number}, expected at least {least}")
    return number


def check_counts(
    num_images: int, batch_size: int, candidates: int | None, tile: int | None, not_finite: str = "raise"
) -> None:
    """Raises UserError: a number of pictures, of candidates, at once, or of a tile's latent pixels that cannot be."""
    if not_finite not in ("raise", "keep"):
        raise UserError(f"not_finite is {not_finite!r}, expected 'raise' or 'keep'")
    check_whole("num_images", num_images)
    check_whole("batch_size", batch_size)
    if candidates is not None:
        check_whole("candidates", candidates)
    if tile is not None:
        check_whole("tile", tile, MIN_TILE)


def check_prompts(prompts: str | Iterable[str], count: int | None = None, *, least: int = 0) -> list[str]:
    """A prompt for each of `count` pictures; one text is that of all of them.

    Raises:
        UserError: no text, not a list of texts, or another number of them.

    >>> check_prompts("a cat", 2)
    ['a cat', 'a cat']
    """
    if isinstance(prompts, str):
        return [_check_text(prompts)] * (1 if count is None else count)
    if isinstance(prompts, bytes | Mapping | Set) or not isinstance(prompts, Iterable):
        raise UserError(f"the prompt is {prompts!r}, expected a text or a list of texts ('' is none)")
    found = list(prompts)
    for prompt in found:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is {prompt!r}, expected a text ('' is none)")
        _check_text(prompt)
    if len(found) < least:
        raise UserError(f"there are {len(found)} prompts, expected at least {least} ('' is unconditional)")
    if count is not None and len(found) != count:
        raise UserError(f"{len(found)} prompts for {count} pictures: give one text for all, or one for each")
    return found


def _check_text(prompt: str) -> str:
    """Raises UserError: a text that cannot be encoded, as of a file's name that is no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} holds half a character (a lone surrogate): take it out") from None
    return prompt


def check_seeds(seeds: Iterable[int], count: int) -> list[int]:
    """A seed for each of `count` pictures.

    Raises:
        UserError: another number of seeds, or one that no generator takes.
    """
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Iterable):
        raise UserError(f"the seeds are {seeds!r}, expected one for each of {count} pictures")
    found = [check_seed(seed) for seed in seeds]
    if len(found) != count:
        raise UserError(f"{len(found)} seeds for {count} pictures: give one for each")
    return found


def check_seed(seed: Any, pictures: int = 1) -> int:
    """The seed of the first of some pictures, those of the others counting from it.

    Raises:
        UserError: no whole number, or one that no generator takes.
    """
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = None
    if number is None:
        raise UserError(f"the seed is {seed!r}, expected a whole number, 0 to {LARGEST_SEED}")
    last = number + pictures - 1
    if number < 0 or last > LARGEST_SEED:
        raise UserError(f"the seed is {number if number < 0 else last}, expected 0 to {LARGEST_SEED}")
    return number


def check_pair(size: Any) -> tuple[int, int]:
    """(width, height) in pixels.

    Raises:
        UserError: no pair of whole numbers.
    """
    if isinstance(size, str | bytes) or not isinstance(size, Iterable) or len(pair := tuple(size)) != 2:
        raise UserError(f"the size is {size!r}, expected (width, height) in pixels, e.g. (256, 256)")
    return check_whole("the width", pair[0]), check_whole("the height", pair[1])


def check_box(box: Any) -> tuple[int, int, int, int]:
    """A rectangle: x, y, width and height in pixels.

    Raises:
        UserError: not four whole numbers from 0 up.
    """
    found = () if isinstance(box, str | bytes) or not isinstance(box, Iterable) else tuple(box)
    if len(found) != 4:
        raise UserError(f"the box is {box!r}, expected (x, y, width, height) in pixels, e.g. (16, 16, 32, 32)")
    x, y = (check_whole(f"{name} of the box", value, 0) for name, value in zip("xy", found[:2], strict=True))
    return x, y, check_whole("the width of the box", found[2]), check_whole("the height of the box", found[3])


def read_picture(image: Image | str | Path) -> Image:
    """One picture, upright, as RGB, or RGBA if it has transparency; the same from a file and from Pillow.

    Raises:
        UserError: neither a picture of Pillow's nor a file that holds one.
    """
    from PIL import Image

    if isinstance(image, str | Path):
        return open_image(Path(image).expanduser())
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise UserError(f"the picture is a {kind}, expected a PIL image or a path: for arrays, PIL.Image.fromarray")
    try:
        return upright_colour(image)
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the picture cannot be decoded ({reason}): replace it") from None


def read_image(image: Image | str | Path) -> Tensor:
    """`read_picture` as (1, 3, H, W) in [-1, 1], transparency on white."""
    return from_pil(read_picture(image))


def check_range(images: Tensor, device: torch.device) -> Tensor:
    """Pictures (B, 3, H, W) on a device; a warning where they seem to lie in another range than [-1, 1].

    Bright ones whose values are 8-bit levels in [-1, 1] do not, since levels in [0, 1] lie halfway between those.

    Raises:
        UserError: a tensor without values, or one that is not dense.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or not images.numel():
        return images  # an autoencoder says what is wrong with it
    if images.is_meta or images.layout != torch.strided:
        kind = "without values (on device meta)" if images.is_meta else "sparse"
        raise UserError(f"the pictures are a tensor that is {kind}, expected a dense one with values")
    low, high = (float(end) for end in images.detach().aminmax())
    if high > RANGE_SLACK:
        warnings.warn(f"pictures reach {high:g}, expected [-1, 1]: from 0..255, take x / 127.5 - 1", stacklevel=3)
    elif 0 <= low < high <= 1 and not torch.allclose(levels := 127.5 * images, levels.floor() + 0.5, rtol=0, atol=0.01):
        warnings.warn(f"pictures lie in [{low:g}, {high:g}], expected [-1, 1]: from [0, 1], 2 x - 1", stacklevel=3)
    return images.to(device)


MEMINFO, CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def call_bytes(
    flow: Flow,
    shape: tuple[int, int, int],
    batch: int,
    cache_dtype: CacheDtype,
    decoder: AutoencoderSpec,
    tile: int | None,
    *,
    denoised: bool = False,
) -> int:
    """About the bytes that sampling and decoding `batch` latents of a shape (C, h, w) at once take, without weights.

    With a Tweedie step between the two where they are `denoised`.
    """
    low = flow.network_dtype == torch.bfloat16
    needed = sampling_memory(
        flow.config,
        batch,
        tokens=shape[1] * shape[2] // flow.config.patch_size**2,
        dtype="bfloat16" if low else "float32",
        cache_dtype="bfloat16" if low or cache_dtype == "bfloat16" else "float32",
        iterated=False,
        autoencoder=AUTOENCODERS.get(decoder.kind),
        denoised=denoised and flow.offloaded_to is None,
        tile=tile,
    )
    return needed.cache + max(needed.activations, needed.denoising, needed.decoding)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that is free, or that the system can free; None where that cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    limit, used = (_number(CGROUPS / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        return limit - used if free is None else min(free, limit - used)
    return free


def check_memory(
    flow: Flow,
    shape: tuple[int, int, int],
    batch: int,
    cache_dtype: CacheDtype,
    decoder: AutoencoderSpec,
    tile: int | None,
    *,
    denoised: bool = False,
) -> None:
    """Refuse a call that does not fit; the arguments are those of `call_bytes`.

    Raises:
        UserError: it needs more memory than is free; names the ways out.
    """
    free = free_bytes(flow.device)
    needed = call_bytes(flow, shape, batch, cache_dtype, decoder, tile, denoised=denoised)
    if free is None or needed <= free:
        return
    ways = ["a smaller size", *(["fewer at once"] if batch > 1 else []), "cache_dtype bfloat16"]
    ways += ["offload", *([] if tile else ["tile"])]
    size, there = f"{shape[2] * decoder.factor}x{shape[1] * decoder.factor}", max(0, free) / GIB
    raise UserError(
        f"{batch} at once of {size} pixels need about {needed / GIB:.1f} GiB, but {there:.1f} GiB "
        f"are free on {flow.device}: use {', '.join(ways[:-1])} or {ways[-1]}"
    )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # none there, or "max"
        return None


def encode_prompts(
    prompts: Sequence[str],
    conditioner: Conditioner | None,
    flow: STARFlow | TarFlow,
    config: PipelineConfig,
    latent_shape: Sequence[int] = (1, 1),
) -> tuple[Tensor | None, Tensor | None]:
    """Condition and null condition of a batch, as the flow takes them.

    Args:
        prompts: (B,) texts, or names or numbers of classes; "" is unconditional.
        conditioner: None where the model takes no prompt.
        flow: STARFlow takes tokens (B, T, D), TarFlow labels (B,) on its device, -1 for no class.
        config: whose ratios the captions are told of.
        latent_shape: ends with the latents' (h, w).

    Raises:
        UserError: a prompt for a model that takes none, or an unknown class.
    """
    if conditioner is None:
        if any(prompts):
            raise UserError(f"'{config.name}' takes no prompt, got '{next(filter(None, prompts))}': leave it empty")
        return None, None
    if isinstance(flow, TarFlow):
        assert isinstance(conditioner, ClassLabels)
        labels = torch.tensor(list(map(conditioner.number, prompts)), dtype=torch.long, device=flow.device)
        return labels.where(labels < flow.config.num_classes, -1), None
    if not prompts:
        return conditioner.null(0), conditioner.null(0)
    if conditioner.spec.kind != "class":
        prompts = add_aspect_ratio(prompts, config, latent_shape)
    return conditioner.encode(prompts), conditioner.null(len(prompts))


def remember_prompts(
    prompts: Sequence[str], conditioner: Conditioner | None, config: PipelineConfig, latent_shape: Sequence[int]
) -> None:
    """Encode prompts ahead where the text encoder is loaded on demand, so that it is loaded once for all of them."""
    if isinstance(conditioner, OnDemandTextEncoder):
        conditioner.encode_ahead(add_aspect_ratio(prompts, config, latent_shape))


class PromptConditions:
    """Conditions of prompts, each as it is where its prompt is encoded alone; the `kept` asked for last are kept."""

    def __init__(
        self, conditioner: Conditioner | None, flow: STARFlow | TarFlow, config: PipelineConfig, kept: int
    ) -> None:
        self._model, self._kept, self._together = (conditioner, flow, config), kept, False
        self._found: OrderedDict[tuple[str, int, int], tuple[Tensor | None, Tensor | None]] = OrderedDict()

    def try_together(self) -> None:
        """Find out whether prompts encoded together come out as alone; products on a GPU, say, round by batch."""
        conditioner = self._model[0]
        if conditioner is None or isinstance(conditioner, OnDemandTextEncoder):
            return
        some = example_prompts(conditioner, 4)
        alone = torch.cat([conditioner.encode([prompt]) for prompt in some])
        self._together = torch.equal(conditioner.encode(some), alone)

    def prepare(self, prompts: Sequence[str], shape: tuple[int, int, int]) -> None:
        """Encode prompts that will be asked for, together where that makes no difference.

        Raises:
            UserError: a prompt that the model does not know.
        """
        conditioner, flow, config = self._model
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, *shape[1:]) not in self._found]
        remember_prompts(new, conditioner, config, shape)
        for some in [new] if self._together and new else [[prompt] for prompt in new]:
            conditions, nulls = encode_prompts(some, conditioner, flow, config, shape)
            for row, prompt in enumerate(some):
                one, null = (None if every is None else every[row : row + 1].clone() for every in (conditions, nulls))
                self._found[prompt, *shape[1:]] = one, null

    def of(self, prompt: str, shape: tuple[int, int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Condition and null condition of a prompt, one row each, as `encode_prompts` gives them for (C, h, w)."""
        self.prepare([prompt], shape)
        name = (prompt, *shape[1:])
        self._found.move_to_end(name)
        while len(self._found) > self._kept:
            self._found.popitem(last=False)
        return self._found[name]


def add_aspect_ratio(prompts: Sequence[str], config: PipelineConfig, latent_shape: Sequence[int]) -> list[str]:
    """Prompts as the text encoder reads them: with the nearest ratio, where the model was told of it in training.

    `latent_shape` ends with (h, w). An empty prompt stays the null condition.

    >>> from starflow.latents import AutoencoderSpec
    >>> config = PipelineConfig("wide", 256, 0.3, AutoencoderSpec("diffusers_kl", 4, 8), aspects=("1:1", "16:9"))
    >>> add_aspect_ratio(["a cat", ""], config, (4, 24, 42))
    ['a cat\\n in a 16:9 aspect ratio.\\n', '']
    """
    if len(config.aspects) < 2:
        return list(prompts)
    aspect = nearest_aspect(latent_shape[-1], latent_shape[-2], config.aspects)
    return [caption_with_ratio(prompt, aspect) if prompt else "" for prompt in prompts]


def example_prompts(conditioner: Conditioner | None, count: int) -> list[str]:
    """Prompts of the kind that a model reads, to measure with: its classes in turn, or things in two colours."""
    if conditioner is None:
        return [""] * count
    if isinstance(conditioner, ClassLabels):
        known: Sequence[str] = conditioner.spec.names
    else:
        known = [f"a {colour} {thing}" for thing in ("apple", "car", "cat", "tree") for colour in ("red", "blue")]
    return [known[index % len(known)] for index in range(count)]


def check_student_call(
    sampler: str,
    student: Student | None,
    name: str,
    settings: SampleSettings,
    cleaning: Cleaning | None,
    weights: Tensor,
) -> Student | None:
    """The student that a call draws with, or None where it draws with the flow.

    Args:
        sampler: "flow" or "student".
        student: of the model, if it has one.
        name: of the model.
        settings: of the call, those of the flow's solvers.
        cleaning: that the call asks for.
        weights: of guidance, one a picture.

    Raises:
        UserError: no such sampler, no student, a weight above those of its training, or an option that does nothing.
    """
    if sampler not in ("flow", "student"):
        raise UserError(f"sampler is {sampler!r}, expected 'flow' or 'student'")
    if sampler == "flow":
        return None
    if student is None:
        raise UserError(
            f"sampler is 'student', but '{name}' has none: train one by `starflow train-student`, or use 'flow'"
        )
    default = SampleSettings(settings.guidance, "auto")
    given = {
        "solver": settings.solver != default.solver,
        "guidance_rule": settings.guidance_rule != default.guidance_rule,
        "guidance_schedule": settings.guidance_schedule != default.guidance_schedule,
        "cache_dtype": settings.cache_dtype != default.cache_dtype,
        "cleaning": cleaning not in (None, "none"),
    }
    for option, idle in given.items():
        if idle:
            raise UserError(f"{option} has no effect with sampler 'student', which takes one pass to clean latents")
    largest, most = student.config.largest_guidance, float(weights.max())
    if most > largest:
        raise UserError(f"guidance is {most:g}, but the student was trained up to {largest:g}: lower it, or use 'flow'")
    return student
