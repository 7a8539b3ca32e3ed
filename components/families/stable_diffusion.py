"""Stable Diffusion 1.x and 2.x, and the embedded model `shapes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..family import Family, Part
from ..modules.autoencoder_kl import VaeDecoder, VaeEncoder, scale_factor
from ..modules.clip_text import ClipText
from ..modules.unet_2d_condition import UNet2DCondition

if TYPE_CHECKING:
    from ..family import Configs


def _latent_shape(configs: Configs, batch: int, height: int, width: int) -> tuple[int, ...]:
    scale = scale_factor(configs["vae"])
    return (batch, configs["unet"]["in_channels"], height // scale, width // scale)


def _default_size(configs: Configs) -> tuple[int, int]:
    sample = configs["unet"]["sample_size"]
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    scale = scale_factor(configs["vae"])
    return height * scale, width * scale


def _size_multiple(configs: Configs) -> int:
    """Return what the pipeline (8), the VAE, and the UNet's down- and upsampling can divide without a remainder."""
    levels = len(configs["unet"]["block_out_channels"]) - 1
    return max(8, scale_factor(configs["vae"]) * 2**levels)


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    pipelines={"text-to-image": "StableDiffusionPipeline"},
    parts=(
        Part("text_encoder", "text_encoder", ClipText()),
        Part("unet", "unet", UNet2DCondition()),
        Part("vae_encoder", "vae", VaeEncoder()),
        Part("vae_decoder", "vae", VaeDecoder()),
    ),
    latent_shape=_latent_shape,
    size_multiple=_size_multiple,
    default_size=_default_size,
    row_guidance=True,
    unguided_at_most=1.0,
)
