"""train/run."""

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
    """A recipe, its folder and where it computes."""

    recipe: Recipe
    folder: Path
    device: torch.device
    progress: bool = True
    world: World = field(default_factory=World)

    def say(self, text: str) -> None:
        """One line about what happens next."""
        if self.progress:
            tqdm.write(text)


def start_run(
    recipe: Recipe, folder: Path, device: torch.device, progress: bool = True, world: World | None = None
) -> Run:
    """Prepare the run's folder; `world` is the processes that train together, None this one alone.

    Raises:
        UserError: it cannot be written, or holds a run whose finished stages this recipe would have made otherwise.
    """
    files.check_output_folder(folder)
    path = folder / "recipe.json"
    if path.is_file():
        _check_same_stages(files.read_json(path), to_dict(recipe), folder)
    world = world or World(device=device)
    if world.main:
        files.write_json(path, to_dict(recipe))
    return Run(recipe, folder, world.device, progress and world.main, world)


_MAY_CHANGE = frozenset({"train", "workers", "window", "latents"})
"""Keys of those sections that change no stage's result."""


def _check_same_stages(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with results that the recipe no longer describes; how long to train may change."""
    for section in ("data", "autoencoder", "conditioning"):
        old, new = dict(before.get(section, {})), dict(now[section])
        changed = [key for key in new if key not in _MAY_CHANGE and key in old and old[key] != new[key]]
        if changed:
            raise UserError(
                f"{folder} was started with another {section}.{changed[0]}: choose another --output, or undo the change"
            )
