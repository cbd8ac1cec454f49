"""Autoencoders whose networks diffusers builds, read strictly from a folder or the hub; safetensors only.

- `KLLatents` is Stable Diffusion's autoencoder and its relatives, by diffusers' AutoencoderKL. A latent is
  (raw - shift) * scaling, with the network's own `scaling_factor` (0.18215 for sd-vae) and `shift_factor` (none for
  sd-vae), raw being a draw from the posterior N(mean, std^2), or its mean.
- `TinyLatents` is TAESD (madebyollin/taesd, MIT) and its relatives, by diffusers' AutoencoderTiny: distilled from
  sd-vae, it encodes to the latents of sd-vae times 0.18215, so a flow on those latents decodes with it at a fraction of
  the cost. It has no posterior: encoding gives the mean.
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
from starflow.latents.base import AutoencoderSpec, check_images, check_latents, empty_images, empty_latents

NETWORK_FILES = ("config.json", "diffusion_pytorch_model*.safetensors")

SHARD_INDEX_FILE = "diffusion_pytorch_model*.safetensors.index.json"

TAESD_FILES = ("taesd_encoder.safetensors", "taesd_decoder.safetensors")

NetworkName = Literal["AutoencoderKL", "AutoencoderTiny"]


class _DiffusersLatents:
    """What the two autoencoders share: a frozen network, and latents that are (raw - shift) * scaling."""

    def __init__(self, network: nn.Module, spec: AutoencoderSpec, shift: float) -> None:
        self.network = freeze(network)
        self.shift = shift
        self._spec = spec

    @property
    def spec(self) -> AutoencoderSpec:
        """See `Autoencoder.spec`."""
        return self._spec

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        check_latents(latents, self._spec)
        if not len(latents):
            return empty_images(latents, self._spec)
        network: Any = self.network
        raw = latents.float() / self._spec.scaling + self.shift
        images: Tensor = network.decode(raw.to(network.dtype)).sample.float()
        return images.clamp(-1, 1)


class KLLatents(_DiffusersLatents):
    """The `Autoencoder` over an AutoencoderKL (Rombach et al., arXiv 2112.10752)."""

    receptive_radius = None  # attention in its middle, and group norms, look at the whole image

    def __init__(self, network: nn.Module, source: str = "", noise_std: float = 0.0) -> None:
        """Wrap an AutoencoderKL; `noise_std` is the latent noise its decoder was fine-tuned for, 0 for none."""
        config: Any = network.config
        spec = AutoencoderSpec(
            kind="diffusers_kl",
            channels=int(config.latent_channels),
            factor=int(2 ** (len(config.block_out_channels) - 1)),
            scaling=float(config.scaling_factor),
            noise_std=noise_std,
            source=source,
        )
        super().__init__(network, spec, shift=float(config.shift_factor or 0.0))

    @classmethod
    def from_pretrained(
        cls, source: str, dtype: torch.dtype = torch.float32, noise_std: float = 0.0, hub: HubOptions = DEFAULT_HUB
    ) -> KLLatents:
        """Load from a folder or a hub repository, e.g. "stabilityai/sd-vae-ft-ema".

        Raises:
            UserError: see `load_network`.
        """
        return cls(load_network("AutoencoderKL", source, dtype, hub), source, noise_std)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each (B, C, H / factor, W / factor), float32.

        Raises:
            UserError: the images' shape does not fit.
        """
        check_images(images, self._spec)
        network: Any = self.network
        posterior = network.encode(images.to(network.dtype)).latent_dist
        mean: Tensor = (posterior.mean.float() - self.shift) * self._spec.scaling
        std: Tensor = posterior.std.float() * self._spec.scaling
        return mean, std

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`: a draw from the posterior with `generator`, else its mean.

        The draw is made on the generator's device, so that one on the CPU gives the same latent anywhere.
        """
        check_images(images, self._spec)
        if not len(images):
            return empty_latents(images, self._spec)
        mean, std = self.posterior(images)
        if generator is None:
            return mean
        draw = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device=generator.device)
        return mean + std * draw.to(mean.device)


class TinyLatents(_DiffusersLatents):
    """The `Autoencoder` over an AutoencoderTiny."""

    receptive_radius = 20
    """Of TAESD's decoder: 1 + 9 convolutions at 1/8 of the image's side, and 10 at each of 1/4 and 1/2."""

    def __init__(self, network: nn.Module, source: str = "", noise_std: float = 0.0) -> None:
        """Wrap an AutoencoderTiny; `noise_std` is the latent noise its decoder was fine-tuned for, 0 for none."""
        config: Any = network.config
        spec = AutoencoderSpec(
            kind="diffusers_tiny",
            channels=int(config.latent_channels),
            factor=int(2 ** (len(config.encoder_block_out_channels) - 1)),
            scaling=float(config.scaling_factor),
            noise_std=noise_std,
            source=source,
        )
        super().__init__(network, spec, shift=0.0)

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

    def encode(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """See `Autoencoder.encode`; there is no posterior, so `generator` draws nothing."""
        check_images(images, self._spec)
        if not len(images):
            return empty_latents(images, self._spec)
        network: Any = self.network
        latents: Tensor = network.encode(images.to(network.dtype)).latents.float()
        return latents * self._spec.scaling


def load_network(name: NetworkName, source: str, dtype: torch.dtype, hub: HubOptions = DEFAULT_HUB) -> nn.Module:
    """Build the diffusers class `name` from `source`, a folder or a hub repository, frozen and in evaluation mode.

    Raises:
        UserError: diffusers is not installed, `source` is nowhere, another class, damaged (the file is named), or
            lacks weights.
    """
    diffusers = import_diffusers()
    folder = local_or_hub(source, NETWORK_FILES, (SHARD_INDEX_FILE, weights.CHECKSUMS), hub=hub)
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


def import_diffusers() -> Any:
    """Import the diffusers package.

    Raises:
        UserError: it is not installed; the message names the command.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError("this autoencoder needs diffusers: run pip install 'starflow[diffusers]'") from None
    return diffusers


def check_keys(source: str, missing: list[str], unexpected: list[str]) -> None:
    """Refuse weights that do not fit the network one to one.

    Raises:
        UserError: it lists the first keys of each kind.
    """
    found = [
        f"{len(keys)} {kind} weights ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if found:
        raise UserError(f"'{source}' has {' and '.join(found)}: fetch it again, or choose the adapter of its kind")


def freeze(network: Any) -> nn.Module:
    """Put a network in evaluation mode and stop gradients to its weights."""
    frozen: nn.Module = network.eval().requires_grad_(False)
    return frozen


@contextmanager
def only_diffusers_errors(diffusers: Any) -> Iterator[None]:
    """Silence diffusers' and torchao's remarks; what matters of them, the loading report, is read."""
    logging = diffusers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with only_errors_logged(*TORCHAO_LOGGERS, "diffusers"):
            yield
    finally:
        logging.set_verbosity(level)


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
