"""The commands that train: the stages of a recipe, a student or a denoiser beside a flow, and a decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from starflow.cli.options import Argument, Device, Flag, pick_device
from starflow.errors import UserError
from starflow.io.files import check_output_folder, folder_lock

if TYPE_CHECKING:
    from starflow.train.distributed import World
    from starflow.train.run import Run
    from starflow.train.tasks.decoder_run import DecoderReport, DecoderSettings
    from starflow.train.tasks.denoiser import DenoiserRecipe
    from starflow.train.tasks.density import DensityRecipe
    from starflow.train.tasks.student import StudentRecipe

R = TypeVar("R", "DensityRecipe", "StudentRecipe", "DenoiserRecipe")


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
    GPUs: the processes share every batch, and train.parallel says how they share the weights. A recipe whose
    data.source is "arrays" trains a density of vectors or sequences instead, for starflow.density.
    """

    EXAMPLES: ClassVar[str] = """
        starflow train recipes/tiny.yaml
        starflow train recipes/tiny.yaml --output runs/long --train.steps 2000 --train.lr 5e-4
        torchrun --nproc-per-node 8 -m starflow train recipes/glyphs-64.yaml --train.parallel.layout sharded
        starflow train recipes/density.yaml --data.path simulations.parquet
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


@dataclass(frozen=True)
class TrainStudentOptions(StageOptions):
    """Train a student of a flow: it draws in one parallel pass what the flow draws token by token (BiFlow).

    It is an approximation, without a density of its own. The recipe names the model (`teacher`) and its training
    pictures; the model's own parts encode them once. The same command again resumes, and torchrun shares it among
    processes. RUN/pipeline is the model with the student in it, for `starflow generate --sampler student`.
    """

    EXAMPLES: ClassVar[str] = """
        starflow train-student recipes/glyphs-64-student.yaml
        starflow train-student recipes/glyphs-64-student.yaml --teacher runs/mine/model --train.steps 2000
        starflow generate "a red apple" --model runs/glyphs-64-student/pipeline --sampler student
    """


@dataclass(frozen=True)
class TrainDenoiserOptions(StageOptions):
    """Train a denoiser beside a flow: one pass that takes the noise off its samples (flow-score matching).

    It approximates the Tweedie step, and spares the backward pass through the flow. The recipe names the model
    (`teacher`) and its training pictures; the model's own parts encode them once. The same command again resumes, and
    torchrun shares it among processes. RUN/pipeline is the model with the denoiser in it, which cleans its samples.
    """

    EXAMPLES: ClassVar[str] = """
        starflow train-denoiser recipes/glyphs-64-denoiser.yaml
        starflow train-denoiser recipes/glyphs-64-denoiser.yaml --teacher runs/mine/model
        starflow generate "a red apple" --model runs/glyphs-64-denoiser/pipeline --cleaning denoiser
    """


def train(options: TrainOptions) -> None:
    """Run `starflow train`."""
    from starflow.train.tasks.density import is_density_recipe

    if is_density_recipe(Path(options.recipe), dict(options.overrides)):
        _train_density(options)
        return
    with _started(options) as run:
        from starflow.train.stages import train_flow

        folder = train_flow(run)
        if run.world.is_main:
            print(f"done: starflow generate --model {folder}")


def _train_density(options: TrainOptions) -> None:
    from starflow.train.tasks.density import DensityRecipe, train_density

    with _opened(options, DensityRecipe) as (recipe, folder, world):
        model = train_density(recipe, folder, world)
        if world.is_main:
            print(f"done: starflow.density.SequenceFlow.from_pretrained('{model}')")


def train_autoencoder(options: TrainAutoencoderOptions) -> None:
    """Run `starflow train-autoencoder`."""
    with _started(options) as run:
        from starflow.train.stages import Stages

        spec = Stages(run).autoencoder.spec
        if run.world.is_main:
            print(f"done: {spec.source or spec.kind}")


def cache_latents(options: CacheLatentsOptions) -> None:
    """Run `starflow cache-latents`."""
    with _started(options) as run:
        from starflow.train.stages import Stages

        Stages(run).cache_latents()
        if run.world.is_main:
            print(f"done: {run.folder / 'latents'}")


def train_student(options: TrainStudentOptions) -> None:
    """Run `starflow train-student`."""
    from starflow.train.tasks.student import StudentRecipe, train_student

    with _opened(options, StudentRecipe) as (recipe, folder, world):
        pipeline = train_student(recipe, folder, world)
        if world.is_main:
            print(f"done: starflow generate --model {pipeline} --sampler student")


def train_denoiser(options: TrainDenoiserOptions) -> None:
    """Run `starflow train-denoiser`."""
    from starflow.train.tasks.denoiser import DenoiserRecipe, train_denoiser

    with _opened(options, DenoiserRecipe) as (recipe, folder, world):
        pipeline = train_denoiser(recipe, folder, world)
        if world.is_main:
            print(f"done: starflow generate --model {pipeline} --cleaning denoiser")


@contextlib.contextmanager
def _started(options: StageOptions) -> Iterator[Run]:
    """The run of a recipe in its folder."""
    from starflow.train.recipe import load_recipe
    from starflow.train.run import start_run

    recipe = load_recipe(Path(options.recipe), dict(options.overrides))
    with _folder_and_world(options, recipe.name, recipe.train.parallel.timeout) as (folder, world):
        yield start_run(recipe, folder, world.device, world=world)


@contextlib.contextmanager
def _opened(options: StageOptions, kind: type[R]) -> Iterator[tuple[R, Path, World]]:
    """A recipe of a kind, the folder of its run and the processes that carry it out."""
    from starflow.train.recipe import load_recipe_of

    recipe = load_recipe_of(kind, Path(options.recipe), dict(options.overrides))
    with _folder_and_world(options, recipe.name, recipe.train.parallel.timeout) as (folder, world):
        yield recipe, folder, world


@contextlib.contextmanager
def _folder_and_world(options: StageOptions, name: str, timeout: float) -> Iterator[tuple[Path, World]]:
    """The folder of a run, which no other command writes meanwhile, and the processes that carry it out."""
    from starflow.train.distributed import join_world

    folder = Path(options.output).expanduser() if options.output else Path("runs") / name
    with _training(), join_world(pick_device(options.device), timeout) as world:
        check_output_folder(folder)
        # The whole command holds it, the stages before the training too, before anything is written.
        with folder_lock(folder, ".run.lock") if world.is_main else contextlib.nullcontext():
            yield folder, world


@contextlib.contextmanager
def _training() -> Iterator[None]:
    """Prepare this process; a stop by signal becomes the KeyboardInterrupt that `main` answers."""
    from starflow.nn.cpu import keep_freed_memory
    from starflow.train.loop import Interrupted

    keep_freed_memory()
    try:
        yield
    except Interrupted as stop:
        raise KeyboardInterrupt(*stop.args) from None


@dataclass(frozen=True)
class TrainDecoderOptions:
    """Fine-tune a decoder on latents with noise, the encoder frozen, so that a flow's samples need no other cleaning.

    MODEL is an autoencoder (a diffusers AutoencoderKL or AutoencoderTiny, TAESD's two files, or ours: a folder or a hub
    id), or a pipeline, whose autoencoder is taken and which is written again with the new decoder as RUN/pipeline. The
    loss is L2, a perceptual term and an adversarial one, each with its weight; 0 leaves it out. The same command again
    resumes. RUN holds log.jsonl (held-out dB without and with the noise), samples/, model/ (what a recipe's
    autoencoder.source and load_autoencoder read) and report.json.
    """

    EXAMPLES: ClassVar[str] = """
        starflow train-decoder runs/mine/model data/glyphs --size 128
        starflow train-decoder stabilityai/sd-vae-ft-ema photos --size 256 --noise 0.3 --steps 20000
        starflow train-decoder taesd data/glyphs --size 128 --perceptual 0 --adversarial 0
    """

    model: Annotated[str, Argument("an autoencoder or a pipeline: folder or hub repository", "MODEL")]
    data: Annotated[str, Argument("a folder of pictures", "DATA")]
    output: Annotated[str, Flag("the run's folder", "RUN")] = "runs/decoder"
    noise: Annotated[
        float, Flag("standard deviation of the latent noise (default: the pipeline's, or 0.3)", "S")
    ] = -1.0
    size: Annotated[int, Flag("side that pictures are read at, pixels", "PX")] = 128
    crop: Annotated[int, Flag("side of a training crop, pixels; 0 is the whole picture", "PX")] = 64
    views: Annotated[int, Flag("augmented views of a training picture", "N")] = 1
    pictures: Annotated[int, Flag("pictures of the training, at most, spread over the set; 0 is all", "N")] = 0
    report: Annotated[int, Flag("held-out pictures of the report, at most; 0 is all", "N")] = 0
    steps: Annotated[int, Flag("updates in all", "N")] = 4000
    batch: Annotated[int, Flag("crops an update", "N")] = 16
    lr: Annotated[float, Flag("learning rate after warm-up; falls to zero by cosine", "LR")] = 5e-4
    squared: Annotated[float, Flag("weight of the mean squared error", "W")] = 1.0
    perceptual: Annotated[float, Flag("weight of the features' distance", "W")] = 0.1
    adversarial: Annotated[float, Flag("weight of the adversarial term", "W")] = 0.01
    features: Annotated[Literal["mobilenetv2", "lpips"], Flag("network of the perceptual term")] = "mobilenetv2"
    heldout: Annotated[int, Flag("held-out pictures of the evaluations on the way", "N")] = 64
    evaluate_every: Annotated[int, Flag("updates between evaluations", "N")] = 250
    checkpoint_every: Annotated[int, Flag("updates between checkpoints", "N")] = 100
    precision: Annotated[Literal["auto", "float32", "bfloat16"], Flag("of the network")] = "auto"
    seed: Annotated[int, Flag("of crops and noise", "S")] = 0
    device: Annotated[Device, Flag("where to compute")] = "auto"

    def __post_init__(self) -> None:
        if self.noise != -1 and not 0 <= self.noise < 10:
            raise UserError(f"--noise is {self.noise:g}, expected a standard deviation from 0 up")
        least = (("--size", self.size, 8), ("--crop", self.crop, 0), ("--views", self.views, 1))
        counts = (("--pictures", self.pictures, 0), ("--report", self.report, 0), ("--heldout", self.heldout, 1))
        for name, value, lowest in (*least, *counts):
            if value < lowest:
                raise UserError(f"{name} is {value}, expected at least {lowest}")


def train_decoder(options: TrainDecoderOptions) -> None:
    """Run `starflow train-decoder`."""
    from starflow.train.tasks.decoder_run import run_decoder

    folder = Path(options.output).expanduser()
    with _training():
        report = run_decoder(_settings(options), folder, pick_device(options.device))
    print(report_table(report))
    print(f"done: {folder / ('pipeline' if (folder / 'pipeline').is_dir() else 'model')}")


def report_table(report: DecoderReport) -> str:
    """The measures before and after the training, on the held-out images, as text."""
    lines = [f"{'':34}  {'before':>8}  {'after':>8}"]
    for name, (before, after) in report.measures.items():
        lines.append(f"{name:34}  {before:8.2f}  {after:8.2f}")
    return "\n".join(lines)


def _settings(options: TrainDecoderOptions) -> DecoderSettings:
    from starflow.train.settings import TrainSettings
    from starflow.train.tasks.decoder import DecoderLoss
    from starflow.train.tasks.decoder_run import DecoderSettings

    return DecoderSettings(
        model=options.model,
        data=options.data,
        noise_std=None if options.noise == -1 else options.noise,
        size=options.size,
        crop=options.crop,
        views=options.views,
        pictures=options.pictures,
        report=options.report,
        heldout=options.heldout,
        features=options.features,
        loss=DecoderLoss(options.squared, options.perceptual, options.adversarial),
        train=TrainSettings(
            steps=options.steps,
            batch=options.batch,
            lr=options.lr,
            warmup=min(100, options.steps // 10),
            evaluate_every=options.evaluate_every,
            sample_every=options.evaluate_every,
            checkpoint_every=options.checkpoint_every,
            average=max(0.0, min(0.995, 1 - 20 / options.steps)),  # over a twentieth of a short run
            precision=options.precision,
            seed=options.seed,
        ),
    )
