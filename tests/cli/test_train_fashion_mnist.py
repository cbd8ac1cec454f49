"""The recipe of Fashion-MNIST on a handful of pictures: exact bits of 8-bit pixels, from the log to `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from starflow.flow.model import STARFlow
from starflow.pipeline.pipeline import StarFlowPipeline
from starflow.train.recipe import load_recipe
from starflow.train.run import read_log, start_run
from starflow.train.stages import train_flow
from tests.cli.conftest import Run
from tests.data.sets.test_small import write_set

RECIPE = Path(__file__).parents[2] / "recipes" / "fashion-mnist.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of two updates."""
    folder = tmp_path_factory.mktemp("fashion")
    write_set(folder, train=40, test=20)
    small = {"data.path": str(folder), "flow.channels": "64", "flow.num_blocks": "2", "flow.layers_per_block": "1"}
    steps = {"train.steps": "2", "train.batch": "8", "train.warmup": "1", "prompts": "[bag]"}
    train_flow(start_run(load_recipe(RECIPE, small | steps), folder / "run", torch.device("cpu"), progress=False))
    return folder


def test_the_pipeline_is_of_grey_8_bit_pixels(folder: Path) -> None:
    pipeline = StarFlowPipeline.from_pretrained(folder / "run" / "model")
    assert isinstance(pipeline.flow, STARFlow)
    assert (pipeline.config.noise, pipeline.config.cleaning, pipeline.config.noise_std) == ("uniform", "none", 0.0)
    assert pipeline.density_space == "8-bit pixels"
    assert pipeline.flow.config.in_channels == 1
    assert pipeline("bag").images[0].size == (28, 28)


def test_evaluate_gives_the_logs_bits(run: Run, folder: Path, tmp_path: Path) -> None:
    """Random pictures of 256 levels: no model gets under 8 bits, and a flow of two updates is well above."""
    words = ("evaluate", folder / "run" / "model", folder, "--output", tmp_path, "--bpd", "--draws", 3, "--classify")
    result = run(*words)
    assert result.code == 0, result.err
    assert "bits/dim of the 8-bit pixels" in result.out
    found = json.loads((tmp_path / "report.json").read_text())
    bits = found["likelihood"]["heldout"]
    assert (bits["dimensions"], bits["count"], bits["draws"]) == (784, 20, 3)
    logged = [line for line in read_log(folder / "run" / "log.jsonl") if "heldout_bits_per_dim" in line][-1]
    assert bits["bits_per_dim"] == pytest.approx(logged["heldout_bits_per_dim"], abs=6 * bits["error"] + 0.01)
    assert bits["bits_per_dim"] > 8
    steps = [line["bits_per_dim"] for line in read_log(folder / "run" / "log.jsonl") if "bits_per_dim" in line]
    assert steps[0] == pytest.approx(logged["heldout_bits_per_dim"], abs=1)  # of levels too, not 7 bits less
    assert sum(map(sum, found["classification"]["confusion"])) == 20
