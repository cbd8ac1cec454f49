"""Training views: augmented copies of images, whose captions say what the augmentation did; drawn once a set.

Contract: view `i` of an image depends on (config.seed, record.name, i) alone, not on the records' order or the number
of worker processes. View 0 is plain: white background, no augmentation. A held-out image's plain view carries its
style in the caption, as that is what tells it from the same concept in training. The views of one image lie side by
side, in the records' order; a set of views is kept in memory or in a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from starflow.data.images import WHITE, ImageError, image_errors, on_background, open_image, resize_crop
from starflow.data.sets.glyphs import captions
from starflow.data.sets.glyphs.colours import BACKGROUNDS, HUES, colour_name, fitting_backgrounds, main_hue, turn_hue
from starflow.data.sets.glyphs2.icons import icon_colour, recoloured
from starflow.data.sources.base import ImageRecord, SkippedImage
from starflow.errors import UserError
from starflow.io.files import read_tensors, write_tensors, write_text

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["TrainingViews", "ViewConfig", "draw_views", "load_views", "make_views", "save_views", "view_count"]

Pixels = NDArray[np.uint8]

View = tuple[Pixels, str]
"""Pixels (size, size, 3) and their caption."""

STYLE_SHARE = 0.5
"""Share of a glyph's views whose captions name its style."""

TAGS_SHARE = 0.15
"""Share of a glyph's views whose captions end in tags, `MAX_TAGS` at the most."""

MAX_TAGS = 3
SILENT_SHARE = 0.5

TINT_TRIALS = 4
"""Colours that are tried before a view keeps the colour of its glyph."""

ANALYSIS_SIZE = 64
"""Side in pixels of the copy in which colours are looked for."""

_TINTED_GROUPS = frozenset({"animals-nature", "food-drink", "activities", "objects", "travel-places"})

_UNTINTED_SUBGROUPS = frozenset({"place-geographic", "place-other", "place-map", "flag", "game"})


@dataclass(frozen=True)
class ViewConfig:
    """How images become training views.

    Attributes:
        size: side of a view, pixels.
        views: views of a training image, the plain one included.
        group_views: views of a training image by its sampling group (`meta["sampling_group"]`), in place of `views`:
            a group's weight in training.
        heldout_views: views of a held-out image.
        colour_backgrounds: share of the views, where the image has an outline, on a flat named colour.
        hue: share of the views, where the image is of one hue, whose colour is turned and named.
        scale_min: smallest scale drawn; the largest is 1.
        shift: largest shift, as a share of the side; never so far that the thing leaves the frame.
        flip: mirror half of the views, except of what is text-like.
        seed: of all draws.

    Raises:
        UserError: a number is out of its range.
    """

    size: int = 64
    views: int = 8
    group_views: dict[str, int] = field(default_factory=dict)
    heldout_views: int = 1
    colour_backgrounds: float = 0.25
    hue: float = 0.3
    scale_min: float = 0.85
    shift: float = 0.06
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.views < 1 or self.heldout_views < 1:
            raise UserError(
                f"size {self.size}, views {self.views}, heldout_views {self.heldout_views}: each must be at least 1"
            )
        for group, count in self.group_views.items():
            if type(count) is not int or count < 1:
                raise UserError(f"group_views.{group} is {count!r}, expected a whole number of views, at least 1")
        if not 0.5 <= self.scale_min <= 1:
            raise UserError(f"scale_min is {self.scale_min}, expected 0.5 to 1")
        if not 0 <= self.shift <= 0.25:
            raise UserError(f"shift is {self.shift}, expected 0 to 0.25 of the side")
        if not (0 <= self.colour_backgrounds <= 1 and 0 <= self.hue <= 1):
            raise UserError(f"colour_backgrounds {self.colour_backgrounds} and hue {self.hue} must be shares, 0 to 1")


@dataclass(frozen=True)
class TrainingViews:
    """N views in memory: images (N, 3, H, W) uint8 in 0..255, and one item a view in each list.

    >>> import torch
    >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    >>> views = TrainingViews(images, ["a cat", "a dog"], [None, None], ["a", "b"], ["train", "heldout"])
    >>> len(views)
    2
    """

    images: torch.Tensor
    captions: list[str]
    labels: list[str | None]
    names: list[str]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def make_views(
    records: Sequence[ImageRecord], config: ViewConfig, *, progress: bool = True, workers: int = 1
) -> tuple[TrainingViews, list[SkippedImage]]:
    """Draw the views of all images, in the records' order.

    Args:
        records: of the images.
        config: see `ViewConfig`.
        progress: show a progress bar.
        workers: processes that draw; 1 is this one.

    Returns:
        The views, and by name the images that could not be read.

    Raises:
        UserError: not one image could be read, or no image is of a group that `config.group_views` names.
    """
    import torch
    from tqdm import tqdm

    _check_groups(records, config)
    total = sum(view_count(record, config) for record in records)
    images = np.empty((total, 3, config.size, config.size), dtype=np.uint8)
    kept: list[tuple[ImageRecord, str]] = []
    skipped = []
    drawn = _draw(records, config, workers)
    for record, views in zip(tqdm(records, desc="views", unit="picture", disable=not progress), drawn, strict=True):
        if isinstance(views, SkippedImage):
            skipped.append(views)
            continue
        for pixels, caption in views:
            images[len(kept)] = pixels.transpose(2, 0, 1)
            kept.append((record, caption))
    if not kept:
        reason = f"{skipped[0].name}: {skipped[0].reason}" if skipped else "the list of records is empty"
        raise UserError(f"none of {len(records)} pictures could be read, first reason: {reason}")
    views_made = TrainingViews(
        images=torch.from_numpy(images[: len(kept)]),
        captions=[caption for _, caption in kept],
        labels=[record.label for record, _ in kept],
        names=[record.name for record, _ in kept],
        splits=[record.split for record, _ in kept],
    )
    return views_made, skipped


def save_views(path: Path, views: TrainingViews) -> None:
    """Write views to `path` (safetensors) and, beside it, to the same name with .jsonl: one line a view."""
    rows = zip(views.captions, views.labels, views.names, views.splits, strict=True)
    lines = (
        json.dumps({"caption": caption, "label": label, "name": name, "split": split}, ensure_ascii=False)
        for caption, label, name, split in rows
    )
    write_tensors(path, {"images": views.images})
    write_text(path.with_suffix(".jsonl"), "".join(line + "\n" for line in lines))


def load_views(path: Path) -> TrainingViews:
    """Read what `save_views` wrote.

    Raises:
        UserError: a file is missing, truncated, or the two do not belong together.
    """
    tensors = read_tensors(path)
    beside = path.with_suffix(".jsonl")
    try:
        rows = [json.loads(line) for line in beside.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {beside} ({error}): make the views again") from None
    images = tensors.get("images")
    if images is None or images.ndim != 4 or len(images) != len(rows):
        found = "no tensor 'images'" if images is None else f"images of shape {tuple(images.shape)}"
        raise UserError(f"{path} holds {found}, {beside} {len(rows)} lines: expected one a view; make the views again")
    return TrainingViews(
        images=images,
        captions=[row["caption"] for row in rows],
        labels=[row["label"] for row in rows],
        names=[row["name"] for row in rows],
        splits=[row["split"] for row in rows],
    )


def draw_views(image: Image.Image, record: ImageRecord, config: ViewConfig) -> list[View]:
    """Draw all views of one image, each (size, size, 3) uint8 with its caption.

    Glyphs (records with a style) get every augmentation; other images are cropped to their central square
    and mirrored at most, and keep their caption.

    >>> from PIL import Image
    >>> record = ImageRecord(Path("a.png"), "a cat", None, "train", "a.png")
    >>> views = draw_views(Image.new("RGB", (90, 60)), record, ViewConfig(size=32, views=2))
    >>> [(pixels.shape, caption) for pixels, caption in views]
    [((32, 32, 3), 'a cat'), ((32, 32, 3), 'a cat')]
    """
    indices = range(view_count(record, config))
    if "style" in record.meta:
        glyph = _GlyphViews(image.convert("RGBA"), record, config)
        return [glyph.view(i) for i in indices]
    square = resize_crop(on_background(image), config.size)
    return [(_photo_view(square, record, config, i), record.caption) for i in indices]


def view_count(record: ImageRecord, config: ViewConfig) -> int:
    """How many views an image gets."""
    if record.split != "train":
        return config.heldout_views
    return config.group_views.get(record.meta.get("sampling_group", ""), config.views)


def _check_groups(records: Sequence[ImageRecord], config: ViewConfig) -> None:
    known = {record.meta["sampling_group"] for record in records if "sampling_group" in record.meta}
    for group in config.group_views:
        if group not in known:
            found = f"of {', '.join(sorted(known))}" if known else "without groups (prepare-data glyphs2 writes them)"
            raise UserError(f"group_views names '{group}', but the images are {found}")


class _GlyphViews:
    """The views of one glyph; holds what they share: its colours and its extent."""

    def __init__(self, image: Image.Image, record: ImageRecord, config: ViewConfig) -> None:
        self.image, self.record, self.config = image, record, config
        self.small = image.resize((ANALYSIS_SIZE, ANALYSIS_SIZE))
        pixels = np.asarray(self.small)
        self.backgrounds = fitting_backgrounds(pixels)
        self.hue = main_hue(pixels) if self._may_be_tinted() else None
        self.extent = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox() or (0, 0, *image.size)

    def _may_be_tinted(self) -> bool:
        meta = self.record.meta
        return meta["group"] in _TINTED_GROUPS and meta["subgroup"] not in _UNTINTED_SUBGROUPS

    def view(self, index: int) -> View:
        """Pixels (size, size, 3) and the caption of one view."""
        meta = self.record.meta
        always = meta.get("say_style") == "always"
        if index == 0:
            style = self._style(meta.get("colour", "")) if always or self.record.split == "heldout" else None
            pixels = self._lay_out(self.image, WHITE, scale=1.0, shift=(0.0, 0.0), mirrored=False)
            return pixels, captions.compose(self.record.caption, style=style, tags=self._side())
        rng = _rng(self.config, self.record.name, index)
        styled, tagged, ground, tint, mirror, scale = rng.random(6)
        shift = rng.uniform(-1, 1, size=2) * self.config.shift
        on_colour = ground < self.config.colour_backgrounds
        image, colour, paint = self.image, None, ""
        if "palette" in meta:
            paint, grounds = icon_colour(rng, meta["palette"], on_colour)
            image = recoloured(self.image, meta["palette"], paint)
            background = str(rng.choice(grounds)) if grounds else None
        else:
            if tint < self.config.hue:
                image, colour = self._tint(rng)
            background = self._background(rng, colour) if on_colour else None
        pixels = self._lay_out(
            image,
            BACKGROUNDS[background] if background else WHITE,
            scale=1 - (1 - self.config.scale_min) * scale,
            shift=(shift[0], shift[1]),
            mirrored=self.config.flip and mirror < 0.5 and self.record.meta["flip"] == "yes",
        )
        caption = captions.compose(
            self.record.caption,
            style=self._style(paint) if always or styled < STYLE_SHARE else None,
            colour=colour,
            background=background,
            tags=(*self._side(rng), *(self._tags(rng, colour) if tagged < TAGS_SHARE else ())),
        )
        return pixels, caption

    def _style(self, paint: str) -> str:
        """What says the style: the record's own phrase, its colour before it, or a key of `STYLE_PREFIXES`."""
        phrase = self.record.meta.get("phrase", self.record.meta["style"])
        return f"{paint} {phrase}" if paint else phrase

    def _side(self, rng: np.random.Generator | None = None) -> tuple[str, ...]:
        """The side that a model is seen from; of the usual sides half of the captions say nothing."""
        view = self.record.meta.get("view")
        usual = self.record.meta.get("say_view") == "sometimes"
        return () if view is None or (usual and rng is not None and rng.random() < SILENT_SHARE) else (view,)

    def _tint(self, rng: np.random.Generator) -> tuple[Image.Image, str | None]:
        """Turn the glyph to a colour drawn at random, its own included; unchanged if none would show."""
        if self.hue is None:
            return self.image, None
        for name in rng.permutation(list(HUES))[:TINT_TRIALS]:
            shown = colour_name(np.asarray(turn_hue(self.small, self.hue, HUES[name])), HUES[name])
            if shown is not None:
                return turn_hue(self.image, self.hue, HUES[name]), shown
        return self.image, None

    def _background(self, rng: np.random.Generator, colour: str | None) -> str | None:
        fitting = [name for name in self.backgrounds if colour is None or colour not in name]
        return str(rng.choice(fitting)) if fitting else None

    def _tags(self, rng: np.random.Generator, colour: str | None) -> tuple[str, ...]:
        tags = [tag for tag in self.record.meta["tags"].split(",") if tag]
        if colour is not None:
            tags = [tag for tag in tags if captions.COLOUR_WORDS.isdisjoint(tag.split())]
        chosen = sorted(rng.permutation(len(tags))[:MAX_TAGS])
        return tuple(tags[i] for i in chosen)

    def _lay_out(
        self,
        image: Image.Image,
        colour: tuple[int, int, int],
        *,
        scale: float,
        shift: tuple[float, float],
        mirrored: bool,
    ) -> Pixels:
        """Scale about the centre, shift (shares of the side, clamped to keep the thing inside), lay on `colour`."""
        from PIL import Image, ImageOps

        side = image.width
        window = side / scale
        left = _window_start(side, window, shift[0] * window, self.extent[0], self.extent[2])
        top = _window_start(side, window, shift[1] * window, self.extent[1], self.extent[3])
        pad = int(np.ceil(max(0.0, -left, -top, left + window - side, top + window - side))) + 1
        canvas = Image.new("RGBA", (side + 2 * pad, side + 2 * pad))
        canvas.paste(image, (pad, pad))
        box = (left + pad, top + pad, left + pad + window, top + pad + window)
        size = self.config.size
        small = on_background(canvas.resize((size, size), Image.Resampling.LANCZOS, box=box), colour)
        return np.asarray(ImageOps.mirror(small) if mirrored else small)


def _window_start(side: float, window: float, shift: float, low: float, high: float) -> float:
    """Start of a window of that width that is shifted as asked and still covers low..high, if it can."""
    centred = (side - window) / 2
    first, last = high - window, low
    if first > last:
        return centred
    return min(max(centred - shift, first), last)


def _photo_view(square: Image.Image, record: ImageRecord, config: ViewConfig, index: int) -> Pixels:
    from PIL import ImageOps

    flips = config.flip and index > 0 and _rng(config, record.name, index).random() < 0.5
    return np.asarray(ImageOps.mirror(square) if flips else square)


def _rng(config: ViewConfig, name: str, index: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{config.seed}:{name}:{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _draw(records: Sequence[ImageRecord], config: ViewConfig, workers: int) -> Iterator[list[View] | SkippedImage]:
    views_of = partial(_views_or_reason, config=config)
    if workers <= 1:
        yield from map(views_of, records)
        return
    import multiprocessing

    # Not fork: the parent may hold threads (torch's), and a forked copy of their locks hangs.
    with multiprocessing.get_context("spawn").Pool(workers, _leave_interrupts_to_the_parent) as pool:
        yield from pool.imap(views_of, records, chunksize=16)


def _views_or_reason(record: ImageRecord, config: ViewConfig) -> list[View] | SkippedImage:
    """Draw all views of one image, or say why there are none; runs in a worker."""
    try:
        with image_errors(record.file):
            return draw_views(open_image(record.file), record, config)
    except ImageError as error:
        return SkippedImage(record.name, error.reason)


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of a terminal; one answer to it is enough."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
