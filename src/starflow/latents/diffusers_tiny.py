"""Tiny distilled autoencoders, by diffusers' AutoencoderTiny: TAESD and its relatives.

TAESD (madebyollin/taesd, MIT) encodes to the latents of sd-vae times 0.18215, so a flow on those latents
decodes with it at a fraction of the cost. It has no posterior: encoding gives the mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from starflow.errors import UserError
from starflow.files import read_tensors
from starflow.hub import HERE, Fetch
from starflow.latents.base import AutoencoderSpec, check_images, check_latents
from starflow.latents.diffusers_load import check_keys, freeze, import_diffusers, load_network, quiet

TAESD_FILES = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")


class TinyLatents:
    """`starflow.latents.base.Autoencoder` over an AutoencoderTiny."""

    def __init__(self, network: nn.Module, source: str = "", noise_std: float = 0.0) -> None:
        """Wrap an AutoencoderTiny; `noise_std` is the latent noise its decoder was fine-tuned for, 0 for none."""
        self.network = freeze(network)
        config: Any = network.config
        self._spec = AutoencoderSpec(
            kind="diffusers_tiny",
            channels=int(config.latent_channels),
            factor=int(2 ** (len(config.encoder_block_out_channels) - 1)),
            scaling=float(config.scaling_factor),
            noise_std=noise_std,
            source=source,
        )

    @classmethod
    def from_pretrained(
        cls, source: str, dtype: torch.dtype = torch.float32, noise_std: float = 0.0, fetch: Fetch = HERE
    ) -> TinyLatents:
        """Load from a folder or a hub repository, e.g. "madebyollin/taesd".

        A folder with TAESD's own two files (`TAESD_FILES`) and no config.json is read as well.

        Raises:
            UserError: see `load_network`; or TAESD's files are damaged.
        """
        folder = Path(source).expanduser()
        if not (folder / "config.json").exists() and all((folder / name).is_file() for name in TAESD_FILES):
            return cls(_load_taesd(folder, dtype), source, noise_std)
        return cls(load_network("AutoencoderTiny", source, dtype, fetch), source, noise_std)

    @property
    def spec(self) -> AutoencoderSpec:
        return self._spec

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`; there is no posterior, so `generator` draws nothing."""
        check_images(images, self._spec)
        network: Any = self.network
        latents: Tensor = network.encode(images.to(network.dtype)).latents.float()
        return latents * self._spec.scaling

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        check_latents(latents, self._spec)
        network: Any = self.network
        raw = latents.float() / self._spec.scaling
        images: Tensor = network.decode(raw.to(network.dtype)).sample.float()
        return images.clamp(-1, 1)


def _load_taesd(folder: Path, dtype: torch.dtype) -> nn.Module:
    """An AutoencoderTiny from TAESD's own files, whose layers are numbered from the encoder's and decoder's start."""
    diffusers = import_diffusers()
    with quiet(diffusers):
        network: nn.Module = diffusers.AutoencoderTiny()
    state = {f"encoder.layers.{name}": tensor for name, tensor in read_tensors(folder / TAESD_FILES[0]).items()}
    for name, tensor in read_tensors(folder / TAESD_FILES[1]).items():
        number, _, rest = name.partition(".")
        if not number.isdecimal():
            raise UserError(f"{folder / TAESD_FILES[1]} has a weight '{name}', expected names such as '1.weight'")
        # The decoder's layer 0 is the soft clamp, which diffusers does in its forward.
        state[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor
    expected = network.state_dict()
    check_keys(str(folder), sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys()))
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return network
