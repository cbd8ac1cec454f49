"""What callers hand to a pipeline, checked: one function for each kind of input, which every method goes through.

Whatever is not as it should be is a `UserError` of one sentence, before anything is computed.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from starflow.data.images import from_pil, on_background, open_image
from starflow.errors import UserError
from starflow.latents.tiled import MIN_TILE

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


def check_counts(num_images: int, batch_size: int, candidates: int | None, tile: int | None) -> None:
    """Raises UserError: a number of pictures, of candidates, at once, or of a tile's latent pixels that cannot be."""
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
        return [prompts] * (1 if count is None else count)
    if prompts is None or isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise UserError(f"the prompt is {prompts!r}, expected a text or a list of texts ('' is none)")
    found = list(prompts)
    for prompt in found:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is {prompt!r}, expected a text ('' is none)")
    if len(found) < least:
        raise UserError(f"there are {len(found)} prompts, expected at least {least} ('' is unconditional)")
    if count is not None and len(found) != count:
        raise UserError(f"{len(found)} prompts for {count} pictures: give one text for all, or one for each")
    return found


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


def check_seed(seed: Any) -> int:
    """Raises UserError: a seed that no generator takes."""
    number = check_whole("the seed", seed, -LARGEST_SEED)
    if not 0 <= number <= LARGEST_SEED:
        raise UserError(f"the seed is {seed}, expected 0 to {LARGEST_SEED}")
    return number


def check_pair(size: Any) -> tuple[int, int]:
    """(width, height) in pixels.

    Raises:
        UserError: no pair of whole numbers.
    """
    if isinstance(size, str | bytes) or not isinstance(size, Iterable) or len(pair := tuple(size)) != 2:
        raise UserError(f"the size is {size!r}, expected (width, height) in pixels, e.g. (256, 256)")
    return check_whole("the width", pair[0]), check_whole("the height", pair[1])


def read_image(image: Image | str | Path) -> Tensor:
    """One picture as (1, 3, H, W) in [-1, 1], upright, transparency on white; the same from a file and from Pillow.

    Raises:
        UserError: neither a picture of Pillow's nor a file that holds one.
    """
    from PIL import Image

    if isinstance(image, str | Path):
        return from_pil(on_background(open_image(Path(image).expanduser())))
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise UserError(f"the picture is a {kind}, expected a PIL image or a path: for arrays, PIL.Image.fromarray")
    try:
        return from_pil(image)
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the picture cannot be decoded ({reason}): replace it") from None


def check_range(images: Tensor) -> Tensor:
    """Warn of pictures (B, 3, H, W) that seem to lie in another range than [-1, 1]; returns them."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or not images.numel():
        return images  # an autoencoder says what is wrong with it
    low, high = (float(end) for end in images.detach().aminmax())
    if high > RANGE_SLACK:
        warnings.warn(f"pictures reach {high:g}, expected [-1, 1]: from 0..255, take x / 127.5 - 1", stacklevel=3)
    elif 0 <= low < high <= 1:
        warnings.warn(f"pictures lie in [{low:g}, {high:g}], expected [-1, 1]: from [0, 1], 2 x - 1", stacklevel=3)
    return images
