"""`starflow train`, `train-autoencoder`, `cache-latents`: the stages of a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow.cli.options import Argument, Flag
from starflow.cli.values import Device, pick_device

if TYPE_CHECKING:
    from starflow.train.stages import Run


@dataclass(frozen=True)
class StageOptions:
    """The options that every stage of a recipe has."""

    recipe: Annotated[str, Argument("a YAML file, such as those in recipes/", "RECIPE")]
    output: Annotated[str, Flag("the run's folder (default: runs/ and the recipe's name)", "RUN")] = ""
    device: Annotated[Device, Flag("where to compute")] = "auto"
    overrides: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TrainOptions(StageOptions):
    """Run a recipe: every stage that is missing, then the flow. The same command again resumes.

    Ctrl-C writes a checkpoint and stops. The run's folder holds log.jsonl (a line a step), samples/, tensorboard/,
    checkpoints/, best/ (the best held-out average) and model/, which generate and likelihood read. Any key of the
    recipe may be given as an option: --train.lr 1e-4, --data.path FOLDER, --guidance 3.
    """

    EXAMPLES: ClassVar[str] = """
        starflow train recipes/tiny.yaml
        starflow train recipes/tiny.yaml --output runs/long --train.steps 2000 --train.lr 5e-4
    """


@dataclass(frozen=True)
class TrainAutoencoderOptions(StageOptions):
    """Run a recipe's autoencoder stage alone, with the data stage before it. The same command again resumes."""

    EXAMPLES: ClassVar[str] = """
        starflow train-autoencoder recipes/tiny.yaml
        starflow train-autoencoder recipes/tiny.yaml --autoencoder.train.steps 2000
    """


@dataclass(frozen=True)
class CacheLatentsOptions(StageOptions):
    """Encode a recipe's pictures and captions once, for the flow to train from; earlier stages run if missing."""

    EXAMPLES: ClassVar[str] = """
        starflow cache-latents recipes/tiny.yaml
    """


def train(options: TrainOptions) -> None:
    """Run the command."""
    with _started(options) as run:
        from starflow.train.stages import train_flow

        folder = train_flow(run)
        print(f"done: starflow generate --model {folder}")


def train_autoencoder(options: TrainAutoencoderOptions) -> None:
    """Run the command."""
    with _started(options) as run:
        from starflow.train.stages import prepare_autoencoder

        autoencoder = prepare_autoencoder(run)
        print(f"done: {autoencoder.spec.source or autoencoder.spec.kind}")


def cache_latents(options: CacheLatentsOptions) -> None:
    """Run the command."""
    with _started(options) as run:
        from starflow.train.stages import prepare_latents

        prepare_latents(run)
        print(f"done: {run.folder / 'latents'}")


@contextlib.contextmanager
def _started(options: StageOptions) -> Iterator[Run]:
    """The run of a recipe in its folder; a stop by signal becomes the KeyboardInterrupt that `main` answers."""
    from starflow.train.loop import Interrupted
    from starflow.train.recipe import load_recipe
    from starflow.train.stages import start

    recipe = load_recipe(Path(options.recipe), dict(options.overrides))
    folder = Path(options.output).expanduser() if options.output else Path("runs") / recipe.name
    try:
        yield start(recipe, folder, pick_device(options.device))
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from None
