"""The released YAML and the constructor's options describe the same model.

Published checkpoints load strictly, from every form they come in.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow import STARFlow, TarFlow, load_published
from starflow.errors import UserError
from starflow.flow.config import STARFlowConfig, TarFlowConfig, config_from_dict, preset
from starflow.io.files import write_tensors
from starflow.published.checkpoint import constructor_options, pipeline_options, read_published
from tests.registry import randomised

RELEASED: dict[str, Any] = {
    "img_size": 256, "channel_size": 4, "patch_size": 1, "channels": 3072, "blocks": 6,
    "layers_per_block": "2 2 2 2 2 24", "txt_size": 128, "rope": 1, "sos": 1, "nvp": 1, "use_softplus": 1,
    "cond_top_only": 1, "use_final_norm": 1, "adaln": 0, "seq_order": "L2R", "soft_clip": 4, "noise_std": 0.3,
    "vae": "stabilityai/sd-vae-ft-ema", "text": "google/flan-t5-xl", "cfg": 2.5, "drop_label": 0.1,
    "latent_norm_regularization": 1e-4, "no_flip": 1, "fsdp": 1, "fsdp_text_encoder": 1, "batch_size": 1024,
    "lr": 6.4e-5, "min_lr": 1e-6, "wds": 1, "sample_freq": 10, "gradient_checkpoint": 1,
}  # fmt: skip


def arguments(**changes: Any) -> dict[str, Any]:
    return {"arguments": [{key: value} for key, value in {**RELEASED, **changes}.items()]}


def test_the_released_yaml_is_the_released_model() -> None:
    options = constructor_options(arguments())
    assert config_from_dict({**options, "txt_dim": 2048}) == preset("starflow-t2i-3b").config


def test_what_is_around_the_model_is_told_apart() -> None:
    assert pipeline_options(arguments()) == {
        "noise_std": 0.3, "vae": "stabilityai/sd-vae-ft-ema", "text": "google/flan-t5-xl", "cfg": 2.5,
        "drop_label": 0.1, "latent_norm_regularization": 1e-4,
    }  # fmt: skip
    assert pipeline_options({"channels": 64}) == {}


def test_numbers_for_booleans_and_text_for_lists() -> None:
    options = constructor_options({"rope": 0, "layers_per_block": "1 2", "txt_size": 1})
    assert options == {"rope": False, "layers_per_block": [1, 2], "txt_size": 1}
    assert options["txt_size"] is not True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaln": 1}, "'adaln' is 1, but only models with adaln 0 are implemented"),
        ({"nvp": 0}, "'nvp' is 0, but only models with nvp 1 are implemented"),
        ({"chanels": 1}, "unknown key 'chanels': did you mean 'channels'?"),
        ({"vae": "someone/else"}, "'vae' is 'someone/else', whose factor is unknown"),
        ({"layers_per_block": "2 two"}, "layers_per_block is '2 two', expected numbers separated by spaces"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        constructor_options(arguments(**changes))
    with pytest.raises(UserError, match="'arguments' is a dict, expected a list of one-key maps"):
        constructor_options({"arguments": {"channels": 3}})


OPTIONS: dict[str, Any] = {
    "in_channels": 2, "img_size": 4, "patch_size": 1, "channels": 48, "head_dim": 24, "num_blocks": 2,
    "layers_per_block": [1, 2], "txt_size": 3, "txt_dim": 5, "sos": True, "rope": True,
}  # fmt: skip
PIXELS: dict[str, Any] = {
    "in_channels": 2, "img_size": 4, "patch_size": 2, "channels": 64, "num_blocks": 2, "layers_per_block": 1,
    "num_classes": 3,
}  # fmt: skip
X, CONDITION = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 5)


@pytest.fixture
def model() -> STARFlow:
    built = randomised(STARFlowConfig(**{**OPTIONS, "layers_per_block": (1, 2)}), 0)
    assert isinstance(built, STARFlow)
    return built


@pytest.fixture
def pixels() -> TarFlow:
    built = randomised(TarFlowConfig(**PIXELS), 0)
    assert isinstance(built, TarFlow)
    return built


def test_every_file_form_loads(model: STARFlow, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "new.pth")
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    expected, _ = model(X, CONDITION)
    for source in (model.state_dict(), tmp_path / "new.pth", str(tmp_path / "old.pth"), tmp_path / "model.safetensors"):
        loaded = load_published(source, OPTIONS)
        assert torch.equal(loaded(X, CONDITION)[0], expected)


def test_options_may_be_nested_and_say_their_kind(model: STARFlow, pixels: TarFlow) -> None:
    case = {"kind": "starflow", "config": OPTIONS, "latent_hw": [4, 4], "batch": 2}
    assert load_published(model.state_dict(), case).config == model.config
    assert load_published(model.state_dict(), {"kind": "starflow", **OPTIONS}).config == model.config
    assert load_published(pixels.state_dict(), {"kind": "tarflow", **PIXELS}).config == pixels.config


def test_widths_that_are_not_given_are_the_checkpoints(pixels: TarFlow) -> None:
    gated = randomised(
        STARFlowConfig(**{**OPTIONS, "layers_per_block": (1, 2)}, use_swiglu=True, mlp_hidden=(40, 56)), 0
    )
    given = {key: value for key, value in {**OPTIONS, "use_swiglu": True}.items() if key != "txt_dim"}
    loaded = load_published(gated.state_dict(), given)
    assert loaded.config == gated.config
    given = {key: value for key, value in PIXELS.items() if key != "num_classes"}
    assert load_published(pixels.state_dict(), {"kind": "tarflow", **given}).config == pixels.config


def test_a_state_dict_is_copied(model: STARFlow) -> None:
    state = model.state_dict()
    loaded = load_published(state, OPTIONS)
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    assert not torch.equal(next(loaded.parameters()), next(model.parameters()))


def test_keys_that_carry_nothing_are_ignored_and_listed(model: STARFlow) -> None:
    extra = {"var": torch.ones(16, 2), "blocks.0.attn_mask": torch.ones(16, 16), "feat_rope.freqs": torch.ones(3)}
    published = read_published({**model.state_dict(), **extra}, OPTIONS)
    assert published.ignored == list(extra)
    assert torch.equal(published.model(X, CONDITION)[0], model(X, CONDITION)[0])


def test_tarflows_variance_is_heeded_and_one_where_it_is_missing(pixels: TarFlow) -> None:
    state, options = pixels.state_dict(), {"kind": "tarflow", **PIXELS}
    without = {key: tensor for key, tensor in state.items() if key != "var"}
    published = read_published({**without, "blocks.1.attn_mask": torch.ones(4, 4)}, options)
    assert published.ignored == ["blocks.1.attn_mask"]
    assert torch.equal(published.model(X)[0], pixels(X)[0])
    halved = load_published({**without, "var": torch.full((4, 8), 4.0)}, options)
    torch.testing.assert_close(halved(X)[0], pixels(X)[0] / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.proj_txt.bias"), "1 missing: blocks.1.proj_txt.bias"),
        (lambda state: state.update({"blocks.0.extra": torch.ones(1)}), "1 unexpected: blocks.0.extra"),
        (
            lambda state: state.update({"learnable_self_denoiser.0.weight": torch.ones(1)}),
            "the state dict is a video model (it has learnable_self_denoiser.*)",
        ),
        (
            lambda state: state.update({"blocks.0.proj_in.bias": torch.ones(7)}),
            "1 other shapes: blocks.0.proj_in.bias (7,) instead of (48,)",
        ),
    ],
)
def test_what_does_not_fit_is_listed(model: STARFlow, change: Any, message: str) -> None:
    state: dict[str, Tensor] = dict(model.state_dict())
    change(state)
    with pytest.raises(UserError, match=re.escape(message)):
        load_published(state, OPTIONS)


def test_an_unknown_option_names_the_nearest(model: STARFlow) -> None:
    with pytest.raises(UserError, match="unknown key 'soft_clipp': did you mean 'soft_clip'"):
        load_published(model.state_dict(), {**OPTIONS, "soft_clipp": 4})


def test_files_that_are_none_are_named(model: STARFlow, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(model.state_dict(), whole)
    truncated, text, code, nested = (tmp_path / f"{name}.pth" for name in ("truncated", "text", "code", "nested"))
    truncated.write_bytes(whole.read_bytes()[:-200])
    text.write_text("no checkpoint")
    torch.save(Path("/"), code)
    torch.save({"model": model.state_dict()}, nested)
    for path in (truncated, text, code):
        with pytest.raises(UserError, match=re.escape(f"{path} is not a whole checkpoint of tensors")):
            load_published(path, OPTIONS)
    with pytest.raises(UserError, match=re.escape(f"{nested} holds a dict with other things than tensors")):
        load_published(nested, OPTIONS)
    with pytest.raises(UserError, match="no such file"):
        load_published(tmp_path / "absent.pth", OPTIONS)


def test_a_wrappers_prefix_says_nothing(model: STARFlow) -> None:
    """torch's DistributedDataParallel saves every key with "module." before it."""
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    loaded = load_published(state, OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_weights_that_are_not_finite_are_named(model: STARFlow) -> None:
    state = dict(model.state_dict())
    state["blocks.1.proj_out.bias"] = torch.full_like(state["blocks.1.proj_out.bias"], math.nan)
    count = state["blocks.1.proj_out.bias"].numel()
    with pytest.raises(UserError, match=rf"'blocks.1.proj_out.bias' of .* holds {count} of {count} values"):
        load_published(state, OPTIONS)


def test_options_may_be_a_file(model: STARFlow, tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps(OPTIONS))
    loaded = load_published(model.state_dict(), path)
    assert loaded.config == load_published(model.state_dict(), OPTIONS).config
