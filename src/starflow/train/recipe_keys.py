"""What every key of a recipe means for a run that has begun, and where a key has no effect: one table each.

`KEYS` gives each key one of:

- "free": it may change at any time;
- "updates": it acts on the updates that are still to come, so it may change until the stage has had all of them;
- a stage (of `RESULTS`): that stage's results depend on it. Once there are any, another value needs the stage and what
  follows it again, and the message says what to delete for that; what the flow itself depends on is refused.

`IDLE` says where a key does nothing. A recipe that gives it another value than its default is then refused, as whoever
wrote it expects something of it. What a recipe inherits, and only its own switches make idle, is left out with a
warning: see `starflow.train.recipe.load_recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from starflow.config import to_dict
from starflow.errors import UserError
from starflow.flow.config import KINDS
from starflow.io.files import read_json
from starflow.train.checkpoint import checkpoints
from starflow.train.settings import TrainSettings

Recipe: TypeAlias = Any
"""A `starflow.train.recipe.Recipe`, whose file reads these tables and is not imported here."""

RESULTS: dict[str, tuple[str, ...]] = {
    "data": ("index", "views.safetensors", "classes.json"),
    "autoencoder": ("autoencoder",),
    "latents": ("latents",),
    "flow": ("checkpoints", "best", "model"),
}
"""What each stage leaves in a run's folder, in the order of the stages."""

_SETTINGS = {
    **dict.fromkeys(("seed", "init_from"), "stage"),
    **dict.fromkeys(("steps", "batch", "lr", "min_lr", "schedule", "decay", "warmup", "betas", "eps"), "updates"),
    **dict.fromkeys(("weight_decay", "clip", "skip_above", "average", "precision"), "updates"),
    **dict.fromkeys(("compile", "parallel", "evaluate_every", "evaluate_pictures", "sample_every"), "free"),
    **dict.fromkeys(("checkpoint_every", "peak_tflops", "wandb"), "free"),
}
"""The keys of `TrainSettings`, of whichever stage."""

KEYS: dict[str, str] = {
    **dict.fromkeys(("name", "prompts", "guidance", "temperature", "candidates"), "free"),
    **dict.fromkeys(("data.latents", "data.window", "data.workers"), "free"),
    **{f"data.{key}": "data" for key in ("source", "path", "shapes", "heldout", "aspects", "views")},
    **{f"autoencoder.{key}": "autoencoder" for key in ("kind", "source", "channels", "model", "joint")},
    **{f"autoencoder.{key}": "autoencoder" for key in ("noise_min", "noise_max", "loss", "flow_weight", "joint_loss")},
    **{f"autoencoder.train.{key}": "autoencoder" if what == "stage" else what for key, what in _SETTINGS.items()},
    "conditioning": "latents",
    "flow": "flow",
    **{f"objective.{key}": "flow" for key in ("noise", "noise_std")},
    **{f"objective.{key}": "updates" for key in ("drop_condition", "latent_penalty")},
    **{f"train.{key}": "flow" if what == "stage" else what for key, what in _SETTINGS.items()},
}
"""What a key is, by its dotted name or that of its section; see the module."""

IDLE: tuple[tuple[tuple[str, ...], str, Callable[[Recipe], bool]], ...] = (
    (("data.shapes",), "data.source is not 'shapes'", lambda r: r.data.source != "shapes"),
    (("data.path",), "data.source is 'shapes'", lambda r: r.data.source == "shapes"),
    (("data.heldout",), "the images of this data.source are held out already", lambda r: not r.data.indexed),
    (
        tuple(
            f"data.views.{key}"
            for key in ("group_views", "heldout_views", "colour_backgrounds", "hue", "scale_min", "shift")
        ),
        "data.source is not 'glyphs'",
        lambda r: r.data.source != "glyphs",
    ),
    (
        ("data.views.views", "data.views.flip"),
        "the images of this data.source are not augmented",
        lambda r: r.data.source in ("shapes", "fashion-mnist"),
    ),
    (
        ("data.views.seed", "data.views.size"),
        "the images of data.source 'fashion-mnist' are of 28 px and stay as they are",
        lambda r: r.data.source == "fashion-mnist",
    ),
    (("autoencoder.source",), "autoencoder.joint trains one from the first update on", lambda r: r.autoencoder.joint),
    (("autoencoder.source",), "autoencoder.kind is 'pixels'", lambda r: r.autoencoder.kind == "pixels"),
    (("autoencoder.channels",), "autoencoder.kind is not 'pixels'", lambda r: r.autoencoder.kind != "pixels"),
    (("autoencoder.model", "autoencoder.loss"), "no autoencoder is trained here", lambda r: not _trains_autoencoder(r)),
    (
        ("autoencoder.noise_min", "autoencoder.noise_max", "autoencoder.train"),
        "this run has no stage that trains an autoencoder",
        lambda r: not _has_autoencoder_stage(r) and not r.autoencoder.joint,
    ),
    (
        (
            "autoencoder.noise_min",
            "autoencoder.noise_max",
            *(f"autoencoder.train.{key}" for key in _SETTINGS if key not in ("seed", "init_from")),
        ),
        "with autoencoder.joint the sections objective and train count",
        lambda r: r.autoencoder.joint,
    ),
    (
        tuple(f"autoencoder.train.{key}" for key in ("parallel.layout", "parallel.shard_size", "evaluate_pictures")),
        "it is for the training of a flow",
        lambda r: _has_autoencoder_stage(r),
    ),
    (
        ("autoencoder.train.decay",),
        "its schedule is not 'trapezoid'",
        lambda r: r.autoencoder.train.schedule == "cosine",
    ),
    (
        ("autoencoder.flow_weight", "autoencoder.joint_loss"),
        "autoencoder.joint is off",
        lambda r: not r.autoencoder.joint,
    ),
    (
        ("conditioning.encoder", "conditioning.tokens"),
        "conditioning.kind is neither 'text' nor 'embeddings'",
        lambda r: r.conditioning.kind in ("class", "none"),
    ),
    (("prompts",), "conditioning.kind is 'none'", lambda r: r.conditioning.kind == "none" and any(r.prompts)),
    (("objective.noise_std",), "objective.noise is 'uniform'", lambda r: r.objective.noise == "uniform"),
    (("train.decay",), "its schedule is not 'trapezoid'", lambda r: r.train.schedule != "trapezoid"),
    (
        ("train.parallel.shard_size",),
        "train.parallel.layout is not 'hybrid'",
        lambda r: r.train.parallel.layout != "hybrid",
    ),
)
"""Keys or sections, why they do nothing, and where."""

_NOTHING: dict[str, Any] = {"objective.noise_std": 0.0}
"""Values beside the default that say that there is nothing, which is what an idle key has too."""


def flat_keys(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a recipe's dictionary by dotted key.

    >>> flat_keys({"name": "mine", "train": {"parallel": {"accumulate": 2}}})
    {'name': 'mine', 'train.parallel.accumulate': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value  # an empty mapping of options is a value
        flat |= flat_keys(value, f"{above}{key}.") if nested else {f"{above}{key}": value}
    return flat


def kind_of_key(key: str) -> str:
    """What `KEYS` says of a dotted key.

    >>> kind_of_key("autoencoder.train.parallel.accumulate"), kind_of_key("flow.head_dim")
    ('free', 'flow')
    """
    return next(KEYS[name] for name in _sections(key) if name in KEYS)


def idle_keys(recipe: Recipe) -> dict[str, str]:
    """The keys that the recipe gives another value than the default and that do nothing, and why."""
    default = default_values(recipe)
    found: dict[str, str] = {}
    for key, value in flat_keys(to_dict(recipe)).items():
        if value == default.get(key) or (key in _NOTHING and value == _NOTHING[key]):
            continue
        reasons = [why for names, why, idle in IDLE if not set(_sections(key)).isdisjoint(names) and idle(recipe)]
        found |= {key: reasons[0]} if reasons else {}
    return found


def default_values(recipe: Recipe) -> dict[str, Any]:
    """The defaults of all keys, by dotted name."""
    default = type(recipe)("", TrainSettings(steps=1))
    return flat_keys(to_dict(default))


def check_idle_keys(recipe: Recipe) -> None:
    """Raises UserError: the recipe gives a value to a key that has no effect here."""
    for key, why in idle_keys(recipe).items():
        raise UserError(
            f"the recipe gives {key}, which has no effect, as {why}: take it out, or give its default "
            f"{default_values(recipe).get(key, 'none')!r}"
        )


def check_ratios(recipe: Recipe) -> None:
    """Raises UserError: ratios for a flow whose positions are learned, which are for one square."""
    learned = recipe.flow.kind == "tarflow" or recipe.flow.rope is False
    if learned and recipe.data.aspects != ("1:1",):
        raise UserError(
            f"data.aspects is {', '.join(recipe.data.aspects)}, but this flow has learned positions, which are for "
            "squares alone: leave data.aspects out, or take a starflow with flow.rope"
        )


def check_changes(before: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    """Refuse to go on with results that the recipe no longer describes, or with changes that would do nothing.

    Args:
        before: the recipe of the run so far, as a dictionary.
        recipe: the one that it is to go on with.
        folder: of the run.

    Raises:
        UserError: see the module.
    """
    old, new = flat_keys(before), flat_keys(to_dict(recipe))
    default = default_values(recipe)  # of the keys that an older version did not write
    if not recipe.train.init_from:  # otherwise what a flow leaves open follows from another model
        default |= _flow_defaults(new)
    keys = [*new, *(key for key in old if key not in new and key.rpartition(".")[0] in default)]
    changed = [key for key in keys if _meant(old, key, default) != _meant(new, key, default)]
    stored = checkpoints(folder / "checkpoints")
    reached = int(stored[-1].name.removeprefix("step_")) if stored else 0
    if recipe.train.steps < reached:
        raise UserError(
            f"train.steps is {recipe.train.steps}, but {folder} has had {reached} updates: give at least as many, or "
            "choose another --output"
        )
    for key in changed:
        kind = kind_of_key(key)
        if kind in RESULTS:
            _check_stage(key, kind, folder)
        elif kind == "updates" and key.startswith("autoencoder."):
            if (folder / "autoencoder" / "model" / "config.json").is_file():
                _refuse(key, folder, ["autoencoder/model", *_results_from("latents", folder)])
        elif kind == "updates" and reached == recipe.train.steps and (folder / "model" / "config.json").is_file():
            raise UserError(
                f"{folder} has had its {reached} updates, so that another {key} would do nothing: give more "
                "--train.steps, choose another --output, or undo the change"
            )


def _flow_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the options of a recipe's flow are where it leaves them open and nothing but the defaults says so."""
    kind = values.get("flow.kind") or "starflow"
    known = {f"flow.{option.name}": option.default for option in fields(KINDS[kind]) if option.default is not MISSING}
    layers = values.get("flow.layers_per_block")
    if isinstance(layers, list):
        known["flow.num_blocks"] = len(layers)
    return {"flow.kind": kind, **known}


def _meant(values: Mapping[str, Any], key: str, default: Mapping[str, Any]) -> Any:
    """The value of a key; one that is left open is its default's."""
    found = values.get(key)
    return default.get(key) if found is None else found


def longest_warmup_text(recipe: Recipe) -> str:
    """A sentence about a warm-up that does not end before its stage does, else "".

    >>> from starflow.train.recipe import Recipe
    >>> longest_warmup_text(Recipe("mine", TrainSettings(steps=10, warmup=20, lr=0.5)))
    'train.warmup is 20 updates and train.steps 10: the learning rate never comes to 0.5'
    """
    stages = [("train", recipe.train)]
    if _has_autoencoder_stage(recipe):
        stages.append(("autoencoder.train", recipe.autoencoder.train))
    for name, settings in stages:
        if settings.warmup > settings.steps:
            return (
                f"{name}.warmup is {settings.warmup} updates and {name}.steps {settings.steps}: the learning rate "
                f"never comes to {settings.lr:g}"
            )
    return ""


def read_classes(folder: Path) -> tuple[str, ...]:
    """The names of a run's classes, in the order of their numbers.

    Raises:
        UserError: RUN/classes.json holds something else, or other names than latents or model were made with.
    """
    path = folder / "classes.json"
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is no list of names: delete it, and it is made again")
    for made in (folder / "latents" / "info.json", folder / "model" / "config.json"):
        values = read_json(made) if made.is_file() else {}
        stored = (values.get("conditioner") or {}).get("names", names) if isinstance(values, dict) else names
        if list(stored) != names:
            pairs = zip_longest(stored, names, fillvalue="none")
            number, (before, now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise UserError(
                f"{path} is not what {made.parent} was made with (class {number} was '{before}' and is '{now}'): undo "
                f"the change, choose another --output, or delete {', '.join(_results_from('latents', folder))} in "
                f"{folder}, which are then made again"
            )
    return tuple(names)


def _sections(key: str) -> list[str]:
    """A dotted key and the sections around it, innermost first."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _trains_autoencoder(recipe: Recipe) -> bool:
    coder = recipe.autoencoder
    return bool(coder.kind == "small" and (coder.joint or not coder.source))


def _has_autoencoder_stage(recipe: Recipe) -> bool:
    return _trains_autoencoder(recipe) and not recipe.autoencoder.joint


def results_of(stages: Iterable[str], folder: Path) -> list[Path]:
    """What some stages have left in a run's folder."""
    return [folder / name for stage in stages for name in RESULTS[stage] if (folder / name).exists()]


def _results_from(stage: str, folder: Path) -> list[str]:
    """What a stage and those after it have left in the folder."""
    stages = list(RESULTS)
    return [path.name for path in results_of(stages[stages.index(stage) :], folder)]


def _check_stage(key: str, stage: str, folder: Path) -> None:
    found = _results_from(stage, folder)
    if found:
        _refuse(key, folder, found if stage != "flow" else [])


def _refuse(key: str, folder: Path, results: list[str]) -> None:
    again = f", or delete {', '.join(results)} in it, which are then made again" if results else ""
    raise UserError(f"{folder} was started with another {key}: choose another --output, or undo the change{again}")
