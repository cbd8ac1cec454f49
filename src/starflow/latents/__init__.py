"""Autoencoders: pictures to latents and back, one contract for all (`starflow.latents.base`)."""

from starflow.latents.base import Autoencoder, AutoencoderSpec, check_images, check_latents
from starflow.latents.diffusers_kl import KLLatents
from starflow.latents.diffusers_tiny import TinyLatents
from starflow.latents.load import load_autoencoder
from starflow.latents.pixels import PixelLatents

__all__ = [
    "Autoencoder",
    "AutoencoderSpec",
    "KLLatents",
    "PixelLatents",
    "TinyLatents",
    "check_images",
    "check_latents",
    "load_autoencoder",
]
