"""A run's folder: what may change when a run goes on, and what may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig
from starflow.flow.model import STARFlow
from starflow.io import files
from starflow.latents.small import SmallAutoencoderConfig
from starflow.train.distributed import World
from starflow.train.recipe import AutoencoderRecipe, DataRecipe, Recipe
from starflow.train.run import SHARE_OF_PRODUCT, Run, expected_time, start_run, training_flops
from starflow.train.settings import TrainSettings

RECIPE = Recipe("r", TrainSettings(steps=3, warmup=1), data=DataRecipe(source="shapes", shapes=20))
CPU = torch.device("cpu")


def test_only_the_main_process_writes_and_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(RECIPE, tmp_path / "second", CPU, world=World(rank=1, size=2)).notify("from the second")
    assert not (tmp_path / "second" / "recipe.json").exists()
    start_run(RECIPE, tmp_path / "first", CPU, world=World(rank=0, size=2)).notify("from the first")
    start_run(RECIPE, tmp_path / "first", CPU, progress=False).notify("unheard")
    assert (tmp_path / "first" / "recipe.json").is_file()
    printed = capsys.readouterr()
    assert printed.out + printed.err == "from the first\n"


def test_longer_training_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    start_run(RECIPE, tmp_path, CPU)
    longer = AutoencoderRecipe(train=TrainSettings(steps=9000))
    start_run(replace(RECIPE, train=TrainSettings(steps=10), autoencoder=longer, guidance=4.0), tmp_path, CPU)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (replace(RECIPE, data=DataRecipe(source="shapes", shapes=21)), "data.shapes"),
        (
            replace(RECIPE, autoencoder=AutoencoderRecipe(model=SmallAutoencoderConfig(channels=5))),
            "autoencoder.model.channels",
        ),
        (replace(RECIPE, autoencoder=AutoencoderRecipe(noise_max=0.5)), "autoencoder.noise_max"),
    ],
)
def test_results_of_another_recipe_are_not_reused(tmp_path: Path, changed: Recipe, named: str) -> None:
    start_run(RECIPE, tmp_path, CPU)
    for result in ("views.safetensors", "autoencoder"):
        (tmp_path / result).mkdir()
    with pytest.raises(UserError, match=f"was started with another {named}: choose another --output"):
        start_run(changed, tmp_path, CPU)
    start_run(RECIPE, tmp_path, CPU)  # the refused recipe left nothing behind


def test_a_second_training_in_a_folder_is_refused_before_it_writes(tmp_path: Path) -> None:
    start_run(RECIPE, tmp_path, CPU)
    before = (tmp_path / "recipe.json").read_bytes()
    with files.folder_lock(tmp_path), pytest.raises(UserError, match="another process writes to"):
        start_run(replace(RECIPE, guidance=9.0), tmp_path, CPU)
    assert (tmp_path / "recipe.json").read_bytes() == before


def test_the_time_of_missing_stages_is_in_proportion_to_their_updates(tmp_path: Path) -> None:
    flow = STARFlowConfig(in_channels=4, img_size=4, channels=64, num_blocks=2, layers_per_block=1)

    def said(steps: int, coder: AutoencoderRecipe, folder: Path = tmp_path, processes: int = 1) -> str:
        recipe = replace(RECIPE, train=TrainSettings(steps=steps, batch=32), autoencoder=coder)
        return expected_time(Run(recipe, folder, CPU, world=World(size=processes)), flow, rate=1e12)

    hours = 32 * 3600 * 1e12 * SHARE_OF_PRODUCT / training_flops(STARFlow(flow)) / 32
    given = AutoencoderRecipe(source="glyphs")
    assert said(round(7 * hours / 32), given) == "time expected here: flow about 7 h"
    assert said(round(14 * hours / 32), given, processes=2) == "time expected here: flow about 7 h"
    own = AutoencoderRecipe(train=TrainSettings(steps=10**6))
    twice = AutoencoderRecipe(train=TrainSettings(steps=2 * 10**6))
    first, second = (int(said(9, one).split("autoencoder about ")[1].split(" h")[0]) for one in (own, twice))
    assert second == pytest.approx(2 * first, abs=1)
    joint = said(round(hours), replace(own, joint=True))
    assert "autoencoder" not in joint
    assert int(joint.split("about ")[1].split(" h")[0]) > 32
    files.write_json(tmp_path / "autoencoder" / "model" / "config.json", {})
    files.write_json(tmp_path / "checkpoints" / "step_00000009" / "index.json", {})
    assert said(9, own) == ""
    assert said(10, own) == "time expected here: flow about 1 min"
