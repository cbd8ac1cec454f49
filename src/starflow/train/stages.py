"""The stages of a recipe, from images to a pipeline; a stage whose result is in the run's folder is not run again.

RUN/recipe.json     the recipe as it was run       RUN/index/ or views.safetensors   the images
RUN/autoencoder/    log, samples, model            RUN/latents/            the latent cache
RUN/log.jsonl, samples/, checkpoints/, best/, model/   the flow; model/ is what from_pretrained reads

Contract: every stage is collective. All processes of a run ask for the same stages in the same order, and what one of
them does alone the others wait for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from starflow.conditioning import ClassLabels, Conditioner, TextEncoder, TokenEmbeddings
from starflow.config import to_dict
from starflow.data import index, latent_cache
from starflow.data.buckets import Buckets
from starflow.data.images import from_pil, save_grid
from starflow.data.index import ImageDataset, ViewDataset, open_source
from starflow.data.latent_cache import CachedLatents
from starflow.data.sets.small import draw_shapes, read_fashion_mnist
from starflow.data.sources.base import Source, SourceKind
from starflow.data.sources.captions import describe_set
from starflow.data.sources.folder import read_folder
from starflow.data.views import TrainingViews, load_views, make_views, save_views
from starflow.errors import UserError
from starflow.flow.model import Flow, STARFlow, TarFlow, build
from starflow.io import files
from starflow.latents import Autoencoder, AutoencoderSpec, KLLatents, TinyLatents, decoder_noise, load_autoencoder
from starflow.latents.small import SmallAutoencoder, load_small
from starflow.pipeline.config import Cleaning, PipelineConfig
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.distributed import World, initialise
from starflow.train.init_from import (
    autoencoder_folder,
    complete_flow,
    initial_options,
    load_initial,
    patch_size_of,
    read_initial,
)
from starflow.train.loader import LoaderSettings, batch_order, make_loader
from starflow.train.loop import Task, fit
from starflow.train.recipe import AutoencoderRecipe, DataRecipe, Objective, Recipe
from starflow.train.recipe_keys import read_classes, results_of
from starflow.train.run import Run, expected_time, measured_peak
from starflow.train.settings import network_dtype
from starflow.train.tasks.autoencoder import AutoencoderTask, JointTask, joint_latents
from starflow.train.tasks.cache_latents import CacheJob, cache_latents
from starflow.train.tasks.flow import FlowTask, LiveFlowTask, LiveLatents

DEFAULT_PROMPTS = ("a red apple", "a blue car", "a green tree", "a dog")
"""Prompts of the sample grids of a text-conditional flow whose recipe names none."""


def train_flow(run: Run) -> Path:
    """Run every stage that is missing, then train the flow; returns the folder of the finished pipeline. Collective.

    Raises:
        UserError: the recipe cannot be carried out; the message says what is wrong.
        Interrupted: after a signal, once a checkpoint has been written.
    """
    return Stages(run).train_flow()


class Stages:
    """The stages of one run. What a stage gives is made or loaded once, when it is first asked for.

    Example:
        >>> import tempfile
        >>> from starflow.train.run import start_run
        >>> from starflow.train.settings import TrainSettings
        >>> recipe = Recipe("mine", TrainSettings(steps=1), DataRecipe(source="shapes", shapes=40))
        >>> run = start_run(recipe, Path(tempfile.mkdtemp()), torch.device("cpu"), progress=False)
        >>> stages = Stages(run)
        >>> len(stages.dataset.classes()), stages.dataset is stages.dataset
        (6, True)
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def dataset(self) -> ImageDataset:
        """The run's images by index: views in memory, or an index of what stays where it is.

        Raises:
            UserError: there are no images, or sizes that autoencoder and patches cannot take.
        """
        run, data = self.run, self.run.recipe.data
        if not data.indexed:
            return ViewDataset(_views(run))
        buckets = Buckets(data.views.size, self._size_multiple(), data.aspects)
        source, folder = open_source(_source_kind(data), data.path), run.folder / "index"
        if not index.is_complete(folder):
            settings = index.IndexSettings(data.aspects, data.heldout)
            missing = index.missing_parts(source, folder)
            run.world.barrier()  # until all have seen the same
            for shard in missing[run.world.rank :: run.world.size]:
                index.scan_shard(source, shard, folder, settings)
            run.world.barrier()
            run.world.run_on_main(lambda: self._join_index(source))
        else:
            self._offer_changes(source)
        return index.IndexedDataset(source, folder, buckets)

    def _join_index(self, source: Source) -> None:
        """Finish the index of a source and sum it up."""
        run, folder = self.run, self.run.folder / "index"
        for line in describe_set(
            index.join_parts(source, folder, run.recipe.conditioning.kind), folder / "skipped.jsonl"
        ):
            run.notify(line)

    def _offer_changes(self, source: Source | None = None) -> None:
        """Say that images or captions have changed since the run has read them, and how they are read again."""
        run, data = self.run, self.run.recipe.data
        if not run.world.is_main or not data.indexed or not index.is_complete(run.folder / "index"):
            return
        try:
            changes = index.changes_since(source or open_source(_source_kind(data), data.path), run.folder / "index")
        except UserError as error:  # what is encoded already is enough to go on
            changes = str(error)
        if changes:
            read = " and ".join(map(str, results_of(("data", "latents"), run.folder)))
            run.notify(
                f"warning: {changes}: this run goes on with what it has read; to read them again, delete {read}, or "
                "choose another --output"
            )

    def _size_multiple(self) -> int:
        """What sides of images must be multiples of: the autoencoder's factor times the flow's patch."""
        recipe = self.run.recipe.autoencoder
        trained_here = recipe.kind == "small" and (recipe.joint or not recipe.source)
        factor = recipe.model.factor if trained_here else self.autoencoder.spec.factor
        return factor * patch_size_of(self.run.recipe)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The recipe's autoencoder: pretrained, the identity, or trained by the main process.

        Raises:
            UserError: it cannot be loaded, or it is trained together with the flow.
        """
        run, recipe = self.run, self.run.recipe.autoencoder
        if recipe.kind != "small":
            return _on_device(_load_autoencoder(recipe), run.device)
        if recipe.joint:
            raise UserError("autoencoder.joint is on: the autoencoder is trained with the flow, by `starflow train`")
        if recipe.source:
            run.world.run_on_hosts(lambda: autoencoder_folder(recipe.source))
            return _on_device(load_small(autoencoder_folder(recipe.source)), run.device)
        folder = run.folder / "autoencoder"
        if run.world.any_missing(folder / "model" / "config.json"):
            dataset = self.dataset
            run.world.run_on_main(lambda: _train_autoencoder(run, dataset, folder))
        return _on_device(load_small(folder / "model"), run.device)

    @cached_property
    def conditioner(self) -> Conditioner | None:
        """The text encoder, or the class labels, which are the images' class names in their order.

        Raises:
            UserError: the encoder is missing, or one of the recipe's prompts is no class.
        """
        run, recipe = self.run, self.run.recipe.conditioning
        if recipe.kind == "none":
            return None
        if recipe.kind == "class":
            path = run.folder / "classes.json"
            if run.world.any_missing(path):
                dataset = self.dataset
                run.world.run_on_main(lambda: files.write_json(path, dataset.classes()))
            classes = ClassLabels(read_classes(run.folder))
            if run.recipe.prompts:
                classes.encode(run.recipe.prompts)  # a wrong name shows now, not with the first samples
            return classes
        adapter = TokenEmbeddings if recipe.kind == "embeddings" else TextEncoder
        conditioner = adapter.from_pretrained(recipe.encoder, recipe.tokens)
        conditioner.network.to(run.device)
        return conditioner

    def cache_latents(self) -> None:
        """Fill the latent cache unless it is whole; the processes share the work."""
        run, folder = self.run, self.run.folder / "latents"
        if latent_cache.is_complete(folder):
            self._offer_changes()
            return
        # The conditioner comes before the autoencoder, which may be trained for hours: what is missing shows at once.
        dataset, conditioner, autoencoder = self.dataset, self.conditioner, self.autoencoder
        data = run.recipe.data
        info = {
            "autoencoder": to_dict(autoencoder.spec),
            "conditioner": to_dict(conditioner.spec) if conditioner else None,
        }
        flipped = data.indexed and data.views.flip and data.views.views > 1
        job = CacheJob(dataset, autoencoder, conditioner, folder, flipped, data.workers)
        cache_latents(job, info, run.world, show_progress=run.progress, notify=run.notify)
        del self.dataset  # the flow reads the cache alone, and images in memory are many

    def train_flow(self) -> Path:
        """See the function of that name."""
        run, settings = self.run, self.run.recipe.train
        self._say_expected_time()
        if run.recipe.autoencoder.joint:
            task: Task = self._joint_task()
        elif run.recipe.data.latents == "live":
            task = self._live_task()
        else:
            task = self._cached_task()
        count = sum(parameter.numel() for parameter in task.model.parameters())
        run.notify(f"flow: {count / 1e6:.1f} M parameters, {settings.steps} steps of {settings.batch} pictures")
        try:
            fit(task, settings, run.folder, run.progress, run.world)
        finally:
            if isinstance(task, LiveFlowTask):
                task.loader.close()
        return run.folder / "model"

    def _cached_task(self) -> FlowTask:
        run = self.run
        self.cache_latents()
        cache = CachedLatents(run.folder / "latents")
        draw, save = self._outputs(int(cache.info["image_size"]))
        flow = self._first_flow(self.autoencoder.spec, cache.side)
        recipe = run.recipe
        return FlowTask(flow, cache, recipe.objective, recipe.train, draw, save, run.world, recipe.data.window)

    def _live_task(self) -> LiveFlowTask:
        run, recipe = self.run, self.run.recipe
        latents = LiveLatents(self.dataset, autoencoder=self.autoencoder, conditioner=self.conditioner)
        draw, save = self._outputs(self.dataset.buckets.side)
        flow = self._first_flow(self.autoencoder.spec, latents.side)
        loading = loader_settings(run)
        return LiveFlowTask(flow, latents, recipe.objective, recipe.train, draw, save, run.world, loading)

    def _joint_task(self) -> JointTask:
        """Both networks are real and equal in every process: they are drawn from the recipe's seeds."""
        run, recipe = self.run, self.run.recipe
        dataset, conditioner = self.dataset, self.conditioner
        autoencoder = first_autoencoder(recipe.autoencoder).to(run.device)
        if run.world.size > 1:  # FSDP2 takes no other
            autoencoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        spec = joint_latents(copy.deepcopy(autoencoder), recipe.objective).spec
        flow = self._first_flow(spec, dataset.buckets.side // spec.factor)
        if next(flow.parameters()).is_meta:
            flow.to_empty(device=run.device)
            initialise(flow, recipe.train.seed)
        config = _pipeline_config(recipe, spec, conditioner, dataset.buckets.side)
        return JointTask(
            autoencoder,
            flow,
            dataset,
            conditioner,
            recipe.objective,
            recipe.autoencoder,
            recipe.train,
            draw=lambda latents, trained, path: _draw_samples(
                recipe, _pipeline(trained, latents, conditioner, config), path
            ),
            save=lambda latents, trained, folder: _pipeline(trained, latents, conditioner, config).save_pretrained(
                folder
            ),
            world=run.world,
            loading=loader_settings(run),
        )

    def _outputs(self, image_size: int) -> tuple[Callable[[Flow, Path], None], Callable[[Flow, Path], None]]:
        """What draws a sample grid of a trained flow, and what saves it as a pipeline."""
        recipe, autoencoder, conditioner = self.run.recipe, self.autoencoder, self.conditioner
        config = _pipeline_config(recipe, autoencoder.spec, conditioner, image_size)
        return (
            lambda trained, path: _draw_samples(recipe, _pipeline(trained, autoencoder, conditioner, config), path),
            lambda trained, folder: _pipeline(trained, autoencoder, conditioner, config).save_pretrained(folder),
        )

    def _say_expected_time(self) -> None:
        """Before the first stage, as an autoencoder's hours are the fewer."""
        run, coder = self.run, self.run.recipe.autoencoder
        trained = coder.kind == "small" and not coder.source
        spec = AutoencoderSpec("small", coder.model.channels, coder.model.factor) if trained else self.autoencoder.spec
        condition, source = self.conditioner.spec if self.conditioner else None, run.recipe.train.init_from
        if source:
            run.world.run_on_hosts(lambda: initial_options(source, run.recipe.flow))
        initial = initial_options(source, run.recipe.flow) if source else None
        side = run.recipe.data.side // spec.factor
        config = complete_flow(run.recipe.flow, spec, side, condition, initial)
        if text := expected_time(run, config, measured_peak(run.device, network_dtype(run.recipe.train, run.device))):
            run.notify(text)

    def _first_flow(self, latents: AutoencoderSpec, side: int) -> STARFlow | TarFlow:
        """The recipe's flow: on the meta device, or with the weights that `train.init_from` names."""
        run, recipe, source = self.run, self.run.recipe, self.run.recipe.train.init_from
        condition = self.conditioner.spec if self.conditioner else None
        if source:
            run.world.run_on_hosts(lambda: initial_options(source, recipe.flow))
        initial = read_initial(source, recipe.flow) if source else None
        config = complete_flow(recipe.flow, latents, side, condition, initial.options if initial else None)
        with torch.device("meta"):  # the loop gives every process its part of the first weights
            flow = build(config)
        if initial is not None:
            # Several processes may share the weights of a model that one of them cannot hold.
            device = run.device if run.world.size == 1 else torch.device("cpu")
            fresh = load_initial(flow, initial, recipe.train.seed, device)
            run.notify(
                f"first weights from {source}" + (f"; {len(fresh)} start anew, {fresh[0]} first" if fresh else "")
            )
        return flow


def _source_kind(data: DataRecipe) -> SourceKind:
    assert data.source in ("folder", "tar", "parquet")
    return data.source


def _views(run: Run) -> TrainingViews:
    """Training and held-out views of a set that is kept in memory, drawn once a run."""
    path = run.folder / "views.safetensors"
    run.world.run_on_main(lambda: None if path.is_file() else save_views(path, _draw_views(run)))
    return load_views(path)


def _draw_views(run: Run) -> TrainingViews:
    data = run.recipe.data
    if data.source == "shapes":
        return draw_shapes(data.shapes, data.views.size, data.views.seed)
    if data.source == "fashion-mnist":
        return read_fashion_mnist(Path(data.path) if data.path else None)
    if not Path(data.path).is_dir():
        raise UserError(f"no folder of pictures at '{data.path}': run `starflow prepare-data glyphs`")
    views, skipped = make_views(read_folder(Path(data.path), run.notify), data.views, progress=run.progress, workers=2)
    for one in skipped:
        run.notify(f"skipped {one.name}: {one.reason}")
    if skipped:
        run.notify(f"skipped {len(skipped)} of {len(skipped) + len(set(views.names))} pictures")
    return views


def loader_settings(run: Run) -> LoaderSettings:
    """How the run's images reach a task; views in memory have been flipped already."""
    data = run.recipe.data
    return LoaderSettings(data.workers, data.window, data.indexed and data.views.flip, run.notify)


def _load_autoencoder(recipe: AutoencoderRecipe) -> Autoencoder:
    if recipe.kind == "pixels":
        return load_autoencoder(AutoencoderSpec("pixels", channels=recipe.channels, factor=1, source=recipe.source))
    adapter = KLLatents if recipe.kind == "diffusers_kl" else TinyLatents
    return adapter.from_pretrained(recipe.source, noise_std=decoder_noise(recipe.source))


def _on_device(autoencoder: Autoencoder, device: torch.device) -> Autoencoder:
    autoencoder.network.to(device)
    return autoencoder


def _train_autoencoder(run: Run, dataset: ImageDataset, folder: Path) -> None:
    recipe, loading, alone = run.recipe.autoencoder, loader_settings(run), World(device=run.device)
    order = batch_order(dataset, recipe.train.batch, recipe.train.seed, loading.window)
    loader = make_loader(dataset, order, recipe.train, alone, loading)
    model = first_autoencoder(recipe).to(run.device)
    noise = (recipe.noise_min, recipe.noise_max)
    task = AutoencoderTask(model, loader, noise, recipe.loss, recipe.train, flip=loading.flip)
    run.notify(f"autoencoder: {recipe.train.steps} steps on {sum(map(len, order.buckets))} pictures")
    try:
        fit(task, recipe.train, folder, run.progress)
    finally:
        loader.close()


def first_autoencoder(recipe: AutoencoderRecipe) -> SmallAutoencoder:
    """A new autoencoder, or the one that `autoencoder.train.init_from` names, to go on with.

    Raises:
        UserError: it is of another shape than `autoencoder.model`.
    """
    # Standardised latents would take from joint training what it shapes them by.
    config = replace(recipe.model, standardise=False) if recipe.joint else recipe.model
    source = recipe.train.init_from
    if not source:
        torch.manual_seed(recipe.train.seed)
        return SmallAutoencoder(config)
    loaded = load_small(autoencoder_folder(source)).network
    if loaded.config != config:
        raise UserError(
            f"autoencoder.model is {to_dict(config)}, but '{source}' has {to_dict(loaded.config)}: give the same sizes"
        )
    return loaded.train().requires_grad_(True)


def _pipeline(
    trained: Flow, autoencoder: Autoencoder, conditioner: Conditioner | None, config: PipelineConfig
) -> StarFlowPipeline:
    assert isinstance(trained, (STARFlow, TarFlow))
    return StarFlowPipeline(trained, autoencoder, conditioner, config)


def _pipeline_config(
    recipe: Recipe, latents: AutoencoderSpec, conditioner: Conditioner | None, image_size: int
) -> PipelineConfig:
    return PipelineConfig(
        name=recipe.name,
        image_size=image_size,
        noise=recipe.objective.noise,
        noise_std=recipe.objective.noise_std if recipe.objective.noise == "gaussian" else 0.0,
        autoencoder=latents,
        conditioner=conditioner.spec if conditioner else None,
        guidance=recipe.guidance if conditioner else 0.0,
        temperature=recipe.temperature,
        candidates=recipe.candidates,
        cleaning=_cleaning(recipe.objective, latents),
        aspects=() if recipe.data.aspects == ("1:1",) else recipe.data.aspects,
        heldout=recipe.data.heldout,
    )


def _cleaning(objective: Objective, latents: AutoencoderSpec) -> Cleaning:
    """How samples lose their noise: there is none, a decoder was trained for it, or else by a Tweedie step."""
    if objective.noise == "uniform":
        if latents.kind != "pixels":
            raise UserError(f"objective.noise is uniform, which is for pixels: the autoencoder is a '{latents.kind}'")
        return "none"
    return "decoder" if latents.noise_std > 0 else "tweedie"


def _grid_prompts(recipe: Recipe, conditioner: Conditioner | None) -> list[str]:
    """The recipe's prompts; where it has none the first classes or `DEFAULT_PROMPTS`; empty without a conditioner."""
    if conditioner is None:
        return [""] * 8
    return list(recipe.prompts or conditioner.spec.names[:8] or DEFAULT_PROMPTS)


def _draw_samples(recipe: Recipe, pipeline: StarFlowPipeline, path: Path) -> None:
    """One image a prompt of the recipe, seeds counting from 0, one row a guidance weight (0 and the recipe's)."""
    prompts = _grid_prompts(recipe, pipeline.conditioner)
    weights = (0.0, recipe.guidance) if pipeline.conditioner else (0.0,)
    images = [image for weight in weights for image in pipeline(prompts, guidance=weight, not_finite="keep").images]
    save_grid(torch.cat([from_pil(image) for image in images]), path, columns=len(prompts))
    caption = json.dumps({"prompts": prompts, "guidance": weights}, ensure_ascii=False)
    files.write_text(path.with_suffix(".json"), caption + "\n")
