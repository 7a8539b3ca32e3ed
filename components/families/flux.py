"""FLUX.1: dev and schnell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..family import Family, Part, Variant
from ..latents import VAE, packed_latent_shape
from ..modules import autoencoder_kl, clip_text, flux_controlnet, flux_transformer_2d, t5_text
from ..modules.autoencoder_kl import scale_factor
from ..modules.clip_text import ClipText
from ..modules.flux_controlnet import FluxControlNet
from ..modules.flux_transformer_2d import FluxTransformer2D, FluxTransformer2DControlled
from ..modules.t5_text import T5Text

if TYPE_CHECKING:
    from ..family import Configs

_PATCH = 2
_DEFAULT_LATENTS = 128


def _latent_shape(configs: Configs, batch: int, height: int, width: int) -> tuple[int, ...]:
    return packed_latent_shape(_size_multiple(configs), configs, batch, height, width)


def _size_multiple(configs: Configs) -> int:
    return scale_factor(configs["vae"]) * _PATCH


def _default_size(configs: Configs) -> tuple[int, int]:
    side = _DEFAULT_LATENTS * scale_factor(configs["vae"])
    return side, side


_TEXT_ENCODERS = (
    Part("text_encoder", "text_encoder", ClipText()),
    Part("text_encoder_2", "text_encoder_2", T5Text()),
)
_CONTROLNET = Variant(
    pipelines={
        "text-to-image": "FluxControlNetPipeline",
        "image-to-image": "FluxControlNetImg2ImgPipeline",
        "inpainting": "FluxControlNetInpaintPipeline",
    },
    parts=(
        *_TEXT_ENCODERS,
        Part("controlnet", "controlnet", FluxControlNet()),
        Part("transformer", "transformer", FluxTransformer2DControlled()),
        *VAE,
    ),
    tiny={"controlnet": ("diffusers", "FluxControlNetModel", flux_controlnet.TINY)},
)

FLUX = Family(
    name="flux",
    pipelines={
        "text-to-image": "FluxPipeline",
        "image-to-image": "FluxImg2ImgPipeline",
        "inpainting": "FluxInpaintPipeline",
    },
    parts=(*_TEXT_ENCODERS, Part("transformer", "transformer", FluxTransformer2D()), *VAE),
    latent_shape=_latent_shape,
    size_multiple=_size_multiple,
    default_size=_default_size,
    row_guidance=False,
    unguided_at_most=-math.inf,
    negative_prompts=False,
    variants={"controlnet": _CONTROLNET},
    tiny={
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        "text_encoder": ("transformers", "CLIPTextModel", clip_text.TINY),
        "text_encoder_2": ("transformers", "T5EncoderModel", t5_text.TINY),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "T5Tokenizer", {}),
        "transformer": ("diffusers", "FluxTransformer2DModel", flux_transformer_2d.TINY),
        "vae": ("diffusers", "AutoencoderKL", autoencoder_kl.TINY_16),
    },
)
