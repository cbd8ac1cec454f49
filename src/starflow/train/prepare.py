"""The stages before the flow: the pictures, the autoencoder, the condition and the latents.

All functions are collective: every process of a run calls them in the same order, and what one of them does alone the
others wait for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from starflow import files
from starflow.conditioning import ClassLabels, Conditioner, TextEncoder, TokenEmbeddings
from starflow.config import to_dict
from starflow.data import index, latent_cache
from starflow.data.buckets import Buckets
from starflow.data.fashion_mnist import read_fashion_mnist
from starflow.data.picture_set import Pictures, ViewPictures
from starflow.data.records import read_folder
from starflow.data.shapes import draw_shapes
from starflow.data.sources import SourceKind, open_source
from starflow.data.views import Views, load_views, make_views, save_views
from starflow.errors import UserError
from starflow.latents import Autoencoder, AutoencoderSpec, load_autoencoder
from starflow.latents.small import SmallAutoencoder, SmallAutoencoderConfig, load_small
from starflow.train.autoencoder import AutoencoderTask
from starflow.train.cache import Cache, cache_latents
from starflow.train.distributed.world import World
from starflow.train.feed import training_order
from starflow.train.init_from import autoencoder_folder, initial_patch
from starflow.train.live import FeedSettings, make_feed
from starflow.train.loop import fit
from starflow.train.recipe import AutoencoderRecipe, DataRecipe

if TYPE_CHECKING:
    from starflow.train.stages import Run


def prepare_pictures(run: Run) -> Pictures:
    """The run's pictures by number: views in memory, or an index of what stays where it is, made once.

    Raises:
        UserError: no pictures there, or sizes that autoencoder and patches cannot take.
    """
    data = run.recipe.data
    if not data.indexed:
        return ViewPictures(prepare_views(run))
    buckets = Buckets(data.views.size, _multiple(run), data.aspects)
    source = open_source(_kind(data), data.path)
    folder = run.folder / "index"
    if not index.is_whole(folder):
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
    return index.IndexedPictures(source, folder, buckets)


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


def prepare_views(run: Run) -> Views:
    """Training and held-out views of a set that is kept in memory, drawn once a run."""
    path = run.folder / "views.safetensors"
    run.world.first(lambda: None if path.is_file() else save_views(path, _draw_views(run)))
    return load_views(path)


def _draw_views(run: Run) -> Views:
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


def feed_settings(run: Run) -> FeedSettings:
    """How the run's pictures reach a task; views in memory have been mirrored already."""
    data = run.recipe.data
    return FeedSettings(data.workers, data.window, data.indexed and data.views.flip, run.say)


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
    from starflow.latents.trainable import decoder_noise

    adapter = KLLatents if kind == "diffusers_kl" else TinyLatents
    return adapter.from_pretrained(source, noise_std=decoder_noise(source))


def _on(autoencoder: Autoencoder, run: Run) -> Autoencoder:
    network = getattr(autoencoder, "network", None)
    if network is not None:
        network.to(run.device)
    return autoencoder


def _train_autoencoder(run: Run, pictures: Pictures, folder: Path) -> None:
    recipe, how, alone = run.recipe.autoencoder, feed_settings(run), World(device=run.device)
    order = training_order(pictures, recipe.train.batch, recipe.train.seed, how.window)
    feed = make_feed(pictures, order, recipe.train, alone, how)
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


def prepare_conditioner(run: Run, pictures: Pictures | None) -> Conditioner | None:
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
    if latent_cache.is_whole(folder):
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
    cache = Cache(pictures, autoencoder, conditioner, folder, mirrored, data.workers)
    cache_latents(cache, info, run.world, show_progress=run.progress, say=run.say)
