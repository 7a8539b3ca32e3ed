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
