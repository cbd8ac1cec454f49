"""The two dialects of published configurations, read into our options.

The constructor's dialect has our names. The released YAML is a list `arguments:` of one-key maps with some
other names, numbers for booleans, the picture's side in pixels, and the settings of its training run, which are known
by name, and passed over. Any other name is an error in either dialect.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from starflow.config import unknown_key
from starflow.errors import UserError
from starflow.model_config import KINDS

_RENAMED = {"channel_size": "in_channels", "blocks": "num_blocks"}
_SAME = ("patch_size", "channels", "layers_per_block", "txt_size", "rope", "sos", "use_softplus", "cond_top_only",
         "use_final_norm", "seq_order", "soft_clip")  # fmt: skip
_MUST_BE = {"nvp": 1, "adaln": 0}
_OF_TRAINING = ("drop_label", "latent_norm_regularization")
_AROUND = ("noise_std", "vae", "text", "cfg", *_OF_TRAINING)
_OF_A_RUN = ("no_flip", "fsdp", "fsdp_text_encoder", "batch_size", "lr", "min_lr", "wds", "sample_freq",
             "gradient_checkpoint")  # fmt: skip
SD_VAES = {"stabilityai/sd-vae-ft-ema": 8, "stabilityai/sd-vae-ft-mse": 8}


def constructor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the constructor's names, `kind` among them, from either dialect or from {"kind", "config"}.

    Settings of a training run and what is around the model are left out; `config_from_dict` refuses what is unknown.

    Raises:
        UserError: an option of the YAML dialect that is unknown, or that this implementation does not have.
    """
    if "arguments" in options:
        values = _from_arguments(_merged(options))
    else:
        flat = _flat(options)
        values = {key: value for key, value in flat.items() if key not in (*_AROUND, *_OF_A_RUN)}
    return {key: _plain(values.get("kind", "starflow"), key, value) for key, value in values.items()}


def around_the_model(options: Mapping[str, Any]) -> dict[str, Any]:
    """What options say of autoencoder, text encoder, noise and guidance: noise_std, vae, text, cfg, .."""
    merged = _merged(options) if "arguments" in options else _flat(options)
    return {key: merged[key] for key in _AROUND if key in merged}


def ignored_options(options: Mapping[str, Any]) -> list[str]:
    """Options that are of a training run: known, and without a meaning for the model."""
    merged = _merged(options) if "arguments" in options else _flat(options)
    return [key for key in merged if key in (*_OF_TRAINING, *_OF_A_RUN)]


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's dialect on one level."""
    inner = options.get("config")
    if isinstance(inner, Mapping):
        return {"kind": options.get("kind", "starflow"), **inner}
    return dict(options)


def _merged(options: Mapping[str, Any]) -> dict[str, Any]:
    """The list of the YAML dialect as one mapping."""
    arguments = options["arguments"]
    if not isinstance(arguments, list) or not all(isinstance(item, Mapping) for item in arguments):
        raise UserError(f"'arguments' is a {type(arguments).__name__}, expected a list of one-key maps")
    if beside := [key for key in options if key != "arguments"]:
        raise UserError(f"unknown key '{beside[0]}' beside 'arguments': put it into that list, or remove it")
    merged: dict[str, Any] = {}
    for key, value in ((key, value) for item in arguments for key, value in item.items()):
        if merged.setdefault(key, value) != value:
            raise UserError(f"'{key}' is given twice, as {merged[key]} and as {value}: keep one")
    return merged


def _from_arguments(merged: Mapping[str, Any]) -> dict[str, Any]:
    known = [*_RENAMED, *_SAME, *_MUST_BE, *_AROUND, *_OF_A_RUN, "img_size"]
    for key, value in merged.items():
        if key not in known:
            raise UserError(unknown_key(key, key, known))
        if key in _MUST_BE and value != _MUST_BE[key]:
            raise UserError(f"'{key}' is {value}, but only models with {key} {_MUST_BE[key]} are implemented")
    values = {_RENAMED.get(key, key): value for key, value in merged.items() if key in _RENAMED or key in _SAME}
    if "img_size" in merged:
        values["img_size"] = _latent_side(merged["img_size"], _factor(merged.get("vae")))
    return values


def _latent_side(pixels: Any, factor: int) -> int:
    """Side of the flow's input for pictures of that side."""
    if not isinstance(pixels, int) or pixels % factor:
        raise UserError(f"img_size is {pixels!r} pixels, expected a multiple of the autoencoder's factor {factor}")
    return pixels // factor


def _factor(vae: str | None) -> int:
    """Pixels a latent of an autoencoder stands for, along a side."""
    if vae is not None and vae not in SD_VAES:
        raise UserError(
            f"'vae' is {vae!r}, whose factor is unknown: give img_size of the latent by constructor options"
        )
    return 1 if vae is None else SD_VAES[vae]


def _plain(kind: Any, key: str, value: Any) -> Any:
    """Numbers for booleans and text for lists, as published configurations have them."""
    hints = typing.get_type_hints(KINDS[kind]) if kind in KINDS else {}
    if hints.get(key) is bool and value in (0, 1):
        return bool(value)
    if key == "layers_per_block" and isinstance(value, str):
        try:
            return [int(number) for number in value.split()]
        except ValueError:
            raise UserError(f"layers_per_block is {value!r}, expected numbers separated by spaces") from None
    return value
