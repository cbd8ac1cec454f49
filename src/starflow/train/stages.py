"""The stages before the flow: the pictures, the autoencoder, the condition and the latents.

All functions are collective: every process of a run calls them in the same order, and what one of them does alone the
others wait for.

The stages of a recipe, each a folder of the run; a stage whose result is there is not run again.

RUN/recipe.json     the recipe as it was run       RUN/index/ or views.safetensors   the pictures
RUN/autoencoder/    log, samples, model            RUN/latents/            the latent cache
RUN/log.jsonl, samples/, checkpoints/, best/, model/   the flow; model/ is what from_pretrained reads
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from starflow.conditioning import ClassLabels, Conditioner, TextEncoder, TokenEmbeddings
from starflow.config import to_dict
from starflow.data import index, latent_cache
from starflow.data.buckets import Buckets
from starflow.data.index import ImageDataset, ViewDataset, open_source
from starflow.data.sets.fashion_mnist import read_fashion_mnist
from starflow.data.sets.shapes import draw_shapes
from starflow.data.sources.base import SourceKind
from starflow.data.sources.folder import read_folder
from starflow.data.views import TrainingViews, load_views, make_views, save_views
from starflow.errors import UserError
from starflow.io import files
from starflow.latents import Autoencoder, AutoencoderSpec, load_autoencoder
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, load_small
from starflow.train.distributed.world import World
from starflow.train.init_from import autoencoder_folder, initial_patch
from starflow.train.loader import batch_order
from starflow.train.loop import fit
from starflow.train.recipe import AutoencoderRecipe, DataRecipe
from starflow.train.tasks.autoencoder import AutoencoderTask
from starflow.train.tasks.cache_latents import CacheJob, cache_latents
from starflow.train.tasks.flow import LoaderSettings, make_loader

if TYPE_CHECKING:
    from starflow.train.run import Run

import copy
import json
from collections.abc import Mapping
from typing import Any

from starflow.data.images import from_pil, save_grid
from starflow.data.latent_cache import CachedLatents
from starflow.flow.config import config_from_dict
from starflow.flow.model import Flow, STARFlow, TarFlow, build
from starflow.pipeline.config import Cleaning, PipelineConfig
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.distributed.sharding import initialise
from starflow.train.init_from import load_initial, read_initial
from starflow.train.loop import Task
from starflow.train.recipe import Objective, Recipe
from starflow.train.tasks.flow import FlowTask, LiveFlowTask, LiveLatents
from starflow.train.tasks.joint import JointTask, joint_latents


def prepare_pictures(run: Run) -> ImageDataset:
    """The run's pictures by number: views in memory, or an index of what stays where it is, made once.

    Raises:
        UserError: no pictures there, or sizes that autoencoder and patches cannot take.
    """
    data = run.recipe.data
    if not data.indexed:
        return ViewDataset(prepare_views(run))
    buckets = Buckets(data.views.size, _multiple(run), data.aspects)
    source = open_source(_kind(data), data.path)
    folder = run.folder / "index"
    if not index.is_complete(folder):
        settings = index.IndexSettings(data.aspects, data.heldout)
        missing = index.missing_parts(source, folder)
        run.world.wait()  # until all have seen the same
        for shard in missing[run.world.rank :: run.world.size]:
            index.scan_shard(source, shard, folder, settings)
        run.world.wait()
        if run.world.main:
            info = index.join_parts(source, folder)
            run.say(
                f"pictures: {info['pictures']}, {info['heldout']} of them held out, {info['skipped']} skipped "
                f"({folder / 'skipped.jsonl'})"
            )
        run.world.wait()
    return index.IndexedDataset(source, folder, buckets)


def _kind(data: DataRecipe) -> SourceKind:
    assert data.source in ("folder", "tar", "parquet")
    return data.source


def _multiple(run: Run) -> int:
    """What sides of pictures must be multiples of: the autoencoder's factor times the flow's patch."""
    recipe, own = run.recipe.autoencoder, run.recipe.flow.get("patch_size")
    if recipe.kind != "small":
        factor = 1 if recipe.kind == "pixels" else _pretrained(recipe.kind, recipe.source).spec.factor
    else:
        config = load_small(autoencoder_folder(recipe.source)).network.config if recipe.source else recipe.model
        factor = config.factor
    source = run.recipe.train.init_from
    return factor * int(own or (initial_patch(source) if source else 1))


def prepare_views(run: Run) -> TrainingViews:
    """Training and held-out views of a set that is kept in memory, drawn once a run."""
    path = run.folder / "views.safetensors"
    run.world.first(lambda: None if path.is_file() else save_views(path, _draw_views(run)))
    return load_views(path)


def _draw_views(run: Run) -> TrainingViews:
    data = run.recipe.data
    if data.source == "shapes":
        return draw_shapes(data.shapes, data.views.size, data.views.seed)
    if data.source == "fashion-mnist":
        return read_fashion_mnist(Path(data.path) if data.path else None)
    if not Path(data.path).is_dir():
        raise UserError(f"no folder of pictures at '{data.path}': run `starflow prepare-data glyphs`")
    views, skipped = make_views(read_folder(Path(data.path)), data.views, progress=run.progress, workers=2)
    for one in skipped:
        run.say(f"skipped {one.name}: {one.reason}")
    if skipped:
        run.say(f"skipped {len(skipped)} of {len(skipped) + len(set(views.names))} pictures")
    return views


def feed_settings(run: Run) -> LoaderSettings:
    """How the run's pictures reach a task; views in memory have been mirrored already."""
    data = run.recipe.data
    return LoaderSettings(data.workers, data.window, data.indexed and data.views.flip, run.say)


def prepare_autoencoder(run: Run) -> Autoencoder:
    """The recipe's autoencoder: pretrained, identity, or trained by the main process unless its model is there."""
    recipe = run.recipe.autoencoder
    if recipe.kind != "small":
        spec = AutoencoderSpec(recipe.kind, channels=recipe.channels, factor=1, source=recipe.source)
        return _on(load_autoencoder(spec) if recipe.kind == "pixels" else _pretrained(recipe.kind, recipe.source), run)
    if recipe.joint:
        raise UserError("autoencoder.joint is on: the autoencoder is trained with the flow, by `starflow train`")
    if recipe.source:
        return _on(load_small(autoencoder_folder(recipe.source)), run)
    folder = run.folder / "autoencoder"
    if run.world.missing(folder / "model" / "config.json"):
        pictures = prepare_pictures(run)
        run.world.first(lambda: _train_autoencoder(run, pictures, folder))
    return _on(load_small(folder / "model"), run)


def _pretrained(kind: str, source: str) -> Autoencoder:
    from starflow.latents import KLLatents, TinyLatents
    from starflow.latents.load import decoder_noise

    adapter = KLLatents if kind == "diffusers_kl" else TinyLatents
    return adapter.from_pretrained(source, noise_std=decoder_noise(source))


def _on(autoencoder: Autoencoder, run: Run) -> Autoencoder:
    network = getattr(autoencoder, "network", None)
    if network is not None:
        network.to(run.device)
    return autoencoder


def _train_autoencoder(run: Run, pictures: ImageDataset, folder: Path) -> None:
    recipe, how, alone = run.recipe.autoencoder, feed_settings(run), World(device=run.device)
    order = batch_order(pictures, recipe.train.batch, recipe.train.seed, how.window)
    feed = make_loader(pictures, order, recipe.train, alone, how)
    model = first_autoencoder(recipe).to(run.device)
    noise = (recipe.noise_min, recipe.noise_max)
    task = AutoencoderTask(model, feed, noise, recipe.loss, recipe.train, mirror=how.mirror)
    run.say(f"autoencoder: {recipe.train.steps} steps on {sum(map(len, order.buckets))} pictures")
    try:
        fit(task, recipe.train, folder, run.progress)
    finally:
        feed.close()


def first_autoencoder(recipe: AutoencoderRecipe) -> SmallAutoencoder:
    """A new autoencoder, or the one that `autoencoder.train.init_from` names, to go on with.

    Raises:
        UserError: it is of another shape than `autoencoder.model`.
    """
    config = _sizes(recipe)
    source = recipe.train.init_from
    if not source:
        torch.manual_seed(recipe.train.seed)
        return SmallAutoencoder(config)
    found = load_small(autoencoder_folder(source)).network
    if found.config != config:
        raise UserError(
            f"autoencoder.model is {to_dict(config)}, but '{source}' has {to_dict(found.config)}: give the same sizes"
        )
    return found.train().requires_grad_(True)


def _sizes(recipe: AutoencoderRecipe) -> SmallAutoencoderConfig:
    """Standardised latents would take from joint training what it shapes them by."""
    return replace(recipe.model, standardise=False) if recipe.joint else recipe.model


def prepare_conditioner(run: Run, pictures: ImageDataset | None) -> Conditioner | None:
    """Text encoder or class labels; labels are the class names of the pictures, in their order.

    Raises:
        UserError: the encoder is missing, or one of the recipe's prompts is no class.
    """
    recipe = run.recipe.conditioning
    if recipe.kind == "none":
        return None
    if recipe.kind == "class":
        path = run.folder / "classes.json"
        if run.world.missing(path):
            found = pictures or prepare_pictures(run)
            run.world.first(lambda: files.write_json(path, found.classes()))
        classes = ClassLabels(files.read_json(path))
        if run.recipe.prompts:
            classes.encode(run.recipe.prompts)  # a wrong name shows now, not with the first samples
        return classes
    adapter = TokenEmbeddings if recipe.kind == "embeddings" else TextEncoder
    conditioner = adapter.from_pretrained(recipe.encoder, recipe.tokens)
    conditioner.network.to(run.device)
    return conditioner


def prepare_latents(run: Run) -> None:
    """Fill the latent cache unless it is whole; the processes share the work."""
    folder = run.folder / "latents"
    if latent_cache.is_complete(folder):
        return
    pictures = prepare_pictures(run)
    conditioner = prepare_conditioner(run, pictures)  # before the autoencoder: what is missing shows now, not in hours
    autoencoder = prepare_autoencoder(run)
    data = run.recipe.data
    info = {
        "autoencoder": to_dict(autoencoder.spec),
        "conditioner": to_dict(conditioner.spec) if conditioner else None,
    }
    mirrored = data.indexed and data.views.flip and data.views.views > 1
    cache = CacheJob(pictures, autoencoder, conditioner, folder, mirrored, data.workers)
    cache_latents(cache, info, run.world, show_progress=run.progress, say=run.say)


USUAL_PROMPTS = ("a red apple", "a blue car", "a green tree", "a dog")


def train_flow(run: Run) -> Path:
    """Run every missing stage, then train the flow; returns the folder of the finished pipeline. Collective."""
    if run.recipe.autoencoder.joint:
        task: Task = _joint_task(run)
    elif run.recipe.data.latents == "live":
        task = _live_task(run)
    else:
        task = _cached_task(run)
    count, told = sum(parameter.numel() for parameter in task.model.parameters()), run.recipe.train
    run.say(f"flow: {count / 1e6:.1f} M parameters, {told.steps} steps of {told.batch} pictures")
    try:
        fit(task, run.recipe.train, run.folder, run.progress, run.world)
    finally:
        if isinstance(task, LiveFlowTask):
            task.feed.close()
    return run.folder / "model"


def _cached_task(run: Run) -> FlowTask:
    prepare_latents(run)
    cache = CachedLatents(run.folder / "latents")
    autoencoder = prepare_autoencoder(run)
    conditioner = prepare_conditioner(run, None)
    flow = _first_flow(run, autoencoder.spec, conditioner, cache.side)
    config = _pipeline_config(run, autoencoder.spec, conditioner, int(cache.info["image_size"]))
    return FlowTask(
        flow,
        cache,
        run.recipe.objective,
        run.recipe.train,
        draw=lambda trained, path: _draw_samples(
            run.recipe, _pipeline(trained, autoencoder, conditioner, config), path
        ),
        save=lambda trained, folder: _pipeline(trained, autoencoder, conditioner, config).save_pretrained(folder),
        world=run.world,
        window=run.recipe.data.window,
    )


def _live_task(run: Run) -> LiveFlowTask:
    pictures = prepare_pictures(run)
    conditioner = prepare_conditioner(run, pictures)
    autoencoder = prepare_autoencoder(run)
    latents = LiveLatents(pictures, autoencoder, conditioner)
    flow = _first_flow(run, autoencoder.spec, conditioner, latents.side)
    config = _pipeline_config(run, autoencoder.spec, conditioner, pictures.buckets.side)
    return LiveFlowTask(
        flow,
        latents,
        run.recipe.objective,
        run.recipe.train,
        draw=lambda trained, path: _draw_samples(
            run.recipe, _pipeline(trained, autoencoder, conditioner, config), path
        ),
        save=lambda trained, folder: _pipeline(trained, autoencoder, conditioner, config).save_pretrained(folder),
        world=run.world,
        how=feed_settings(run),
    )


def _joint_task(run: Run) -> JointTask:
    """Both networks real and equal in every process: drawn from the recipe's seeds."""
    recipe = run.recipe
    pictures = prepare_pictures(run)
    conditioner = prepare_conditioner(run, pictures)
    autoencoder = first_autoencoder(recipe.autoencoder).to(run.device)
    if run.world.size > 1:  # FSDP2 takes no other
        autoencoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    spec = joint_latents(copy.deepcopy(autoencoder), recipe.objective).spec
    flow = _first_flow(run, spec, conditioner, pictures.buckets.side // spec.factor)
    if next(flow.parameters()).is_meta:
        flow.to_empty(device=run.device)
        initialise(flow, recipe.train.seed)
    config = _pipeline_config(run, spec, conditioner, pictures.buckets.side)
    return JointTask(
        autoencoder,
        flow.to(run.device),
        pictures,
        conditioner,
        recipe.objective,
        recipe.autoencoder,
        recipe.train,
        draw=lambda coder, trained, path: _draw_samples(recipe, _pipeline(trained, coder, conditioner, config), path),
        save=lambda coder, trained, folder: _pipeline(trained, coder, conditioner, config).save_pretrained(folder),
        world=run.world,
        how=feed_settings(run),
    )


def _pipeline(
    trained: Flow, autoencoder: Autoencoder, conditioner: Conditioner | None, config: PipelineConfig
) -> StarFlowPipeline:
    assert isinstance(trained, (STARFlow, TarFlow))
    return StarFlowPipeline(trained, autoencoder, conditioner, config)


def _first_flow(run: Run, latents: AutoencoderSpec, conditioner: Conditioner | None, side: int) -> STARFlow | TarFlow:
    """The recipe's flow: on the meta device, or with the weights that `train.init_from` names."""
    recipe, source = run.recipe, run.recipe.train.init_from
    initial = read_initial(source, recipe.flow) if source else None
    with torch.device("meta"):  # the engine gives every process its part of the first weights
        flow = build_flow(initial.options if initial else recipe.flow, latents, conditioner, side)
    if initial is not None:
        # Several processes may share the weights of a model that one of them cannot hold.
        device = run.device if run.world.size == 1 else torch.device("cpu")
        fresh = load_initial(flow, initial, recipe.train.seed, device)
        run.say(f"first weights from {source}" + (f"; {len(fresh)} start anew, {fresh[0]} first" if fresh else ""))
    return flow


def build_flow(
    own: Mapping[str, Any], latents: AutoencoderSpec, conditioner: Conditioner | None, side: int
) -> STARFlow | TarFlow:
    """A new flow of these options for these latents of `side` x `side` and this condition.

    Raises:
        UserError: an unknown option, or options that do not fit.
    """
    options: dict[str, Any] = {"in_channels": latents.channels, "img_size": side, **own}
    if options.get("kind") == "tarflow":
        return build(config_from_dict({"num_classes": _classes(conditioner), **options}))
    layers = options.get("layers_per_block")
    if "num_blocks" not in options and isinstance(layers, (list, tuple)):
        options["num_blocks"] = len(layers)
    if conditioner:
        options = {"txt_size": conditioner.spec.size, "txt_dim": conditioner.spec.dim, **options}
    return build(config_from_dict(options))


def _classes(conditioner: Conditioner | None) -> int:
    if conditioner and conditioner.spec.kind != "class":
        raise UserError("a TarFlow reads class labels, no text: set conditioning.kind to class or none")
    return len(conditioner.spec.names) if conditioner else 0


def _pipeline_config(run: Run, latents: AutoencoderSpec, conditioner: Conditioner | None, side: int) -> PipelineConfig:
    recipe = run.recipe
    return PipelineConfig(
        name=recipe.name,
        image_size=side,
        noise=recipe.objective.noise,
        noise_std=recipe.objective.noise_std if recipe.objective.noise == "gaussian" else 0.0,
        autoencoder=latents,
        conditioner=conditioner.spec if conditioner else None,
        guidance=recipe.guidance if conditioner else 0.0,
        temperature=recipe.temperature,
        candidates=recipe.candidates,
        cleaning=_cleaning(recipe.objective, latents),
        aspects=recipe.data.aspects if len(recipe.data.aspects) > 1 else (),
    )


def _cleaning(objective: Objective, latents: AutoencoderSpec) -> Cleaning:
    """The way out of the noise: none to leave, a decoder trained for it, or else a Tweedie step."""
    if objective.noise == "uniform":
        if latents.kind != "pixels":
            raise UserError(f"objective.noise is uniform, which is for pixels: the autoencoder is a '{latents.kind}'")
        return "none"
    return "decoder" if latents.noise_std > 0 else "tweedie"


def _grid_prompts(recipe: Recipe, conditioner: Conditioner | None) -> list[str]:
    """The recipe's prompts, or the first classes or our own where it has none, or without a conditioner none."""
    if conditioner is None:
        return [""] * 8
    return list(recipe.prompts or conditioner.spec.names[:8] or USUAL_PROMPTS)


def _draw_samples(recipe: Recipe, pipeline: StarFlowPipeline, path: Path) -> None:
    """One picture a prompt of the recipe, seeds counting from 0, one row a guidance weight (0 and the recipe's)."""
    prompts = _grid_prompts(recipe, pipeline.conditioner)
    weights = (0.0, recipe.guidance) if pipeline.conditioner else (0.0,)
    pictures = [picture for weight in weights for picture in pipeline(prompts, guidance=weight).images]
    save_grid(torch.cat([from_pil(picture) for picture in pictures]), path, columns=len(prompts))
    caption = json.dumps({"prompts": prompts, "guidance": weights}, ensure_ascii=False)
    files.write_text(path.with_suffix(".json"), caption + "\n")
