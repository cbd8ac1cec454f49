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
    from starflow.latents import Autoencoder
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
    recipe may be given as an option: --train.lr 1e-4, --data.path FOLDER, --guidance 3. torchrun starts it on many
    GPUs: the processes share every batch, and train.parallel says how they share the weights.
    """

    EXAMPLES: ClassVar[str] = """
        starflow train recipes/tiny.yaml
        starflow train recipes/tiny.yaml --output runs/long --train.steps 2000 --train.lr 5e-4
        torchrun --nproc-per-node 8 -m starflow train recipes/glyphs-64.yaml --train.parallel.layout sharded
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
    """Encode a recipe's pictures and captions once, for the flow to train from; earlier stages run if missing.

    The mean and the spread of every latent are kept, so that training still draws from the posterior. Parts that are
    there are kept, so that the same command goes on after a stop; under torchrun the processes share the parts. At the
    end it reports sizes and pictures a second, and names what could not be read.
    """

    EXAMPLES: ClassVar[str] = """
        starflow cache-latents recipes/tiny.yaml
        torchrun --nproc-per-node 8 -m starflow cache-latents recipes/starflow-imagenet-256.yaml
    """


def train(options: TrainOptions) -> None:
    """Run the command."""
    with _started(options) as run:
        from starflow.train.stages import train_flow

        folder = train_flow(run)
        if run.world.main:
            print(f"done: starflow generate --model {folder}")


def train_autoencoder(options: TrainAutoencoderOptions) -> None:
    """Run the command."""
    with _started(options) as run:
        from starflow.train.prepare import prepare_autoencoder

        autoencoder = prepare_autoencoder(run)
        if run.world.main:
            print(f"done: {_name(autoencoder)}")


def cache_latents(options: CacheLatentsOptions) -> None:
    """Run the command."""
    with _started(options) as run:
        from starflow.train.prepare import prepare_latents

        prepare_latents(run)
        if run.world.main:
            print(f"done: {run.folder / 'latents'}")


def _name(autoencoder: Autoencoder) -> str:
    return autoencoder.spec.source or autoencoder.spec.kind


@contextlib.contextmanager
def _started(options: StageOptions) -> Iterator[Run]:
    """The run of a recipe in its folder; a stop by signal becomes the KeyboardInterrupt that `main` answers."""
    from starflow.allocator import keep_memory
    from starflow.train.distributed.world import join
    from starflow.train.loop import Interrupted
    from starflow.train.recipe import load_recipe
    from starflow.train.stages import start

    keep_memory()
    recipe = load_recipe(Path(options.recipe), dict(options.overrides))
    folder = Path(options.output).expanduser() if options.output else Path("runs") / recipe.name
    try:
        with join(pick_device(options.device), recipe.train.parallel.timeout) as world:
            yield start(recipe, folder, world.device, world=world)
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from None
