"""Published checkpoints: a flat state dict (`.pth`, safetensors or a dictionary) and the options of its model.

Contract: parameter names are the published ones, so nothing is renamed; every key is loaded, or known to carry nothing,
or an error that lists it. A `.pth` is read with weights_only=True and nothing else.

Options come in one of two dialects. The constructor's has our names. The published YAML is a list `arguments:` of
one-key maps with some other names, numbers for booleans, and the image's side in pixels; it also holds the settings of
its training run, which are known by name and passed over. Any other name is an error in either dialect.
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

from starflow.config import read_mapping, unknown_key_message
from starflow.errors import UserError
from starflow.flow import checkpoint
from starflow.flow.config import KINDS, ModelConfig, TarFlowConfig, config_from_dict
from starflow.flow.model import STARFlow, TarFlow, build
from starflow.io import files

_DERIVED_KEYS = re.compile(r"blocks\.\d+\.attn_mask|feat_rope\..*")
"""Keys whose tensors follow from the options, and are made anew."""

_WRAPPER_PREFIX = "module."
"""How all keys start that torch's DistributedDataParallel has saved; it says nothing of the model."""

_VIDEO_PREFIX = "learnable_self_denoiser."
"""How keys start that only video models have."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The model of a published checkpoint, and what of the file it does not use."""

    model: STARFlow | TarFlow
    ignored: list[str]
    """Keys of the checkpoint that the model does not need."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose keys and shapes fit its options; the tensors of a file are mapped and not read yet."""

    name: str
    """Name of the file, for messages."""
    config: ModelConfig
    """Of its model."""
    tensors: dict[str, Tensor]
    """All tensors of the model, by its own names and in its order."""
    ignored: list[str]
    """Keys of the checkpoint that the model does not need."""
    filled: tuple[str, ...] = ()
    """Names of tensors that the checkpoint lacks and that were filled with their only possible value."""
    mapped: bool = False
    """Whether the other tensors lie in a file rather than in memory."""


def load_published(
    source: Mapping[str, Tensor] | str | Path, options: Mapping[str, Any] | str | Path
) -> STARFlow | TarFlow:
    """The model of a published checkpoint, on the CPU, in the checkpoint's precision.

    Args:
        source: a state dict (copied), or the path of a `.pth` or `.safetensors` file.
        options: the published configuration, by the constructor's names with "kind" "starflow" (the default)
            or "tarflow"; also nested, as {"kind": .., "config": {..}}, or in the published YAML's dialect,
            {"arguments": [..]}; or the path of a YAML or JSON file of them. `txt_dim`, `num_classes` and hidden widths
            that are not given are the checkpoint's.

    Returns:
        The model, whose `forward` and `log_prob` are those of the published one (STARFlow, arXiv 2506.06276).

    Raises:
        UserError: no such or a damaged file, an unknown option, missing or unexpected keys, other shapes.

    >>> from starflow.flow.config import STARFlowConfig
    >>> options = {"in_channels": 4, "img_size": 4, "channels": 64, "num_blocks": 2, "layers_per_block": [1, 2]}
    >>> state = STARFlow(config_from_dict(options)).state_dict()
    >>> load_published(state, options).config.layers_per_block
    (1, 2)
    >>> load_published(state, options | {"layers_per_block": [1, 1]})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    starflow.errors.UserError: the state dict does not hold ... 12 unexpected: ...
    """
    return read_published(source, options).model


def read_published(
    source: Mapping[str, Tensor] | str | Path, options: Mapping[str, Any] | str | Path
) -> LoadedCheckpoint:
    """As `load_published`, together with the keys that were ignored."""
    found = open_published(source, options)
    for key, tensor in found.tensors.items():
        check_finite(key, tensor, found.name)
    with torch.device("meta"):
        model = build(found.config)
    checkpoint.assign_weights(model, found.tensors, _name(source))
    return LoadedCheckpoint(model, found.ignored)


def open_published(
    source: Mapping[str, Tensor] | str | Path, options: Mapping[str, Any] | str | Path
) -> OpenCheckpoint:
    """Open a checkpoint and compare its tensors with its options; a file is mapped, so that only what is used is read.

    Raises:
        UserError: as `load_published`, or a video model.
    """
    name = _name(source)
    if isinstance(source, (str, Path)):
        tensors = _read(Path(source))
    else:
        tensors = {key: tensor.clone() for key, tensor in _checked(source, name).items()}
    if tensors and all(key.startswith(_WRAPPER_PREFIX) for key in tensors):
        tensors = {key.removeprefix(_WRAPPER_PREFIX): tensor for key, tensor in tensors.items()}
    options = read_mapping(Path(options)) if isinstance(options, (str, Path)) else options
    if any(key.startswith(_VIDEO_PREFIX) for key in tensors):
        raise UserError(
            f"{name} is a video model (it has {_VIDEO_PREFIX}*), and models of pictures alone are read: "
            "take a text-to-image checkpoint"
        )
    config = _config(options, tensors)
    used = {key: tensor for key, tensor in tensors.items() if not _is_derived(key, config)}
    with torch.device("meta"):
        expected = build(config).state_dict()
    filled = ("var",) if isinstance(config, TarFlowConfig) and "var" not in used else ()
    for key in filled:
        device = next(iter(used.values())).device if used else None
        used[key] = torch.ones(expected[key].shape, dtype=torch.float32, device=device)
    checkpoint.check_keys(expected, used, name)
    ignored = [key for key in tensors if key not in used]
    return OpenCheckpoint(name, config, {key: used[key] for key in expected}, ignored, filled, _is_mapped(source))


def check_finite(key: str, tensor: Tensor, name: str) -> None:
    """Raises UserError: a tensor of the checkpoint `name` holds values that are not finite."""
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise UserError(
            f"'{key}' of {name} holds {wrong} of {tensor.numel()} values that are not finite: "
            "the model is broken, fetch it again or take another checkpoint"
        )


def _is_mapped(source: Mapping[str, Tensor] | str | Path) -> bool:
    if not isinstance(source, (str, Path)):
        return False
    return Path(source).suffix == ".safetensors" or zipfile.is_zipfile(source)


def _name(source: Mapping[str, Tensor] | str | Path) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the state dict"


def _is_derived(key: str, config: ModelConfig) -> bool:
    """Whether the model does not need a key; `var` matters to TarFlow alone, whose noise it scales."""
    return bool(_DERIVED_KEYS.fullmatch(key)) or (key == "var" and not isinstance(config, TarFlowConfig))


def _config(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The checked options, completed by the sizes that only the checkpoint's shapes tell."""
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


# The options of the YAML dialect by what becomes of them.

_RENAMED = {"channel_size": "in_channels", "blocks": "num_blocks"}

_SAME_NAME = ("patch_size", "channels", "layers_per_block", "txt_size", "rope", "sos", "use_softplus", "cond_top_only",
         "use_final_norm", "seq_order", "soft_clip")  # fmt: skip

_REQUIRED_VALUES = {"nvp": 1, "adaln": 0}
"""Options that have one value in every model that is implemented here."""

_TRAINING_ONLY = ("drop_label", "latent_norm_regularization")

_PIPELINE_OPTIONS = ("noise_std", "vae", "text", "cfg", *_TRAINING_ONLY)
"""Options of what stands around the model in a pipeline, and of the loss."""

_RUN_ONLY = ("no_flip", "fsdp", "fsdp_text_encoder", "batch_size", "lr", "min_lr", "wds", "sample_freq",
             "gradient_checkpoint")  # fmt: skip

AUTOENCODER_FACTORS = {"stabilityai/sd-vae-ft-ema": 8, "stabilityai/sd-vae-ft-mse": 8}
"""Image pixels that a latent pixel stands for along a side, by the autoencoder's name."""


def constructor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The model's options in the constructor's names, `kind` among them, from either dialect or {"kind", "config"}.

    Options of the pipeline and of a training run are left out; `config_from_dict` refuses what is unknown.

    Raises:
        UserError: an option of the YAML dialect that is unknown, or that this implementation does not have.

    >>> constructor_options({"arguments": [{"blocks": 2}, {"layers_per_block": "1 6"}, {"rope": 1}, {"cfg": 2.5}]})
    {'num_blocks': 2, 'layers_per_block': [1, 6], 'rope': True}
    """
    if "arguments" in options:
        values = _from_arguments(_merged(options))
    else:
        flat = _flat(options)
        values = {key: value for key, value in flat.items() if key not in (*_PIPELINE_OPTIONS, *_RUN_ONLY)}
    return {key: _as_typed(values.get("kind", "starflow"), key, value) for key, value in values.items()}


def pipeline_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of autoencoder, text encoder, noise and guidance that are given: noise_std, vae, text, cfg.

    >>> pipeline_options({"channels": 64, "noise_std": 0.3, "cfg": 2.5})
    {'noise_std': 0.3, 'cfg': 2.5}
    """
    merged = _merged(options) if "arguments" in options else _flat(options)
    return {key: merged[key] for key in _PIPELINE_OPTIONS if key in merged}


def ignored_options(options: Mapping[str, Any]) -> list[str]:
    """Names of the options that belong to a training run, and so mean nothing to the model."""
    merged = _merged(options) if "arguments" in options else _flat(options)
    return [key for key in merged if key in (*_TRAINING_ONLY, *_RUN_ONLY)]


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the constructor's dialect without nesting."""
    inner = options.get("config")
    if isinstance(inner, Mapping):
        return {"kind": options.get("kind", "starflow"), **inner}
    return dict(options)


def _merged(options: Mapping[str, Any]) -> dict[str, Any]:
    """The list of one-key maps of the YAML dialect as one mapping."""
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
    """Options of the YAML dialect in the constructor's names."""
    known = [*_RENAMED, *_SAME_NAME, *_REQUIRED_VALUES, *_PIPELINE_OPTIONS, *_RUN_ONLY, "img_size"]
    for key, value in merged.items():
        if key not in known:
            raise UserError(unknown_key_message(key, key, known))
        if key in _REQUIRED_VALUES and value != _REQUIRED_VALUES[key]:
            raise UserError(f"'{key}' is {value}, but only models with {key} {_REQUIRED_VALUES[key]} are implemented")
    values = {_RENAMED.get(key, key): value for key, value in merged.items() if key in _RENAMED or key in _SAME_NAME}
    if "img_size" in merged:
        values["img_size"] = _latent_side(merged["img_size"], _autoencoder_factor(merged.get("vae")))
    return values


def _latent_side(pixels: Any, factor: int) -> int:
    """Side of the latent for images of a side in pixels."""
    if not isinstance(pixels, int) or pixels % factor:
        raise UserError(f"img_size is {pixels!r} pixels, expected a multiple of the autoencoder's factor {factor}")
    return pixels // factor


def _autoencoder_factor(vae: str | None) -> int:
    """The factor of the autoencoder that is named; 1 without one."""
    if vae is not None and vae not in AUTOENCODER_FACTORS:
        raise UserError(
            f"'vae' is {vae!r}, whose factor is unknown: give img_size of the latent by constructor options"
        )
    return 1 if vae is None else AUTOENCODER_FACTORS[vae]


def _as_typed(kind: Any, key: str, value: Any) -> Any:
    """An option's value in our type, where published configurations have numbers for booleans and text for lists."""
    hints = typing.get_type_hints(KINDS[kind]) if kind in KINDS else {}
    if hints.get(key) is bool and value in (0, 1):
        return bool(value)
    if key == "layers_per_block" and isinstance(value, str):
        try:
            return [int(number) for number in value.split()]
        except ValueError:
            raise UserError(f"layers_per_block is {value!r}, expected numbers separated by spaces") from None
    return value
