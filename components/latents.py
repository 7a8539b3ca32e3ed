"""What turns pictures into latents and back, and the latents' shape where they are pictures of a few channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .family import Part
from .modules.autoencoder_kl import VaeDecoder, VaeEncoder, scale_factor

if TYPE_CHECKING:
    from .family import Configs

VAE = (Part("vae_encoder", "vae", VaeEncoder()), Part("vae_decoder", "vae", VaeDecoder()))


def latent_shape(configs: Configs, batch: int, height: int, width: int) -> tuple[int, ...]:
    """Return (batch, the VAE's channels, height, width in latents) for a size in pixels."""
    scale = scale_factor(configs["vae"])
    return (batch, configs["vae"]["latent_channels"], height // scale, width // scale)


def packed_latent_shape(side: int, configs: Configs, batch: int, height: int, width: int) -> tuple[int, ...]:
    """Return (batch, tokens, channels) for a size in pixels, where a token is a patch of so many pixels a side."""
    return (batch, (height // side) * (width // side), configs["transformer"]["in_channels"])


def patch_pixels(configs: Configs) -> int:
    """Return the pixels along one side of a patch of the transformer."""
    patch: int = configs["transformer"]["patch_size"]
    return scale_factor(configs["vae"]) * patch


def sample_size(configs: Configs) -> tuple[int, int]:
    """Return the height and width in pixels that the transformer was trained for."""
    side = configs["transformer"]["sample_size"] * scale_factor(configs["vae"])
    return side, side
