"""A flow as a folder: config.json, the weights (`starflow.io.weights`), and perhaps policy.json. Loading is strict.

Contract: every key of the model is there with its shape, and nothing else; otherwise all that differ are listed. A
damaged file is named. A model is found in its own folder, in that of a pipeline (flow/) or of a training run
(model/flow/), and in a hub repository of the first two kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from starflow.errors import UserError
from starflow.flow.config import ModelConfig, config_from_dict, config_to_dict
from starflow.io import files, weights
from starflow.io.hub import DEFAULT_HUB, HubOptions, local_or_hub

CONFIG_NAME = "config.json"

POLICY_NAME = "policy.json"

FLOW_FOLDER = "flow"
"""Name of the flow's folder inside that of a pipeline."""

_HUB_FILES = ("model*.safetensors", "model*.safetensors.index.json", weights.CHECKSUMS, POLICY_NAME)

_LISTED = 8
"""Most keys that a message names."""


def save(
    folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], limit: int = weights.SHARD_BYTES
) -> None:
    """Write weights and config, each file whole or not at all; the config last, so that it means a whole model."""
    files.check_output_folder(folder)
    weights.write(folder, tensors, limit)
    files.write_json(folder / CONFIG_NAME, config_to_dict(config))


def find(folder_or_hub_id: str | Path, hub: HubOptions = DEFAULT_HUB) -> Path:
    """The folder with a flow's own config.json and weights; see the module's docstring.

    Raises:
        UserError: neither a folder nor a repository.
    """
    optional = (*_HUB_FILES, *(f"{FLOW_FOLDER}/{name}" for name in (CONFIG_NAME, *_HUB_FILES)))
    folder = local_or_hub(
        str(folder_or_hub_id), (CONFIG_NAME,), optional, hub=hub, subfolders=("", FLOW_FOLDER, "model/flow")
    )
    inner = (folder, folder / FLOW_FOLDER, folder / "model" / FLOW_FOLDER)
    return next((one for one in inner if (one / CONFIG_NAME).is_file() and weights.has_weights(one)), folder)


def load(folder_or_hub_id: str | Path, hub: HubOptions = DEFAULT_HUB) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read the config and the weights by name, on the CPU; a damaged file is named.

    Raises:
        UserError: neither a folder nor a repository, a missing or damaged file, or an unknown option.
    """
    folder = find(folder_or_hub_id, hub)
    options = files.read_json(folder / CONFIG_NAME)
    if not isinstance(options, dict):
        raise UserError(f"{folder / CONFIG_NAME} holds a {type(options).__name__}, expected a mapping of options")
    return config_from_dict(options), weights.read(folder)


def read_policy(folder: Path) -> dict[str, Any] | None:
    """The sampling policy beside the weights as a plain mapping, or None; `starflow.sampling.policy` checks it.

    Raises:
        UserError: the file is no JSON, or holds no mapping.
    """
    if not (folder / POLICY_NAME).is_file():
        return None
    values = files.read_json(folder / POLICY_NAME)
    if not isinstance(values, dict):
        raise UserError(f"{folder / POLICY_NAME} holds a {type(values).__name__}, expected a mapping: calibrate again")
    return values


def write_policy(folder: Path, policy: Mapping[str, Any]) -> Path:
    """Write a sampling policy beside the weights; returns the file."""
    files.write_json(folder / POLICY_NAME, dict(policy))
    return folder / POLICY_NAME


def assign_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make `tensors` the model's own, in their precision and without a copy.

    Raises:
        UserError: missing or unexpected keys, or other shapes; lists them.
    """
    check_keys(model.state_dict(), tensors, source)
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def check_keys(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes with those of a model.

    Raises:
        UserError: missing or unexpected keys, or other shapes; lists them.
    """
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    if missing or unexpected:
        faults = {"missing": missing, "unexpected": unexpected}
        found = "; ".join(_list(kind, keys) for kind, keys in faults.items() if keys)
        raise UserError(f"{source} does not hold this model's weights: {found}; check the options it was made with")
    wrong = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if tensors[key].shape != expected[key].shape
    ]
    whole = [key for key in expected if expected[key].is_floating_point() and not tensors[key].is_floating_point()]
    if whole:
        kind = str(tensors[whole[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{source} holds {_list('of whole numbers', whole)} ({kind}), expected floats: convert it again"
        )
    if wrong:
        raise UserError(f"{source} has {_list('other shapes', wrong)}; check the options it was made with")


def _list(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:_LISTED])}{more}"
