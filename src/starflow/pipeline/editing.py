"""Pictures that are already there, as a pipeline edits them: crop, encode, edit, decode, paste.

Contract: picture i of a call has the seed `seed + i`; it is computed alone, so that it does not depend on the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from starflow.data.buckets import ratio_change
from starflow.data.images import from_pil, to_pil
from starflow.edit import editing
from starflow.edit.inpainting import InpaintSettings, Method, inpaint
from starflow.edit.masks import HALF, Scene, box_mask, read_mask, resized
from starflow.errors import UserError
from starflow.flow.model import STARFlow, TarFlow
from starflow.latents import Autoencoder
from starflow.pipeline.config import Cleaning, PipelineConfig, check_number, choose_cleaning, trained_sizes
from starflow.pipeline.inputs import check_box, check_prompts, check_seed, check_whole, read_picture
from starflow.pipeline.likelihood import add_training_noise, log_probs
from starflow.sampling.denoise import Denoiser

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
"""x, y, width and height in pixels."""

Progress = Callable[[int, int], None]

Preview = Callable[[int, "Image"], None]
"""Called with the number of a picture, and what it is so far."""


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


def filling_density(
    config: PipelineConfig, prompt: str, guidance: float | None, temperature: float | None
) -> tuple[float, float]:
    """Guidance and temperature of the density that holes are filled from: by default what the model draws at.

    Without a prompt there is nothing to be guided to.

    >>> from starflow.pipeline.pipeline import StarFlowPipeline
    >>> config = StarFlowPipeline.from_pretrained("glyphs").config
    >>> filling_density(config, "", None, 1.0), filling_density(config, "a red apple", 2.0, 0.7)
    ((0.0, 1.0), (2.0, 0.7))
    """
    if guidance is None:
        guidance = config.guidance if prompt else 0.0
    return guidance, config.temperature if temperature is None else temperature


class Editable(Protocol):
    """What editing needs of a pipeline; `StarFlowPipeline` fills it in."""

    flow: STARFlow | TarFlow
    autoencoder: Autoencoder
    decoder: Autoencoder | None
    denoiser: Denoiser | None
    config: PipelineConfig

    @property
    def device(self) -> torch.device: ...
    def _condition(self, prompts: Sequence[str], shape: Sequence[int] = ...) -> tuple[Tensor | None, Tensor | None]: ...
    def _decode_clean(
        self, latents: Tensor, condition: Tensor | None, cleaning: Cleaning, tile: int | None = None
    ) -> Tensor: ...


def hole_of(
    image: Image, mask: Image | str | Path | None, box: Box | None, *, invert: bool = False
) -> tuple[Tensor, str]:
    """Where a picture is painted anew, (1, 1, H, W) of bool, and how that was read.

    Raises:
        UserError: neither mask nor box nor transparency, both of the first two, or nothing to repaint.
    """
    if mask is not None and box is not None:
        raise UserError("both a mask and a box are given: choose one")
    if box is not None:
        box = check_box(box)
        hole, shown = box_mask(box, image.size), ",".join(map(str, box))
        if invert and bool(hole.all()):
            raise UserError(f"the box {shown} covers the picture, and inverted it repaints nothing: make it smaller")
        return (~hole if invert else hole), f"the box {shown} is {'kept' if invert else 'repainted'}"
    # An opaque alpha channel marks nothing, and the picture's own white is no mask.
    if mask is None and not any(image.convert("RGBA").getchannel("A").histogram()[:HALF]):
        raise UserError("no mask: give one (white is repainted), a box, or a picture that is transparent there")
    return read_mask(image if mask is None else read_picture(mask), image.size, invert=invert)


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
    preview: Preview | None = None,
) -> Edited:
    """Fill a hole (1, 1, H, W) of a picture `num_images` times; see `StarFlowPipeline.inpaint`."""
    seeds = _seeds(seed, num_images, feather)
    scene = _scene(pipeline, image, hole)
    latents = torch.cat([_noised(pipeline, scene.seen, one) for one in seeds])
    condition, null = pipeline._condition([prompt], latents.shape)
    rows = [None if one is None else one.expand(num_images, *one.shape[1:]) for one in (condition, null)]
    null_rows = rows[1] if settings.guidance else None
    missing = scene.drawn_hole if settings.method == "auto" else scene.latent_hole
    holes = missing.to(pipeline.device).expand(num_images, -1, -1, -1)

    def picture(latent: Tensor) -> Image:
        return scene.paste(_decoded(pipeline, latent, condition, cleaning), feather)

    def show(row: int, latent: Tensor) -> None:
        if preview is not None:
            preview(row, picture(latent))

    filled = inpaint(
        pipeline.flow, latents, holes, rows[0], null_rows, seeds=seeds, settings=settings, progress=progress, show=show
    )
    images = [picture(one) for one in filled.x.split(1)]
    numbers = (filled.acceptance.tolist(), filled.effective_samples.tolist())
    return _edited(pipeline, images, filled.x, condition, numbers, seeds, scene)


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
    seeds = _seeds(seed, num_images, feather)
    everywhere = torch.ones(1, 1, image.height, image.width, dtype=torch.bool, device="cpu")
    scene = _scene(pipeline, image, everywhere if hole is None else hole, keep=True)
    condition, null = pipeline._condition([prompts[0]], scene.latent_hole.shape)
    new, _ = pipeline._condition([prompts[1]], scene.latent_hole.shape)
    made = []
    for number, one in enumerate(seeds):
        latent = _noised(pipeline, scene.seen, one)
        changed = editing.edit(
            pipeline.flow, latent, condition, new, null, seeds=[one], strength=strength, guidance=guidance
        )
        made.append(torch.where(scene.latent_hole.to(changed.device), changed, latent))
        if progress is not None:
            progress(number + 1, num_images)
    images = [scene.paste(_decoded(pipeline, one, new, cleaning), feather) for one in made]
    latents = torch.cat(made)
    return _edited(pipeline, images, latents, new, _no_chain(num_images), seeds, scene)


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
    known = trained_sizes(pipeline.config, pipeline.flow.config)
    size = min(known, key=lambda one: sum(ratio_change(image.size, one) for image in images))
    first, second = (_noised(pipeline, resized(from_pil(image), (size[1], size[0])), seed) for image in images)
    (a, null), (b, _) = (pipeline._condition([prompt], first.shape) for prompt in prompts)
    latents = editing.interpolate(pipeline.flow, first, second, a, b, null, steps=steps, guidance=guidance)
    pictures, nats = [], []
    for number, one in enumerate(latents.split(1)):
        given = editing.mixed(a, b, number / (steps - 1))
        pictures.append(to_pil(_decoded(pipeline, one, given, cleaning))[0])
        nats += _log_probs(pipeline, one, given)
    seen = f"the model sees it as {size[0]}x{size[1]}"
    notes = [f"the picture is {one.width}x{one.height}; {seen}" for one in images if one.size != size]
    return Edited(pictures, latents, nats, latents[0].numel(), *_no_chain(steps), [seed] * steps, notes)


@torch.no_grad()
def _noised(pipeline: Editable, picture: Tensor, seed: int) -> Tensor:
    """A picture's latent with the noise of the training."""
    return add_training_noise(pipeline.autoencoder.encode(picture.to(pipeline.device)), pipeline.config, [seed])


def _scene(pipeline: Editable, image: Image, hole: Tensor, *, keep: bool = False) -> Scene:
    if hole.shape[-2:] != (image.height, image.width):
        raise UserError(
            f"the mask is {hole.shape[-1]}x{hole.shape[-2]}, the picture {image.width}x{image.height}: give one size"
        )
    sizes = trained_sizes(pipeline.config, pipeline.flow.config)
    return Scene.of(image, hole, sizes, pipeline.config.autoencoder.factor, keep=keep)


def _decoded(pipeline: Editable, latents: Tensor, condition: Tensor | None, cleaning: Cleaning | None) -> Tensor:
    decoder = pipeline.decoder or pipeline.autoencoder
    replaced, denoiser = pipeline.decoder is not None, pipeline.denoiser is not None
    way = choose_cleaning(pipeline.config, cleaning, decoder.spec, replaced=replaced, denoiser=denoiser)
    return pipeline._decode_clean(latents, condition, way)


@torch.no_grad()
def _log_probs(pipeline: Editable, latents: Tensor, condition: Tensor | None) -> list[float]:
    """Plain log p of each latent in nats; one by one, so that none depends on the others."""
    return [float(log_probs(pipeline.flow, pipeline.config, one, condition)) for one in latents.split(1)]


def _no_chain(count: int) -> tuple[list[float], list[float]]:
    return [float("nan")] * count, [float("nan")] * count


def _seeds(seed: int, num_images: int, feather: int) -> list[int]:
    """One seed a picture; the feather is checked too."""
    check_whole("feather", feather, 0)
    first = check_seed(seed, check_whole("num_images", num_images))
    return [first + index for index in range(num_images)]


def _edited(
    pipeline: Editable,
    images: list[Image],
    latents: Tensor,
    condition: Tensor | None,
    numbers: tuple[list[float], list[float]],
    seeds: list[int],
    scene: Scene,
) -> Edited:
    nats, notes = _log_probs(pipeline, latents, condition), [scene.said] if scene.said else []
    return Edited(images, latents, nats, latents[0].numel(), *numbers, seeds, notes)


class PictureEditing:
    """The methods that edit pictures, for a pipeline to inherit."""

    def inpaint(
        self: Editable,
        image: Image | str | Path,
        mask: Image | str | Path | None = None,
        prompt: str = "",
        *,
        num_images: int = 1,
        method: Method = "auto",
        seed: int = 0,
        box: Box | None = None,
        invert_mask: bool = False,
        guidance: float | None = None,
        temperature: float | None = None,
        candidates: int = 16,
        steps: int = 20,
        spread: float = 0.3,
        keep: Literal["weighted", "likeliest"] = "weighted",
        feather: int = 2,
        cleaning: Cleaning | None = None,
        progress: Progress | None = None,
        preview: Preview | None = None,
    ) -> Edited:
        """Paint a part of a picture anew, so that the whole is likely under the model.

        Args:
            image: of any size: the model sees a crop round the mask. Known pixels come back bit for bit.
            mask: white is repainted, or alpha 0 where it is transparent; None takes the picture's own alpha.
            prompt: what the whole shows.
            num_images: fillings; number i has the seed `seed + i`.
            method: "auto", "resample", "chain", "hmc" or "paper"; see `starflow.edit.inpainting`.
            seed: of the first filling.
            box: (x, y, width, height) in pixels, instead of a mask.
            invert_mask: keep what would be repainted, and repaint the rest.
            guidance: weight of the density that is drawn from, 0 is unguided; None is what the model draws at, and 0
                where there is no prompt.
            temperature: of that density, 1 is as it was trained; None is what the model draws at.
            candidates: draws that a filling starts from; see `InpaintSettings`.
            steps: of "chain", "hmc" and "paper".
            spread: how freely the known part may move while the chains draw, in the latents' units.
            keep: of "resample"'s draws: one by its weight, or the likeliest.
            feather: pixels inside the hole over which the decoder's error at its edge fades.
            cleaning: how the noise of training is lost; see `__call__`.
            progress: called with (done, in all).
            preview: called with a filling's number and its picture so far: once by "auto", after each step of "hmc".

        Returns:
            Pictures of the given size, with their log p(latent | prompt), acceptance and effective sample size.

        Raises:
            UserError: nothing to repaint, or a setting that no method can have.
        """
        image, prompt = read_picture(image), check_prompts(prompt, 1)[0]
        hole, said = hole_of(image, mask, box, invert=invert_mask)
        guidance, temperature = filling_density(self.config, prompt, guidance, temperature)
        candidates, steps = check_whole("candidates", candidates), check_whole("steps", steps, 0)
        numbers = check_number("guidance", guidance), check_number("temperature", temperature)
        settings = InpaintSettings(
            method, *numbers, candidates, steps=steps, spread=check_number("spread", spread), keep=keep
        )
        made = inpaint_picture(
            self, image, hole, prompt, num_images, seed, settings, feather, cleaning, progress, preview
        )
        return dataclasses.replace(made, notes=[said, *made.notes])

    def edit(
        self: Editable,
        image: Image | str | Path,
        prompt: str,
        new_prompt: str,
        strength: float = 0.0,
        *,
        mask: Image | str | Path | None = None,
        box: Box | None = None,
        invert_mask: bool = False,
        num_images: int = 1,
        seed: int = 0,
        guidance: float = 0.0,
        feather: int = 2,
        cleaning: Cleaning | None = None,
        progress: Progress | None = None,
    ) -> Edited:
        """Encode a picture under one prompt and decode it under another, with some of its noise drawn anew.

        Args:
            image: of any size: the model sees all of it at its own, or a crop round the mask.
            prompt: what it shows.
            new_prompt: what it shall show.
            strength: share s of new noise, z' = sqrt(1 - s^2) z + s g: at 0 an unchanged prompt gives the same latent,
                at 1 nothing of the picture is left.
            mask: as for `inpaint`; what is not repainted stays bit for bit. None and no box is everywhere.
            box: instead of a mask.
            invert_mask: as for `inpaint`.
            num_images: pictures; number i has the seed `seed + i`.
            seed: of the first picture.
            guidance: weight of the decoding; the encoding is unguided, so that above 0 even strength 0 moves.
            feather: as for `inpaint`.
            cleaning: as for `__call__`.
            progress: called with (done, in all).

        Raises:
            UserError: a strength outside 0 .. 1, or a mask that repaints nothing.
        """
        image, (prompt, new_prompt) = read_picture(image), check_prompts([prompt, new_prompt])
        strength, guidance = check_number("strength", strength), check_number("guidance", guidance)
        hole, said = None, ""
        if mask is not None or box is not None:
            hole, said = hole_of(image, mask, box, invert=invert_mask)
        made = edit_picture(
            self, image, (prompt, new_prompt), strength, hole, num_images, seed, guidance, feather, cleaning, progress
        )
        return dataclasses.replace(made, notes=[*([said] if said else []), *made.notes])

    def variations(
        self: Editable,
        image: Image | str | Path,
        prompt: str = "",
        strength: float = 0.3,
        *,
        num_images: int = 4,
        seed: int = 0,
    ) -> Edited:
        """Pictures like one: `edit` with one prompt, of which `strength` says how much noise is new."""
        image, [prompt], strength = read_picture(image), check_prompts(prompt, 1), check_number("strength", strength)
        return edit_picture(self, image, (prompt, prompt), strength, None, num_images, seed, 0.0, 0, None, None)

    def interpolate(
        self: Editable,
        image_a: Image | str | Path,
        image_b: Image | str | Path,
        prompt: str = "",
        prompt_b: str | None = None,
        *,
        steps: int = 8,
        seed: int = 0,
        guidance: float = 0.0,
        cleaning: Cleaning | None = None,
    ) -> Edited:
        """Pictures on the way from one to another, on the sphere of their noise, and between their prompts.

        Args:
            image_a: where the way starts; the model sees it at its own size.
            image_b: where it ends.
            prompt: what the first shows.
            prompt_b: what the second shows; None is the same.
            steps: pictures, both ends among them.
            seed: of the noise that is added to both.
            guidance: weight of the decoding.
            cleaning: as for `__call__`.

        Raises:
            UserError: fewer than two steps.
        """
        first, second = check_prompts([prompt, prompt if prompt_b is None else prompt_b])
        images = read_picture(image_a), read_picture(image_b)
        steps, guidance = check_whole("steps", steps, 2), check_number("guidance", guidance)
        return interpolate_pictures(self, images, (first, second), steps, check_seed(seed), guidance, cleaning)
