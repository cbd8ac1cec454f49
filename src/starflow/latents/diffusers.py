"""Networks that diffusers builds, read strictly from a folder or the hub; safetensors only.

Stable Diffusion's autoencoder and its relatives, by diffusers' AutoencoderKL.

The latent is (raw - shift) * scaling, with the network's own `scaling_factor` (0.18215 for sd-vae) and
`shift_factor` (none for sd-vae), raw being a draw from the posterior N(mean, std^2), or its mean.

Tiny distilled autoencoders, by diffusers' AutoencoderTiny: TAESD and its relatives.

TAESD (madebyollin/taesd, MIT) encodes to the latents of sd-vae times 0.18215, so a flow on those latents
decodes with it at a fraction of the cost. It has no posterior: encoding gives the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from starflow.errors import UserError
from starflow.io import weights
from starflow.io.files import read_json, read_tensors
from starflow.io.hub import DEFAULT_HUB, TORCHAO_LOGGERS, HubOptions, local_or_hub, only_errors_logged
from starflow.latents.base import AutoencoderSpec, check_images, check_latents

NETWORK_FILES = ("config.json", "diffusion_pytorch_model*.safetensors")

SHARD_INDEX_FILE = "diffusion_pytorch_model*.safetensors.index.json"

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


def load_network(name: NetworkName, source: str, dtype: torch.dtype, hub: HubOptions = DEFAULT_HUB) -> nn.Module:
    """Build the diffusers class `name` from `source`, a folder or a hub repository, frozen and in evaluation mode.

    Raises:
        UserError: diffusers is not installed, `source` is nowhere, another class, damaged (the file is named), or
            lacks weights.
    """
    diffusers = import_diffusers()
    folder = local_or_hub(source, NETWORK_FILES, (SHARD_INDEX_FILE, weights.CHECKSUMS), fetch=fetch)
    stored = read_json(folder / "config.json").get("_class_name", name)
    if stored != name:
        raise UserError(f"'{source}' is a {stored}, expected a {name}: choose the adapter of that kind")
    weights.check_sizes(folder)
    from safetensors import SafetensorError

    try:
        with only_diffusers_errors(diffusers):
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
def only_diffusers_errors(diffusers: Any) -> Iterator[None]:
    """Without diffusers' and torchao's remarks: what matters of them, the loading report, is read."""
    logging = diffusers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with only_errors_logged(*TORCHAO_LOGGERS, "diffusers"):
            yield
    finally:
        logging.set_verbosity(level)


class KLLatents:
    """`starflow.latents.base.Autoencoder` over an AutoencoderKL."""

    def __init__(self, network: nn.Module, source: str = "", noise_std: float = 0.0) -> None:
        """Wrap an AutoencoderKL; `noise_std` is the latent noise its decoder was fine-tuned for, 0 for none."""
        self.network = freeze(network)
        config: Any = network.config
        self.shift = float(config.shift_factor or 0.0)
        self._spec = AutoencoderSpec(
            kind="diffusers_kl",
            channels=int(config.latent_channels),
            factor=int(2 ** (len(config.block_out_channels) - 1)),
            scaling=float(config.scaling_factor),
            noise_std=noise_std,
            source=source,
        )

    @classmethod
    def from_pretrained(
        cls, source: str, dtype: torch.dtype = torch.float32, noise_std: float = 0.0, hub: HubOptions = DEFAULT_HUB
    ) -> KLLatents:
        """Load from a folder or a hub repository, e.g. "stabilityai/sd-vae-ft-ema".

        Raises:
            UserError: see `load_network`.
        """
        return cls(load_network("AutoencoderKL", source, dtype, hub), source, noise_std)

    @property
    def spec(self) -> AutoencoderSpec:
        return self._spec

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each (B, C, H / factor, W / factor), float32.

        Raises:
            UserError: the pictures' shape does not fit.
        """
        check_images(images, self._spec)
        network: Any = self.network
        posterior = network.encode(images.to(network.dtype)).latent_dist
        mean: Tensor = (posterior.mean.float() - self.shift) * self._spec.scaling
        std: Tensor = posterior.std.float() * self._spec.scaling
        return mean, std

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`: a draw from the posterior with `generator`, else its mean.

        The draw is made on the generator's device, so that one on the CPU gives the same picture anywhere.
        """
        mean, std = self.posterior(images)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        check_latents(latents, self._spec)
        network: Any = self.network
        raw = latents.float() / self._spec.scaling + self.shift
        images: Tensor = network.decode(raw.to(network.dtype)).sample.float()
        return images.clamp(-1, 1)


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
        cls, source: str, dtype: torch.dtype = torch.float32, noise_std: float = 0.0, hub: HubOptions = DEFAULT_HUB
    ) -> TinyLatents:
        """Load from a folder or a hub repository, e.g. "madebyollin/taesd".

        A folder with TAESD's own two files (`TAESD_FILES`) and no config.json is read as well.

        Raises:
            UserError: see `load_network`; or TAESD's files are damaged.
        """
        folder = Path(source).expanduser()
        if not (folder / "config.json").exists() and all((folder / name).is_file() for name in TAESD_FILES):
            return cls(_load_taesd(folder, dtype), source, noise_std)
        return cls(load_network("AutoencoderTiny", source, dtype, hub), source, noise_std)

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
    with only_diffusers_errors(diffusers):
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
