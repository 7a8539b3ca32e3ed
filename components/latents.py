"""The shape of latents, where a pipeline has them as pictures of a few channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .modules.autoencoder_kl import scale_factor

if TYPE_CHECKING:
    from .family import Configs


def latent_shape(configs: Configs, batch: int, height: int, width: int) -> tuple[int, ...]:
    """Return (batch, the VAE's channels, height, width in latents) for a size in pixels."""
    scale = scale_factor(configs["vae"])
    return (batch, configs["vae"]["latent_channels"], height // scale, width // scale)
