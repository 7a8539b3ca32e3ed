"""Stable Diffusion 3 and 3.5: Medium, Large and Large Turbo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..family import Family, Part
from ..latents import VAE, latent_shape, patch_pixels, sample_size
from ..modules import autoencoder_kl, clip_text, sd3_transformer_2d, t5_text
from ..modules.clip_text import ClipTextProjection
from ..modules.sd3_transformer_2d import SD3Transformer2D
from ..modules.t5_text import T5Text

if TYPE_CHECKING:
    from ..family import Configs


def _largest_size(configs: Configs) -> int:
    positions: int = configs["transformer"]["pos_embed_max_size"]
    return positions * patch_pixels(configs)


STABLE_DIFFUSION_3 = Family(
    name="stable-diffusion-3",
    pipelines={
        "text-to-image": "StableDiffusion3Pipeline",
        "image-to-image": "StableDiffusion3Img2ImgPipeline",
        "inpainting": "StableDiffusion3InpaintPipeline",
    },
    parts=(
        Part("text_encoder", "text_encoder", ClipTextProjection()),
        Part("text_encoder_2", "text_encoder_2", ClipTextProjection()),
        Part("text_encoder_3", "text_encoder_3", T5Text()),
        Part("transformer", "transformer", SD3Transformer2D()),
        *VAE,
    ),
    latent_shape=latent_shape,
    size_multiple=patch_pixels,
    default_size=sample_size,
    row_guidance=True,
    unguided_at_most=1.0,
    largest_size=_largest_size,
    tiny={
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", clip_text.TINY),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", clip_text.TINY),
        "text_encoder_3": ("transformers", "T5EncoderModel", t5_text.TINY),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_3": ("transformers", "T5Tokenizer", {}),
        "transformer": ("diffusers", "SD3Transformer2DModel", sd3_transformer_2d.TINY),
        "vae": ("diffusers", "AutoencoderKL", autoencoder_kl.TINY_16),
    },
)
