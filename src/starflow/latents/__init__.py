"""Autoencoders, which turn images to latents and back: one contract for all (`starflow.latents.base`).

They are loaded by their description, as config.json keeps it, and their decoders as modules to train. A folder that is
written here is what the class of its kind reads, and `noise.json` beside the weights says which latent noise the
decoder was fine-tuned for (diffusers' own configs have no place for it).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starflow.config import read_mapping
from starflow.errors import UserError
from starflow.io.files import check_output_folder, give_usual_modes, read_json, write_json
from starflow.io.hub import DEFAULT_HUB, HubOptions, local_or_hub
from starflow.io.weights import write_checksums
from starflow.latents.base import Autoencoder, AutoencoderSpec, PixelLatents, check_images, check_latents
from starflow.latents.diffusers import TAESD_FILES, KLLatents, TinyLatents
from starflow.latents.small import SmallLatents, checked_noise, load_small, save_small

__all__ = [
    "Autoencoder",
    "AutoencoderSpec",
    "DecoderModule",
    "KLLatents",
    "PixelLatents",
    "TinyLatents",
    "TrainableAutoencoder",
    "check_images",
    "check_latents",
    "decoder_noise",
    "load_autoencoder",
    "load_trainable",
    "memory_layout",
    "save_trainable",
]

KINDS = ("pixels", "diffusers_kl", "diffusers_tiny", "small")

NOISE_FILE = "noise.json"

TrainableAutoencoder = KLLatents | TinyLatents | SmallLatents
"""The autoencoders that have a decoder of their own."""


def load_autoencoder(spec: AutoencoderSpec, hub: HubOptions = DEFAULT_HUB) -> Autoencoder:
    """Build the autoencoder that `spec` describes, on the CPU in float32.

    Raises:
        UserError: an unknown kind, its files cannot be found or read, or what was found is another than described.

    >>> load_autoencoder(AutoencoderSpec("pixels", channels=3, factor=1)).spec.factor
    1
    """
    found = _load(spec, hub)
    described, got = _describe(spec), _describe(found.spec)
    if described != got:
        raise UserError(
            f"the autoencoder '{spec.source or spec.kind}' has {got}, the model expects {described}: "
            "use the one that the model was trained with"
        )
    return found


def _load(spec: AutoencoderSpec, hub: HubOptions) -> Autoencoder:
    if spec.kind == "pixels":
        return PixelLatents(1 if spec.channels == 1 else 3)
    if spec.kind == "diffusers_kl":
        return KLLatents.from_pretrained(spec.source, noise_std=spec.noise_std, hub=hub)
    if spec.kind == "diffusers_tiny":
        return TinyLatents.from_pretrained(spec.source, noise_std=spec.noise_std, hub=hub)
    if spec.kind == "small":
        return load_small(Path(spec.source))
    raise UserError(f"unknown autoencoder kind '{spec.kind}', expected one of {', '.join(KINDS)}")


def _describe(spec: AutoencoderSpec) -> str:
    return f"{spec.channels} channels, factor {spec.factor}, scaling {spec.scaling:g}"


def memory_layout(autoencoder: TrainableAutoencoder) -> torch.memory_format:
    """Choose the memory layout in which an update takes least time.

    On a CPU, TAESD takes 0.14 s a 64-px crop in rows and 0.19 s in channels_last; ours takes a third of the time in
    channels_last, and GPUs prefer it.
    """
    on_cpu = next(autoencoder.network.parameters()).device.type == "cpu"
    return torch.contiguous_format if isinstance(autoencoder, TinyLatents) and on_cpu else torch.channels_last


class DecoderModule(nn.Module):
    """A decoder to train: scaled latents (B, C, h, w) to images (B, 3, H, W).

    Its results are not clamped, so that gradients reach what is too bright. It holds the weights that decoding uses,
    and no others, and shares them with the autoencoder.
    """

    def __init__(self, autoencoder: TrainableAutoencoder) -> None:
        super().__init__()
        network: Any = autoencoder.network
        self.decoder = network.decoder
        self.post_quant_conv = getattr(network, "post_quant_conv", None)
        # A bound method is no module, so the encoder's weights stay out of this one's.
        self._decode, self._scaling = network.decode, autoencoder.spec.scaling
        self._shift = 0.0 if isinstance(autoencoder, SmallLatents) else autoencoder.shift
        self._wrapped = not isinstance(autoencoder, SmallLatents)
        self.requires_grad_(True)
        self._layout = memory_layout(autoencoder)
        self.to(memory_format=self._layout)  # type: ignore[call-overload]

    def forward(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W), unclamped."""
        raw = (latents / self._scaling + self._shift).contiguous(memory_format=self._layout)
        images: Tensor = self._decode(raw, return_dict=False)[0] if self._wrapped else self._decode(raw)
        return images


def decoder_noise(source: str) -> float:
    """Standard deviation of the latent noise that the decoder in a folder was fine-tuned for; 0 where none is named."""
    path = Path(source).expanduser() / NOISE_FILE
    return checked_noise(read_mapping(path).get("noise_std"), path) if path.is_file() else 0.0


def load_trainable(source: str, hub: HubOptions = DEFAULT_HUB) -> TrainableAutoencoder:
    """Load the autoencoder in a folder or hub repository, by what its config.json says it is.

    Raises:
        UserError: nothing there, or nothing with a decoder of its own.
    """
    folder = Path(source).expanduser()
    if all((folder / name).is_file() for name in TAESD_FILES) and not (folder / "config.json").exists():
        return TinyLatents.from_pretrained(source, hub=hub)
    found = local_or_hub(source, ("config.json",), ("*.safetensors", "*.json"), hub=hub)
    values = read_json(found / "config.json")
    kind = values.get("_class_name") if isinstance(values, dict) else None
    if kind == "AutoencoderKL":
        return KLLatents.from_pretrained(source, noise_std=decoder_noise(str(found)), hub=hub)
    if kind == "AutoencoderTiny":
        return TinyLatents.from_pretrained(source, noise_std=decoder_noise(str(found)), hub=hub)
    if isinstance(values, dict) and values.get("kind") == "small":
        return load_small(found)
    raise UserError(
        f"'{source}' is a {kind or 'folder of something else'}, expected an AutoencoderKL, an AutoencoderTiny or ours"
    )


def save_trainable(autoencoder: Autoencoder, folder: Path, noise_std: float) -> None:
    """Write an autoencoder and the standard deviation of the noise that its decoder undoes; its config comes last.

    Raises:
        UserError: the folder cannot be written.
    """
    if isinstance(autoencoder, SmallLatents):
        save_small(autoencoder.network, folder, noise_std)
        return
    check_output_folder(folder)
    network: Any = autoencoder.network
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        network.save_pretrained(name, safe_serialization=True)
        give_usual_modes(Path(name))
        write_checksums(Path(name))
        write_json(Path(name) / NOISE_FILE, {"noise_std": noise_std})
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)
