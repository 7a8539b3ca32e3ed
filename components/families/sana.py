"""Sana."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..family import Family, Part
from ..modules import autoencoder_dc, gemma2_text, sana_transformer_2d
from ..modules.autoencoder_dc import DeepVaeDecoder, DeepVaeEncoder, scale_factor
from ..modules.gemma2_text import Gemma2Text
from ..modules.sana_transformer_2d import SanaTransformer2D

if TYPE_CHECKING:
    from ..family import Configs


def _latent_shape(configs: Configs, batch: int, height: int, width: int) -> tuple[int, ...]:
    scale = scale_factor(configs["vae"])
    return (batch, configs["vae"]["latent_channels"], height // scale, width // scale)


def _size_multiple(configs: Configs) -> int:
    patch: int = configs["transformer"]["patch_size"]
    return scale_factor(configs["vae"]) * patch


def _default_size(configs: Configs) -> tuple[int, int]:
    side = configs["transformer"]["sample_size"] * scale_factor(configs["vae"])
    return side, side


SANA = Family(
    name="sana",
    pipelines={"text-to-image": "SanaPipeline"},
    parts=(
        Part("text_encoder", "text_encoder", Gemma2Text()),
        Part("transformer", "transformer", SanaTransformer2D()),
        Part("vae_encoder", "vae", DeepVaeEncoder()),
        Part("vae_decoder", "vae", DeepVaeDecoder()),
    ),
    latent_shape=_latent_shape,
    size_multiple=_size_multiple,
    default_size=_default_size,
    row_guidance=True,
    unguided_at_most=1.0,
    tiny={
        "scheduler": (
            "diffusers",
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        ),
        "text_encoder": ("transformers", "Gemma2Model", gemma2_text.TINY),
        "tokenizer": ("transformers", "GemmaTokenizer", {}),
        "transformer": ("diffusers", "SanaTransformer2DModel", sana_transformer_2d.TINY),
        "vae": ("diffusers", "AutoencoderDC", autoencoder_dc.TINY),
    },
)
