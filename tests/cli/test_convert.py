"""`starflow convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from starflow import STARFlow
from tests.checkpoints import DEPRECATED, arguments, model, write_checkpoint
from tests.cli.conftest import Run, fails


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and its options as YAML."""
    options = tmp_path / "options.yaml"
    options.write_text(yaml.safe_dump(arguments()))
    return write_checkpoint(tmp_path), options


def test_what_is_written_and_what_is_ignored_are_said(run: Run, given: tuple[Path, Path], tmp_path: Path) -> None:
    file, options = given
    done = run("convert", file, "--options", options, "--output", tmp_path / "model")
    assert done.code == 0
    assert f"ignored keys, which carry nothing: {', '.join(DEPRECATED)}" in done.out
    assert "of the training run: drop_label, latent_norm_regularization, no_flip, fsdp, lr, wds" in done.out
    assert f"starflow generate --model {tmp_path / 'model'}" in done.out
    whole = run("convert", file, "--options", options, "--output", tmp_path / "nine", "--aspects", "all")
    assert whole.code == 0
    assert len(json.loads(run("info", tmp_path / "nine", "--json").out)["trained_sizes"]) > 3
    facts = json.loads(run("info", tmp_path / "model", "--json", "--verify").out)
    assert facts["flow"]["parameters"] == sum(one.numel() for one in model().parameters())
    assert facts["files"]["without_a_digest"] == []
    assert facts["files"]["verified"] == 1


def test_json_and_precision(run: Run, given: tuple[Path, Path], tmp_path: Path) -> None:
    file, _ = given
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"in_channels": 4, "img_size": 4, "channels": 64, "num_blocks": 2,
                                   "layers_per_block": [1, 2], "txt_size": 8}))  # fmt: skip
    done = run("convert", file, "--options", options, "--output", tmp_path / "flow", "--dtype", "float32", "--json")
    facts = json.loads(done.out)
    assert (facts["whole"], facts["dtype"], facts["ignored_keys"]) == (False, "float32", list(DEPRECATED))
    flow = STARFlow.from_pretrained(tmp_path / "flow")
    assert facts["bytes"] == sum(one.nbytes for one in flow.parameters())


def test_bad_input(run: Run, given: tuple[Path, Path], tmp_path: Path) -> None:
    file, options = given
    into = ("--output", tmp_path / "model")
    fails(run("convert", tmp_path / "absent.pth", "--options", options, *into), "no such file", "absent.pth")
    fails(run("convert", file, "--options", tmp_path / "absent.yaml", *into), "no such file", "absent.yaml")
    fails(run("convert", file, "--options", options, *into, "--dtype", "int4"), "--dtype is 'int4'")
    fails(run("convert", file, "--options", options, *into, "--noise-std", "-1"), "--noise-std is -1")
    fails(run("convert", file, "--options", options, *into, "--aspects", "1:1,7:5"), "--aspects names '7:5', expected")
    options.write_text(yaml.safe_dump(arguments(chanels=3)))
    fails(run("convert", file, "--options", options, *into), "unknown key 'chanels': did you mean 'channels'?")
    options.write_text("- a list")
    fails(run("convert", file, "--options", options, *into), "holds a list, expected a mapping")
    fails(run("convert", file, *into), "options")
