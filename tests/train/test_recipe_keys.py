"""Every key of a recipe may change, needs its stage again, is refused, or has no effect, which is an error."""

from __future__ import annotations

import copy
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.config import from_dict, read_mapping, to_dict
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.io.files import write_json
from starflow.train.recipe import DataRecipe, FlowRecipe, Recipe, load_recipe
from starflow.train.recipe_keys import (
    KEYS,
    check_changes,
    check_idle_keys,
    flat_keys,
    kind_of_key,
    longest_warmup_text,
    read_classes,
)
from starflow.train.run import start_run
from starflow.train.settings import TrainSettings
from starflow.train.tasks.density import is_density_recipe

RECIPE = Recipe("r", TrainSettings(steps=90))
ALL = sorted(flat_keys(to_dict(RECIPE)))
FREE = {
    *("name", "prompts", "guidance", "temperature", "candidates", "data.latents", "data.window", "data.workers"),
    *(
        f"{stage}.{key}"
        for stage in ("train", "autoencoder.train")
        for key in ("compile", "evaluate_every", "evaluate_pictures", "sample_every", "checkpoint_every")
    ),
    *(f"{stage}.{key}" for stage in ("train", "autoencoder.train") for key in ("peak_tflops", "wandb")),
    *(key for key in ALL if ".parallel." in key),
}
UPDATES = {"objective.drop_condition", "objective.latent_penalty"} | {
    key for key in ALL if "train." in key and not key.endswith((".seed", ".init_from")) and key not in FREE
}


def finished(folder: Path, step: int = 90) -> Path:
    """A folder as a finished run leaves it, as far as the check of changes looks."""
    for part in ("index", "latents", "best", f"checkpoints/step_{step:08d}"):
        (folder / part).mkdir(parents=True)
    for part in ("model", "autoencoder/model", f"checkpoints/step_{step:08d}"):
        write_json(folder / part / "config.json", {})
    write_json(folder / f"checkpoints/step_{step:08d}" / "index.json", {})
    return folder


def changed(key: str) -> dict[str, Any]:
    """The recipe as it was before, when only that key had another value."""
    values = to_dict(RECIPE)
    *sections, last = key.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[last] = "another"
    return values


@pytest.mark.parametrize("key", ALL)
def test_a_finished_run_goes_on_only_with_what_fits_its_results(tmp_path: Path, key: str) -> None:
    folder = finished(tmp_path)
    if key in FREE:
        check_changes(changed(key), RECIPE, folder)
        return
    expected = f"another {key}"
    with pytest.raises(UserError, match=expected) as refused:
        check_changes(changed(key), RECIPE, folder)
    offered = "which are then made again" in str(refused.value)
    assert offered == key.startswith(("data.", "autoencoder.", "conditioning."))
    assert "\n" not in str(refused.value)
    assert "another --output" in str(refused.value)


def test_an_entry_of_a_mapping_that_comes_goes_or_changes_is_a_change(tmp_path: Path) -> None:
    folder, key = finished(tmp_path), "data.views.group_views"
    plain, counted, other = ({**to_dict(RECIPE), "data": {**to_dict(RECIPE)["data"]}} for _ in range(3))
    for values, groups in ((plain, {}), (counted, {"emoji": 4}), (other, {"emoji": 5})):
        values["data"]["views"] = {**values["data"]["views"], "group_views": groups}
    for before, after in ((plain, counted), (counted, plain), (counted, other)):
        with pytest.raises(UserError, match=f"another {key}"):
            check_changes(before, from_dict(Recipe, after), folder)
    check_changes(counted, from_dict(Recipe, counted), folder)


def test_a_default_of_the_flow_that_is_written_out_is_no_change(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    for kind, known, layers in (("starflow", STARFlowConfig, (1, 2)), ("tarflow", TarFlowConfig, (1, 2))):
        defaults = {one.name: one.default for one in fields(known) if one.default is not MISSING}
        left_open = replace(RECIPE, flow=FlowRecipe("tarflow" if kind == "tarflow" else None, layers_per_block=layers))
        said = {**defaults, "kind": kind, "layers_per_block": layers, "num_blocks": 2}
        written = replace(RECIPE, flow=FlowRecipe(**said))
        check_changes(to_dict(left_open), written, folder)
        check_changes(to_dict(written), left_open, folder)
        for key, value in (("num_blocks", 3), ("head_dim", 2 * defaults["head_dim"])):
            with pytest.raises(UserError, match=f"another flow.{key}"):
                check_changes(to_dict(left_open), replace(RECIPE, flow=FlowRecipe(**{**said, key: value})), folder)
    going_on = replace(RECIPE, train=replace(RECIPE.train, init_from="glyphs"))
    with pytest.raises(UserError, match="another flow.head_dim"):  # it may be another model's
        check_changes(to_dict(going_on), replace(going_on, flow=FlowRecipe(head_dim=64)), folder)


def test_classes_that_were_changed_are_not_taken_for_those_of_the_results(tmp_path: Path) -> None:
    write_json(tmp_path / "classes.json", ["cat", "dog"])
    assert read_classes(tmp_path) == ("cat", "dog")
    for made in ("latents/info.json", "model/config.json"):
        (tmp_path / made).parent.mkdir()
        for conditioner in (None, {"kind": "class", "names": ["cat", "dog"]}):
            write_json(tmp_path / made, {"conditioner": conditioner})
            assert read_classes(tmp_path) == ("cat", "dog")
        for names, said in (
            (["dog", "cat"], "class 0 was 'dog' and is 'cat'"),
            (["cat"], "class 1 was 'none' and is 'd"),
        ):
            write_json(tmp_path / made, {"conditioner": {"kind": "class", "names": names}})
            with pytest.raises(
                UserError, match=rf"classes.json is not what .* was made with \({said}.*or delete latents"
            ):
                read_classes(tmp_path)
        write_json(tmp_path / made, {"conditioner": {"kind": "class", "names": ["cat", "dog"]}})
    write_json(tmp_path / "classes.json", {"cat": 1})
    with pytest.raises(UserError, match="is no list of names: delete it"):
        read_classes(tmp_path)


@pytest.mark.parametrize("flow", [FlowRecipe("tarflow"), FlowRecipe(rope=False)])
def test_learned_positions_are_for_squares(tmp_path: Path, flow: FlowRecipe) -> None:
    data = DataRecipe(path=str(tmp_path), aspects=("16:9",))
    with pytest.raises(UserError, match="data.aspects is 16:9, but this flow has learned positions, which are for sq"):
        start_run(replace(RECIPE, flow=flow, data=data), tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run").exists()
    start_run(replace(RECIPE, data=data), tmp_path / "run", torch.device("cpu"), progress=False)


def test_before_a_stage_has_results_every_key_may_change(tmp_path: Path) -> None:
    for key in ALL:
        check_changes(changed(key), RECIPE, tmp_path)


def test_updates_to_come_may_be_made_otherwise(tmp_path: Path) -> None:
    folder = finished(tmp_path, step=40)
    (folder / "autoencoder" / "model" / "config.json").unlink()
    for key in UPDATES:
        check_changes(changed(key), RECIPE, folder)


def test_every_entry_of_the_table_is_a_key() -> None:
    assert all(any(key == name or key.startswith(f"{name}.") for key in ALL) for name in KEYS)
    assert {kind_of_key(key) for key in ALL} == {"free", "updates", "data", "autoencoder", "latents", "flow"}


def test_what_is_to_be_deleted_is_named(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    with pytest.raises(UserError, match="delete autoencoder/model, latents, checkpoints, best, model in it"):
        check_changes(changed("autoencoder.train.steps"), RECIPE, folder)
    with pytest.raises(UserError, match="delete index, autoencoder, latents, checkpoints, best, model in it"):
        check_changes(changed("data.heldout"), RECIPE, folder)


def test_fewer_updates_than_a_run_has_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.steps is 90, but .* has had 91 updates"):
        check_changes(to_dict(RECIPE), RECIPE, finished(tmp_path, step=91))


IDLE: dict[str, tuple[dict[str, Any], Any]] = {
    "data.shapes": ({}, 9),
    "data.path": ({"data": {"source": "shapes"}}, "photos"),
    "data.heldout": ({"data": {"source": "shapes"}}, 0.2),
    "data.views.hue": ({}, 0.1),
    "data.views.views": ({"data": {"source": "shapes"}}, 2),
    "data.views.seed": ({"data": {"source": "fashion-mnist"}}, 2),
    "autoencoder.source": ({"autoencoder": {"joint": True}}, "glyphs"),
    "autoencoder.channels": ({}, 16),
    "autoencoder.model.channels": ({"autoencoder": {"source": "glyphs"}}, 3),
    "autoencoder.loss.squared": ({"autoencoder": {"kind": "pixels"}}, 3.0),
    "autoencoder.noise_max": ({"autoencoder": {"source": "glyphs"}}, 3.0),
    "autoencoder.noise_min": ({"autoencoder": {"joint": True}}, 0.2),
    "autoencoder.train.steps": ({"autoencoder": {"joint": True}}, 2),
    "autoencoder.train.lr": ({"autoencoder": {"source": "glyphs", "train": {"steps": 1000}}}, 0.1),
    "autoencoder.train.parallel.layout": ({"autoencoder": {"train": {"steps": 1000}}}, "sharded"),
    "autoencoder.train.decay": ({"autoencoder": {"train": {"steps": 1000}}}, 0.1),
    "autoencoder.flow_weight": ({}, 0.1),
    "conditioning.encoder": ({"conditioning": {"kind": "class"}}, "mine"),
    "conditioning.tokens": ({"conditioning": {"kind": "none"}}, 4),
    "prompts": ({"conditioning": {"kind": "none"}}, ["a cat"]),
    "objective.noise_std": ({"objective": {"noise": "uniform"}}, 0.1),
    "train.decay": ({}, 0.1),
    "train.parallel.shard_size": ({}, 2),
}


@pytest.mark.parametrize("key", sorted(IDLE))
def test_a_key_without_effect_is_an_error_before_anything_is_written(tmp_path: Path, key: str) -> None:
    where, value = copy.deepcopy(IDLE[key])
    values: dict[str, Any] = {"name": "r", "train": {"steps": 90}} | where
    check_idle_keys(from_dict(Recipe, values))
    *sections, last = key.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    with pytest.raises(UserError, match=f"the recipe gives {key}, which has no effect, as "):
        start_run(from_dict(Recipe, values), tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run").exists()


def test_our_recipes_have_no_idle_keys() -> None:
    for path in sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml")):
        if "teacher" in read_mapping(path) or is_density_recipe(path, {}):
            continue  # a student's, a denoiser's and a density's are other tables
        check_idle_keys(load_recipe(path))


def test_what_a_switch_on_the_command_line_leaves_idle_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{name: r, train: {steps: 9}, data: {source: shapes, shapes: 7}, autoencoder: {noise_max: 0.2}}")
    with pytest.warns(UserWarning, match=r"leave data\.shapes, autoencoder\.noise_max without effect: left out"):
        recipe = load_recipe(path, {"data.source": "folder", "autoencoder.joint": "true"})
    check_idle_keys(recipe)
    with pytest.warns(UserWarning, match="leave autoencoder.noise_max without"):
        together = load_recipe(path, {"autoencoder.joint": "true", "autoencoder.noise_min": "0.05"})
    with pytest.raises(UserError, match=r"autoencoder\.noise_min"):
        check_idle_keys(together)


def test_a_warm_up_longer_than_its_stage_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(Recipe("r", TrainSettings(steps=3, warmup=4)), tmp_path, torch.device("cpu"))
    printed = capsys.readouterr()
    assert "warning: train.warmup is 4 updates and train.steps 3" in printed.out + printed.err
    assert longest_warmup_text(Recipe("r", TrainSettings(steps=4, warmup=4))) == ""
