"""Networks that diffusers builds, read strictly from a folder or the hub; safetensors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from starflow import shards
from starflow.errors import UserError
from starflow.files import read_json
from starflow.hub import HERE, Fetch, local_or_hub
from starflow.quiet import TORCHAO, errors_only

FILES = ("config.json", "diffusion_pytorch_model*.safetensors")
INDEX = "diffusion_pytorch_model*.safetensors.index.json"
NetworkName = Literal["AutoencoderKL", "AutoencoderTiny"]


def import_diffusers() -> Any:
    """The diffusers package.

    Raises:
        UserError: it is not installed; the message names the command.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError("this autoencoder needs diffusers: run pip install 'starflow[diffusers]'") from None
    return diffusers


def load_network(name: NetworkName, source: str, dtype: torch.dtype, fetch: Fetch = HERE) -> nn.Module:
    """Build the diffusers class `name` from `source`, a folder or a hub repository, frozen and in evaluation mode.

    Raises:
        UserError: diffusers is not installed, `source` is nowhere, another class, damaged (the file is named), or
            lacks weights.
    """
    diffusers = import_diffusers()
    folder = local_or_hub(source, FILES, (INDEX, shards.CHECKSUMS), fetch=fetch)
    stored = read_json(folder / "config.json").get("_class_name", name)
    if stored != name:
        raise UserError(f"'{source}' is a {stored}, expected a {name}: choose the adapter of that kind")
    shards.check_sizes(folder)
    from safetensors import SafetensorError

    try:
        with quiet(diffusers):
            network, report = getattr(diffusers, name).from_pretrained(
                folder,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"'{source}' cannot be read as {name}: {' '.join(str(error).split())[:300]}") from None
    check_keys(source, report["missing_keys"], report["unexpected_keys"])
    return freeze(network)


def check_keys(source: str, missing: list[str], unexpected: list[str]) -> None:
    """Refuse weights that do not fit the network one to one.

    Raises:
        UserError: with the first keys of each kind.
    """
    found = [
        f"{len(keys)} {kind} weights ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if found:
        raise UserError(f"'{source}' has {' and '.join(found)}: fetch it again, or choose the adapter of its kind")


def freeze(network: Any) -> nn.Module:
    frozen: nn.Module = network.eval().requires_grad_(False)
    return frozen


@contextmanager
def quiet(diffusers: Any) -> Iterator[None]:
    """Without diffusers' and torchao's remarks: what matters of them, the loading report, is read."""
    logging = diffusers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with errors_only(*TORCHAO, "diffusers"):
            yield
    finally:
        logging.set_verbosity(level)
