"""A flow as a folder: what is saved is what loads, wherever it lies, and whatever differs is listed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starflow.errors import UserError
from starflow.flow import checkpoint
from starflow.flow.config import STARFlowConfig, TarFlowConfig
from starflow.flow.model import STARFlow, TarFlow, build
from tests.flow.test_model import CONDITION, PIXELS, SMALL, X
from tests.registry import randomised


@pytest.mark.parametrize("config", [SMALL, PIXELS])
def test_what_is_saved_is_what_loads(config: STARFlowConfig | TarFlowConfig, tmp_path: Path) -> None:
    model, condition = randomised(config, 0), CONDITION if config is SMALL else torch.tensor([0, 2])
    if isinstance(model, TarFlow):
        model.var.uniform_(0.5, 2.0)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "checksums.json",
        "config.json",
        "model.safetensors",
    ]
    assert loaded.config == config
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for ours, saved in zip(loaded(X, condition), model(X, condition), strict=True):
        assert torch.equal(ours, saved)
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert type(model).from_pretrained(tmp_path / "half").network_dtype == torch.bfloat16


def saved(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A saved model's folder, and its tensors to damage."""
    model = build(SMALL)
    model.save_pretrained(folder)
    return folder, dict(model.state_dict())


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    (folder / "checksums.json").unlink(missing_ok=True)  # else the other size is what is reported


def test_missing_and_unexpected_keys_are_listed(tmp_path: Path) -> None:
    folder, tensors = saved(tmp_path)
    tensors["blocks.0.surprise"] = tensors.pop("blocks.1.proj_txt.bias")
    rewrite(folder, tensors)
    with pytest.raises(UserError, match=r"1 missing: blocks\.1\.proj_txt\.bias; 1 unexpected: blocks\.0\.surprise"):
        STARFlow.from_pretrained(folder)
    rewrite(folder, {})
    with pytest.raises(UserError, match=r"\d+ missing: blocks\.0\.sos_embed, .* and \d+ more"):
        STARFlow.from_pretrained(folder)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    folder, tensors = saved(tmp_path)
    tensors["blocks.1.proj_txt.weight"] = torch.zeros(48, 6)
    rewrite(folder, tensors)
    expected = "1 other shapes: blocks.1.proj_txt.weight (48, 6) instead of (48, 5)"
    with pytest.raises(UserError, match=re.escape(expected)):
        STARFlow.from_pretrained(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=re.escape(f"{weights} is not a whole safetensors file")):
        STARFlow.from_pretrained(folder)


def test_another_kind_and_unknown_options_are_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    with pytest.raises(UserError, match="holds a STARFlow, expected a TarFlow"):
        TarFlow.from_pretrained(folder)
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**options, "use_softpluss": True}))
    with pytest.raises(UserError, match="unknown key 'use_softpluss': did you mean 'use_softplus'"):
        STARFlow.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list, expected a mapping of options"):
        STARFlow.from_pretrained(folder)


@pytest.mark.parametrize("inner", ["", "flow", "model/flow"])
def test_a_flow_is_found_in_its_folder_a_pipelines_and_a_runs(inner: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "saved")
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole / inner)
    if inner == "flow":
        (whole / "config.json").write_text("{}")  # the pipeline's own
    assert checkpoint.find(whole) == whole / inner
    assert STARFlow.from_pretrained(whole).config == SMALL


def test_a_policy_goes_along_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    model = build(SMALL)
    model.save_pretrained(tmp_path / "without")
    assert STARFlow.from_pretrained(tmp_path / "without").policy is None
    model.policy = {"any": ["thing"]}
    model.save_pretrained(tmp_path / "with")
    assert STARFlow.from_pretrained(tmp_path / "with").policy == {"any": ["thing"]}
    (tmp_path / "with" / "policy.json").write_text("[]")
    with pytest.raises(UserError, match=r"policy\.json holds a list, expected a mapping"):
        STARFlow.from_pretrained(tmp_path / "with")
