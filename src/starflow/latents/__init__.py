"""Autoencoders, which turn images to latents and back: one contract for all (`starflow.latents.base`)."""

from starflow.latents.base import Autoencoder, AutoencoderSpec, PixelLatents, check_images, check_latents
from starflow.latents.diffusers import KLLatents, TinyLatents
from starflow.latents.load import load_autoencoder

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
