"""The stages of a recipe, each a folder of the run; a stage whose result is there is not run again.

RUN/recipe.json     the recipe as it was run       RUN/views.safetensors   training views of the pictures
RUN/autoencoder/    log, samples, model            RUN/latents/            the latent cache
RUN/log.jsonl, samples/, checkpoints/, best/, model/   the flow; model/ is what from_pretrained reads
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from starflow import files
from starflow.conditioning import ClassLabels, Conditioner, TextEncoder
from starflow.config import to_dict
from starflow.data.fashion_mnist import read_fashion_mnist
from starflow.data.latent_cache import is_whole, read_cache
from starflow.data.pictures import from_pil, save_grid
from starflow.data.records import read_folder
from starflow.data.shapes import draw_shapes
from starflow.data.views import Views, load_views, make_views, save_views
from starflow.errors import UserError
from starflow.flow.model import Flow, STARFlow, TarFlow, build
from starflow.latents import Autoencoder, AutoencoderSpec, load_autoencoder
from starflow.latents.small import SmallAutoencoder, load_small
from starflow.model_config import config_from_dict
from starflow.pipeline import Cleaning, PipelineConfig, StarFlowPipeline
from starflow.train.autoencoder import AutoencoderTask
from starflow.train.cache import cache_latents
from starflow.train.distributed.world import World
from starflow.train.flow import FlowTask
from starflow.train.init_from import autoencoder_folder, fill, read_initial
from starflow.train.loop import fit
from starflow.train.recipe import AutoencoderRecipe, Objective, Recipe


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


def start(recipe: Recipe, folder: Path, device: torch.device, progress: bool = True, world: World | None = None) -> Run:
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


def _check_same_stages(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with results that the recipe no longer describes; how long to train may change."""
    for section in ("data", "autoencoder", "conditioning"):
        old, new = dict(before.get(section, {})), dict(now[section])
        changed = [key for key in new if key != "train" and old.get(key) != new[key]]
        if changed:
            raise UserError(
                f"{folder} was started with another {section}.{changed[0]}: choose another --output, or undo the change"
            )


def prepare_views(run: Run) -> Views:
    """Training and held-out views, drawn once a run."""
    path = run.folder / "views.safetensors"
    if not path.is_file():
        save_views(path, _draw_views(run))
    return load_views(path)


def _draw_views(run: Run) -> Views:
    data = run.recipe.data
    if data.source == "shapes":
        return draw_shapes(data.shapes, data.views.size, data.views.seed)
    if data.source == "fashion-mnist":
        return read_fashion_mnist(Path(data.path) if data.path else None)
    if not Path(data.path).is_dir():
        fix = "run `starflow prepare-data glyphs`" if data.source == "glyphs" else "set data.path to your pictures"
        raise UserError(f"no folder of pictures at '{data.path}': {fix}")
    views, skipped = make_views(read_folder(Path(data.path)), data.views, progress=run.progress, workers=2)
    for one in skipped:
        run.say(f"skipped {one.name}: {one.reason}")
    if skipped:
        run.say(f"skipped {len(skipped)} of {len(skipped) + len(set(views.names))} pictures")
    return views


def prepare_autoencoder(run: Run) -> Autoencoder:
    """The recipe's autoencoder: pretrained, identity, or trained here unless its model is there already."""
    recipe = run.recipe.autoencoder
    if recipe.kind != "small":
        spec = AutoencoderSpec(recipe.kind, channels=recipe.channels, factor=1, source=recipe.source)
        return _on(load_autoencoder(spec) if recipe.kind == "pixels" else _pretrained(recipe.kind, recipe.source), run)
    if recipe.source:
        return _on(load_small(autoencoder_folder(recipe.source)), run)
    folder = run.folder / "autoencoder"
    if not (folder / "model" / "config.json").is_file():
        _train_autoencoder(run, folder)
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


def _train_autoencoder(run: Run, folder: Path) -> None:
    recipe = run.recipe.autoencoder
    views = prepare_views(run)
    train = [index for index, split in enumerate(views.splits) if split == "train"]
    heldout = [index for index, split in enumerate(views.splits) if split == "heldout"]
    torch.manual_seed(recipe.train.seed)
    if recipe.train.init_from:
        model = _trained_before(recipe).to(run.device)
    else:
        model = SmallAutoencoder(recipe.model).to(run.device)
    names = [views.names[index] for index in train]
    noise = (recipe.noise_min, recipe.noise_max)
    task = AutoencoderTask(model, views.images[train], names, views.images[heldout], noise, recipe.loss, recipe.train)
    run.say(f"autoencoder: {recipe.train.steps} steps on {len(train)} views")
    fit(task, recipe.train, folder, run.progress)


def _trained_before(recipe: AutoencoderRecipe) -> SmallAutoencoder:
    """The autoencoder that `autoencoder.train.init_from` names, to go on with.

    Raises:
        UserError: it is of another shape than `autoencoder.model`.
    """
    found = load_small(autoencoder_folder(recipe.train.init_from)).network
    if found.config != recipe.model:
        raise UserError(
            f"autoencoder.model is {to_dict(recipe.model)}, but '{recipe.train.init_from}' has "
            f"{to_dict(found.config)}: give the same sizes"
        )
    return found.train().requires_grad_(True)


def prepare_conditioner(run: Run, views: Views | None) -> Conditioner | None:
    """Text encoder or class labels; labels are the sorted class names of the training views.

    Raises:
        UserError: the encoder is missing, or one of the recipe's prompts is no class.
    """
    recipe = run.recipe.conditioning
    if recipe.kind == "none":
        return None
    if recipe.kind == "class":
        path = run.folder / "classes.json"
        if not path.is_file():
            views = views or prepare_views(run)
            files.write_json(path, sorted({label for label in views.labels if label}))
        classes = ClassLabels(files.read_json(path))
        classes.encode(run.recipe.prompts)
        return classes
    conditioner = TextEncoder.from_pretrained(recipe.encoder, recipe.tokens)
    conditioner.network.to(run.device)
    return conditioner


def prepare_latents(run: Run) -> None:
    """Fill the latent cache unless it is whole."""
    folder = run.folder / "latents"
    if is_whole(folder):
        return
    views = prepare_views(run)
    conditioner = prepare_conditioner(run, views)  # before the autoencoder: what is missing shows at once, not in hours
    autoencoder = prepare_autoencoder(run)
    info = {
        "autoencoder": to_dict(autoencoder.spec),
        "conditioner": to_dict(conditioner.spec) if conditioner else None,
        "image_size": views.images.shape[-1],
    }
    cache_latents(views, autoencoder, conditioner, folder, info, run.device, run.progress)


def train_flow(run: Run) -> Path:
    """Run every missing stage, then train the flow; returns the folder of the finished pipeline.

    The main process runs the stages before the flow alone; all of them train it.
    """
    run.world.first(lambda: prepare_latents(run))
    cache = read_cache(run.folder / "latents")
    autoencoder = prepare_autoencoder(run)
    conditioner = prepare_conditioner(run, None)
    flow = _first_flow(run, autoencoder.spec, conditioner, side=cache.mean.shape[-1])
    config = _pipeline_config(run, autoencoder, conditioner, cache.info)

    def pipeline(trained: Flow) -> StarFlowPipeline:
        assert isinstance(trained, (STARFlow, TarFlow))
        return StarFlowPipeline(trained, autoencoder, conditioner, config)

    count = sum(parameter.numel() for parameter in flow.parameters())
    run.say(
        f"flow: {count / 1e6:.1f} M parameters, {run.recipe.train.steps} steps on {len(cache.split('train'))} views"
    )
    task = FlowTask(
        flow,
        cache,
        run.recipe.objective,
        run.recipe.train,
        draw=lambda trained, path: _draw_samples(run.recipe, pipeline(trained), path),
        save=lambda trained, folder: pipeline(trained).save_pretrained(folder),
        world=run.world,
    )
    fit(task, run.recipe.train, run.folder, run.progress, run.world)
    return run.folder / "model"


def _first_flow(run: Run, latents: AutoencoderSpec, conditioner: Conditioner | None, side: int) -> STARFlow | TarFlow:
    """The recipe's flow: on the meta device, or with the weights that `train.init_from` names."""
    recipe, source = run.recipe, run.recipe.train.init_from
    initial = read_initial(source, recipe.flow) if source else None
    with torch.device("meta"):  # the engine gives every process its part of the first weights
        flow = build_flow(initial.options if initial else recipe.flow, latents, conditioner, side)
    if initial is not None:
        # Several processes may share the weights of a model that one of them cannot hold.
        device = run.device if run.world.size == 1 else torch.device("cpu")
        fresh = fill(flow, initial, recipe.train.seed, device)
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


def _pipeline_config(
    run: Run, autoencoder: Autoencoder, conditioner: Conditioner | None, info: Mapping[str, Any]
) -> PipelineConfig:
    return PipelineConfig(
        name=run.recipe.name,
        image_size=int(info["image_size"]),
        noise=run.recipe.objective.noise,
        noise_std=run.recipe.objective.noise_std if run.recipe.objective.noise == "gaussian" else 0.0,
        autoencoder=autoencoder.spec,
        conditioner=conditioner.spec if conditioner else None,
        guidance=run.recipe.guidance if conditioner else 0.0,
        cleaning=_cleaning(run.recipe.objective, autoencoder),
    )


def _cleaning(objective: Objective, autoencoder: Autoencoder) -> Cleaning:
    """The way out of the noise: none to leave, a decoder trained for it, or else a Tweedie step."""
    if objective.noise == "uniform":
        if autoencoder.spec.kind != "pixels":
            raise UserError(
                f"objective.noise is uniform, which is for pixels: the autoencoder is a '{autoencoder.spec.kind}'"
            )
        return "none"
    return "decoder" if autoencoder.spec.noise_std > 0 else "tweedie"


def _draw_samples(recipe: Recipe, pipeline: StarFlowPipeline, path: Path) -> None:
    """One picture a prompt of the recipe, seeds counting from 0, one row a guidance weight (0 and the recipe's)."""
    prompts = list(recipe.prompts) if pipeline.conditioner else [""] * 8
    weights = (0.0, recipe.guidance) if pipeline.conditioner else (0.0,)
    pictures = [picture for weight in weights for picture in pipeline(prompts, guidance=weight).images]
    save_grid(torch.cat([from_pil(picture) for picture in pictures]), path, columns=len(prompts))
    caption = json.dumps({"prompts": prompts, "guidance": weights}, ensure_ascii=False)
    files.write_text(path.with_suffix(".json"), caption + "\n")
