"""The two dialects of published configurations, read into our options.

The constructor's dialect has our names. The released YAML is a list `arguments:` of one-key maps with some
other names, numbers for booleans, the picture's side in pixels, and the settings of its training run, which are known
by name, and passed over. Any other name is an error in either dialect.

Published checkpoints: a flat state dict (`.pth`, safetensors or a dictionary) and its options.

Contract: parameter names are the published ones, so nothing is renamed; every key is loaded, or known to
carry nothing, or an error that lists it. A `.pth` is read with weights_only=True and nothing else.
"""

from __future__ import annotations

import pickle
import re
import typing
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow.config import unknown_key_message
from starflow.errors import UserError
from starflow.flow import checkpoint
from starflow.flow.config import KINDS, ModelConfig, TarFlowConfig, config_from_dict
from starflow.flow.model import STARFlow, TarFlow, build
from starflow.io import files

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


def pipeline_options(options: Mapping[str, Any]) -> dict[str, Any]:
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
            raise UserError(unknown_key_message(key, key, known))
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


_CARRY_NOTHING = re.compile(r"blocks\.\d+\.attn_mask|feat_rope\..*")  # recomputed from the options

_OF_VIDEO = "learnable_self_denoiser."


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A loaded checkpoint."""

    model: STARFlow | TarFlow
    ignored: list[str]
    """Keys that were there and carry nothing."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose keys and shapes have been compared with its options; of a file, nothing is read yet."""

    name: str
    """The file's, for messages."""
    config: ModelConfig
    tensors: dict[str, Tensor]
    """Those of the model, by its own names and in its order."""
    ignored: list[str]
    """Keys that are there and carry nothing."""
    added: tuple[str, ...] = ()
    """Tensors that are not in it, as they have one value only."""
    mapped: bool = False
    """Whether the others lie in a file rather than in memory."""


def load_published(source: Mapping[str, Tensor] | str | Path, options: Mapping[str, Any]) -> STARFlow | TarFlow:
    """The model of a published checkpoint, on the CPU, in the checkpoint's precision.

    Args:
        source: a state dict (copied), or the path of a `.pth` or `.safetensors` file.
        options: the published configuration, by the constructor's names with "kind" "starflow" (the default)
            or "tarflow"; also nested, as {"kind": .., "config": {..}}, or in the released YAML's dialect,
            {"arguments": [..]}. `txt_dim`, `num_classes` and hidden widths that are not given are the checkpoint's.

    Raises:
        UserError: no such or a damaged file, an unknown option, missing or unexpected keys, other shapes.
    """
    return read_published(source, options).model


def read_published(source: Mapping[str, Tensor] | str | Path, options: Mapping[str, Any]) -> LoadedCheckpoint:
    """As `load_published`, and which keys were ignored."""
    found = open_published(source, options)
    with torch.device("meta"):
        model = build(found.config)
    checkpoint.assign_weights(model, found.tensors, _name(source))
    return LoadedCheckpoint(model, found.ignored)


def open_published(source: Mapping[str, Tensor] | str | Path, options: Mapping[str, Any]) -> OpenCheckpoint:
    """A checkpoint's tensors, compared with its options; a file's are mapped, so that memory is taken as they are used.

    Raises:
        UserError: as `load_published`; a video model.
    """
    name = _name(source)
    if isinstance(source, (str, Path)):
        tensors = _read(Path(source))
    else:
        tensors = {key: tensor.clone() for key, tensor in _checked(source, name).items()}
    if any(key.startswith(_OF_VIDEO) for key in tensors):
        raise UserError(
            f"{name} is a video model (it has {_OF_VIDEO}*), and models of pictures alone are read: "
            "take a text-to-image checkpoint"
        )
    config = _config(options, tensors)
    kept = {key: tensor for key, tensor in tensors.items() if not _carries_nothing(key, config)}
    with torch.device("meta"):
        expected = build(config).state_dict()
    added = ("var",) if isinstance(config, TarFlowConfig) and "var" not in kept else ()
    for key in added:
        device = next(iter(kept.values())).device if kept else None
        kept[key] = torch.ones(expected[key].shape, device=device)
    checkpoint.check_keys(expected, kept, name)
    ignored = [key for key in tensors if key not in kept]
    return OpenCheckpoint(name, config, {key: kept[key] for key in expected}, ignored, added, _is_mapped(source))


def _is_mapped(source: Mapping[str, Tensor] | str | Path) -> bool:
    if not isinstance(source, (str, Path)):
        return False
    return Path(source).suffix == ".safetensors" or zipfile.is_zipfile(source)


def _name(source: Mapping[str, Tensor] | str | Path) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the state dict"


def _carries_nothing(key: str, config: ModelConfig) -> bool:
    """Whether a key is to be ignored; `var` matters to TarFlow, whose noise it scales."""
    return bool(_CARRY_NOTHING.fullmatch(key)) or (key == "var" and not isinstance(config, TarFlowConfig))


def _config(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """Checked options, completed by what only the checkpoint's shapes say."""
    values = constructor_options(options)
    blocks = range(1 + max((int(key.split(".")[1]) for key in tensors if re.match(r"blocks\.\d+\.", key)), default=-1))
    if values.get("kind") == "tarflow":
        table = tensors.get("blocks.0.class_embed")
        values.setdefault("num_classes", 0 if table is None else table.shape[0])
        return config_from_dict(values)
    widths = [tensors[key].shape[1] for block in blocks if (key := f"blocks.{block}.proj_txt.weight") in tensors]
    if widths:
        values.setdefault("txt_dim", widths[0])
    hidden = tuple(width for block in blocks if (width := _hidden(tensors, block)))
    if len(hidden) == len(blocks) == values.get("num_blocks", len(blocks)):
        values.setdefault("mlp_hidden", hidden)
    config = config_from_dict(values)
    assert not isinstance(config, TarFlowConfig)
    return config.without_default_hidden()


def _hidden(tensors: Mapping[str, Tensor], block: int) -> int | None:
    """Hidden width of a block's MLPs."""
    for name in ("gate_proj", "main.0"):
        weight = tensors.get(f"blocks.{block}.attn_blocks.0.mlp.{name}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return None


def _read(path: Path) -> dict[str, Tensor]:
    """A flat state dict from a file.

    Raises:
        UserError: no such file, a damaged one, or one that holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return files.read_tensors(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected a .pth or .safetensors file")
    try:
        # mapped, not read: only what the model keeps is ever in memory
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mapped(path))
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} is not a whole checkpoint of tensors ({reason}): fetch it again") from None
    return _checked(values, str(path))


def _checked(values: Any, name: str) -> dict[str, Tensor]:
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{name} holds a {type(values).__name__} with other things than tensors, expected a state dict")
    return dict(values)
