"""PixArt: Alpha and Sigma."""

from __future__ import annotations

from dataclasses import replace

from ..family import Family, Part
from ..latents import VAE, latent_shape, patch_pixels, sample_size
from ..modules import autoencoder_kl, pixart_transformer_2d, t5_text
from ..modules.pixart_transformer_2d import PixArtTransformer2D
from ..modules.t5_text import T5TextMasked

PIXART_SIGMA = Family(
    name="pixart-sigma",
    pipelines={"text-to-image": "PixArtSigmaPipeline"},
    parts=(
        Part("text_encoder", "text_encoder", T5TextMasked()),
        Part("transformer", "transformer", PixArtTransformer2D()),
        *VAE,
    ),
    latent_shape=latent_shape,
    size_multiple=patch_pixels,
    default_size=sample_size,
    row_guidance=True,
    unguided_at_most=1.0,
    tiny={
        "scheduler": ("diffusers", "DPMSolverMultistepScheduler", {}),
        "text_encoder": ("transformers", "T5EncoderModel", t5_text.TINY),
        "tokenizer": ("transformers", "T5Tokenizer", {}),
        "transformer": ("diffusers", "PixArtTransformer2DModel", pixart_transformer_2d.TINY),
        "vae": ("diffusers", "AutoencoderKL", autoencoder_kl.TINY),
    },
)

PIXART_ALPHA = replace(
    PIXART_SIGMA,
    name="pixart-alpha",
    pipelines={"text-to-image": "PixArtAlphaPipeline"},
    fewest_steps=2,  # at one, Diffusers takes what only the scheduler of a distilled model (DMD) gives
    tiny={
        **PIXART_SIGMA.tiny,
        "transformer": ("diffusers", "PixArtTransformer2DModel", pixart_transformer_2d.TINY_WITH_SIZES),
    },
)
