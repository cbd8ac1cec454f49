"""A run: a recipe with its folder and the processes that carry it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from starflow.config import to_dict
from starflow.errors import UserError
from starflow.io import files
from starflow.train.distributed.world import World
from starflow.train.recipe import Recipe


@dataclass(frozen=True)
class Run:
    """A recipe, its folder and where it computes. Make one with `start_run`."""

    recipe: Recipe
    folder: Path
    device: torch.device
    progress: bool = True
    """Whether this process shows bars and messages."""
    world: World = field(default_factory=World)
    """The processes that train together."""

    def notify(self, text: str) -> None:
        """Show one line of text about what happens next, above any progress bar."""
        if self.progress:
            tqdm.write(text)


def start_run(
    recipe: Recipe, folder: Path, device: torch.device, progress: bool = True, world: World | None = None
) -> Run:
    """Prepare the folder of a run: RUN/recipe.json is written, or compared with what is there.

    Args:
        recipe: what is trained.
        folder: of the run; the same one again goes on with it.
        device: of the computation, where `world` is None.
        progress: whether to show bars and messages.
        world: the processes that train together; None is this one alone.

    Raises:
        UserError: the folder cannot be written, or holds a run whose finished stages this recipe would have made
            otherwise.

    Example:
        >>> import tempfile
        >>> from starflow.train.settings import TrainSettings
        >>> folder = Path(tempfile.mkdtemp())
        >>> run = start_run(Recipe("mine", TrainSettings(steps=10)), folder, torch.device("cpu"))
        >>> [path.name for path in folder.iterdir()]
        ['recipe.json']
    """
    files.check_output_folder(folder)
    path = folder / "recipe.json"
    if path.is_file():
        _check_same_stages(files.read_json(path), to_dict(recipe), folder)
    world = world or World(device=device)
    if world.is_main:
        files.write_json(path, to_dict(recipe))
    return Run(recipe, folder, world.device, progress and world.is_main, world)


_MAY_CHANGE = frozenset({"train", "workers", "window", "latents"})
"""Keys of the compared sections that change no stage's result."""


def _check_same_stages(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with results that the recipe no longer describes; how long to train may change."""
    for section in ("data", "autoencoder", "conditioning"):
        old, new = dict(before.get(section, {})), dict(now[section])
        changed = [key for key in new if key not in _MAY_CHANGE and key in old and old[key] != new[key]]
        if changed:
            raise UserError(
                f"{folder} was started with another {section}.{changed[0]}: choose another --output, or undo the change"
            )
