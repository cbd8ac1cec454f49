"""The released YAML and the constructor's options describe the same model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from starflow.errors import UserError
from starflow.model_config import config_from_dict
from starflow.presets import preset
from starflow.weights.dialects import around_the_model, constructor_options

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
    assert around_the_model(arguments()) == {
        "noise_std": 0.3, "vae": "stabilityai/sd-vae-ft-ema", "text": "google/flan-t5-xl", "cfg": 2.5,
        "drop_label": 0.1, "latent_norm_regularization": 1e-4,
    }  # fmt: skip
    assert around_the_model({"channels": 64}) == {}


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
