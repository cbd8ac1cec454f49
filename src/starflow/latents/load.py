"""An autoencoder from its description, as config.json keeps it."""

from __future__ import annotations

from pathlib import Path

from starflow.errors import UserError
from starflow.hub import HERE, Fetch
from starflow.latents.base import Autoencoder, AutoencoderSpec
from starflow.latents.diffusers_kl import KLLatents
from starflow.latents.diffusers_tiny import TinyLatents
from starflow.latents.pixels import PixelLatents
from starflow.latents.small import load_small

KINDS = ("pixels", "diffusers_kl", "diffusers_tiny", "small")


def load_autoencoder(spec: AutoencoderSpec, fetch: Fetch = HERE) -> Autoencoder:
    """Build the autoencoder that `spec` describes, on the CPU in float32.

    Raises:
        UserError: an unknown kind, its files cannot be found or read, or what was found is another than described.
    """
    found = _load(spec, fetch)
    described, got = _shape(spec), _shape(found.spec)
    if described != got:
        raise UserError(
            f"the autoencoder '{spec.source or spec.kind}' has {got}, the model expects {described}: "
            "use the one that the model was trained with"
        )
    return found


def _load(spec: AutoencoderSpec, fetch: Fetch) -> Autoencoder:
    if spec.kind == "pixels":
        return PixelLatents(1 if spec.channels == 1 else 3)
    if spec.kind == "diffusers_kl":
        return KLLatents.from_pretrained(spec.source, noise_std=spec.noise_std, fetch=fetch)
    if spec.kind == "diffusers_tiny":
        return TinyLatents.from_pretrained(spec.source, noise_std=spec.noise_std, fetch=fetch)
    if spec.kind == "small":
        return load_small(Path(spec.source))
    raise UserError(f"unknown autoencoder kind '{spec.kind}', expected one of {', '.join(KINDS)}")


def _shape(spec: AutoencoderSpec) -> str:
    return f"{spec.channels} channels, factor {spec.factor}, scaling {spec.scaling:g}"
