"""A run: a recipe with its folder and the processes that carry it out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from starflow.config import to_dict
from starflow.io import files
from starflow.train.distributed.world import World
from starflow.train.recipe import Recipe
from starflow.train.recipe_keys import check_changes, check_idle_keys, longest_warmup_text


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
        UserError: the folder cannot be written, another process trains in it, it holds a run whose finished stages
            this recipe would have made otherwise, or a key of the recipe has no effect.

    Example:
        >>> import tempfile
        >>> from starflow.train.settings import TrainSettings
        >>> folder = Path(tempfile.mkdtemp())
        >>> run = start_run(Recipe("mine", TrainSettings(steps=200)), folder, torch.device("cpu"))
        >>> [path.name for path in folder.iterdir() if path.suffix]
        ['recipe.json']
    """
    check_idle_keys(recipe)
    files.check_output_folder(folder)
    world = world or World(device=device)
    path = folder / "recipe.json"
    # A training in this folder holds the lock, and its recipe stays as it is.
    with files.folder_lock(folder) if world.is_main else contextlib.nullcontext():
        if path.is_file():
            check_changes(files.read_json(path), recipe, folder)
        if world.is_main:
            files.write_json(path, to_dict(recipe))
    run = Run(recipe, folder, world.device, progress and world.is_main, world)
    if text := longest_warmup_text(recipe):
        run.notify(f"warning: {text}")
    return run
