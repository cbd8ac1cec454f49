"""Pictures that are already there, as a pipeline edits them: crop, encode, edit, decode, paste.

Contract: picture i of a call has the seed `seed + i`; it is computed alone, so that it does not depend on the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from starflow.data.images import from_pil, to_pil
from starflow.edit import editing
from starflow.edit.inpainting import InpaintSettings, inpaint
from starflow.edit.masks import box_mask, read_mask
from starflow.edit.pictures import Scene, resized
from starflow.errors import UserError
from starflow.flow.model import STARFlow, TarFlow
from starflow.pipeline.config import Cleaning, PipelineConfig

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""x, y, width and height in pixels."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Edited:
    """Pictures made of others, and what the model says of them."""

    images: list[Image]
    latents: Tensor
    """(B, C, h, w): what the model sees of each, with the noise of its training, before cleaning."""
    log_prob: list[float]
    """log p(latent | prompt) of each in nats, unguided and at temperature 1, as `log_prob` of the pipeline."""
    dimensions: int
    """Of a latent; nats divided by it compare pictures."""
    acceptance: list[float]
    """Share of a chain's steps that were accepted; NaN where there is no chain."""
    effective_samples: list[float]
    """Draws that the choice of each rests on; NaN where nothing was chosen by weight."""
    seeds: list[int]
    notes: list[str]
    """What was done with mask and size, a line each."""


class Editable(Protocol):
    """What editing needs of a pipeline."""

    flow: STARFlow | TarFlow
    config: PipelineConfig

    def _noised(self, images: Tensor, seeds: Sequence[int]) -> Tensor: ...
    def _condition(self, prompts: Sequence[str], shape: Sequence[int] = ...) -> tuple[Tensor | None, Tensor | None]: ...
    def _way_out(self, asked: Cleaning | None) -> Cleaning: ...
    def _picture(
        self, latents: Tensor, condition: Tensor | None, cleaning: Cleaning, tile: int | None = None
    ) -> Tensor: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def _level_nats(self) -> float: ...


def hole_of(image: Image, mask: Image | None, box: Box | None, *, invert: bool = False) -> tuple[Tensor, str]:
    """Where a picture is painted anew, (1, 1, H, W) of bool, and how that was read.

    Raises:
        UserError: neither mask nor box nor transparency, both of the first two, or nothing to repaint.
    """
    if mask is not None and box is not None:
        raise UserError("both a mask and a box are given: choose one")
    if box is not None:
        hole, shown = box_mask(box, image.size), ",".join(map(str, box))
        if invert and bool(hole.all()):
            raise UserError(f"the box {shown} covers the picture, and inverted it repaints nothing: make it smaller")
        return (~hole if invert else hole), f"the box {shown} is {'kept' if invert else 'repainted'}"
    if mask is None and not image.has_transparency_data:
        raise UserError("no mask: give one (white is repainted), a box, or a picture that is transparent there")
    return read_mask(image if mask is None else mask, image.size, invert=invert)


def inpaint_picture(
    pipeline: Editable,
    image: Image,
    hole: Tensor,
    prompt: str,
    num_images: int,
    seed: int,
    settings: InpaintSettings,
    feather: int,
    cleaning: Cleaning | None,
    progress: Progress | None,
) -> Edited:
    """Fill a hole (1, 1, H, W) of a picture `num_images` times; see `StarFlowPipeline.inpaint`."""
    _check_counts(num_images, feather)
    scene = _scene(pipeline, image, hole)
    seeds = [seed + index for index in range(num_images)]
    latents = _each(lambda one: pipeline._noised(scene.seen.to(pipeline.device), [one]), seeds)
    condition, null = pipeline._condition([prompt], latents.shape)
    rows = [None if one is None else one.expand(num_images, *one.shape[1:]) for one in (condition, null)]
    null_rows = rows[1] if settings.guidance else None
    holes = scene.latent_hole.to(pipeline.device).expand(num_images, -1, -1, -1)
    filled = inpaint(
        pipeline.flow, latents, holes, rows[0], null_rows, seeds=seeds, settings=settings, progress=progress
    )
    images = [scene.paste(_decoded(pipeline, one, condition, cleaning), feather) for one in filled.x.split(1)]
    numbers = (filled.acceptance.tolist(), filled.effective_samples.tolist())
    return _edited(pipeline, images, filled.x, filled.log_prob, numbers, seeds, scene)


def edit_picture(
    pipeline: Editable,
    image: Image,
    prompts: tuple[str, str],
    strength: float,
    hole: Tensor | None,
    num_images: int,
    seed: int,
    guidance: float,
    feather: int,
    cleaning: Cleaning | None,
    progress: Progress | None,
) -> Edited:
    """Encode under one prompt and decode under another; see `StarFlowPipeline.edit`."""
    _check_counts(num_images, feather)
    everywhere = torch.ones(1, 1, image.height, image.width, dtype=torch.bool)
    scene = _scene(pipeline, image, everywhere if hole is None else hole, keep=True)
    seeds = [seed + index for index in range(num_images)]
    condition, null = pipeline._condition([prompts[0]], scene.latent_hole.shape)
    new, _ = pipeline._condition([prompts[1]], scene.latent_hole.shape)
    made = []
    for number, one in enumerate(seeds):
        latent = pipeline._noised(scene.seen.to(pipeline.device), [one])
        changed = editing.edit(
            pipeline.flow, latent, condition, new, null, seeds=[one], strength=strength, guidance=guidance
        )
        made.append(torch.where(scene.latent_hole.to(changed.device), changed, latent))
        if progress is not None:
            progress(number + 1, num_images)
    images = [scene.paste(_decoded(pipeline, one, new, cleaning), feather) for one in made]
    latents = torch.cat(made)
    return _edited(pipeline, images, latents, _log_prob(pipeline, latents, new), _no_chain(num_images), seeds, scene)


def interpolate_pictures(
    pipeline: Editable,
    images: tuple[Image, Image],
    prompts: tuple[str, str],
    steps: int,
    seed: int,
    guidance: float,
    cleaning: Cleaning | None,
) -> Edited:
    """Pictures on the way from one to another; see `StarFlowPipeline.interpolate`."""
    side = pipeline.config.image_size
    seen = [resized(from_pil(image), (side, side)).to(pipeline.device) for image in images]
    first, second = (pipeline._noised(one, [seed]) for one in seen)
    (a, null), (b, _) = (pipeline._condition([prompt], first.shape) for prompt in prompts)
    latents = editing.interpolate(pipeline.flow, first, second, a, b, null, steps=steps, guidance=guidance)
    pictures, nats = [], []
    for number, one in enumerate(latents.split(1)):
        given = editing.mixed(a, b, number / (steps - 1))
        pictures.append(to_pil(_decoded(pipeline, one, given, cleaning))[0])
        nats.append(_log_prob(pipeline, one, given))
    sizes = [f"the picture is {one.width}x{one.height}; the model sees it as {side}x{side}" for one in images]
    notes = [note for note, one in zip(sizes, images, strict=True) if one.size != (side, side)]
    levels = latents[0].numel() * pipeline._level_nats
    log_prob = [float(one) - levels for one in nats]
    nothing = _no_chain(steps)
    return Edited(pictures, latents, log_prob, latents[0].numel(), *nothing, [seed] * steps, notes)


def _scene(pipeline: Editable, image: Image, hole: Tensor, *, keep: bool = False) -> Scene:
    if hole.shape[-2:] != (image.height, image.width):
        raise UserError(
            f"the mask is {hole.shape[-1]}x{hole.shape[-2]}, the picture {image.width}x{image.height}: give one size"
        )
    side, factor = pipeline.config.image_size, pipeline.config.autoencoder.factor
    return Scene.of(image, hole, side, (side // factor, side // factor), keep=keep)


def _decoded(pipeline: Editable, latents: Tensor, condition: Tensor | None, cleaning: Cleaning | None) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("once")
        way = pipeline._way_out(cleaning)
    return pipeline._picture(latents, condition, way)


@torch.no_grad()
def _log_prob(pipeline: Editable, latents: Tensor, condition: Tensor | None) -> Tensor:
    return torch.cat([pipeline.flow.log_prob(one, condition) for one in latents.split(1)])


def _each(make: Callable[[int], Tensor], seeds: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return torch.cat([make(seed) for seed in seeds])


def _no_chain(count: int) -> tuple[list[float], list[float]]:
    return [float("nan")] * count, [float("nan")] * count


def _check_counts(num_images: int, feather: int) -> None:
    if num_images < 1:
        raise UserError(f"num_images is {num_images}, expected at least 1")
    if feather < 0:
        raise UserError(f"feather is {feather}, expected 0 pixels or more")


def _edited(
    pipeline: Editable,
    images: list[Image],
    latents: Tensor,
    log_prob: Tensor,
    numbers: tuple[list[float], list[float]],
    seeds: list[int],
    scene: Scene,
) -> Edited:
    dimensions = latents[0].numel()
    nats = (log_prob - dimensions * pipeline._level_nats).tolist()
    return Edited(images, latents, nats, dimensions, *numbers, seeds, [scene.said] if scene.said else [])
