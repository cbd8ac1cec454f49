"""A run's folder: what may change when a run goes on, and what may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starflow.errors import UserError
from starflow.io import files
from starflow.latents.small import SmallAutoencoderConfig
from starflow.train.distributed import World
from starflow.train.recipe import AutoencoderRecipe, DataRecipe, Recipe
from starflow.train.run import start_run
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
