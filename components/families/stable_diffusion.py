"""Stable Diffusion 1.x and 2.x, and the embedded model `shapes`."""

from __future__ import annotations

from ..family import Family, Part, Variant
from ..latents import VAE, latent_shape
from ..modules import autoencoder_kl, clip_text, controlnet, unet_2d_condition
from ..modules.clip_text import ClipText
from ..modules.controlnet import ControlNet
from ..modules.unet_2d_condition import (
    UNet2DCondition,
    UNet2DConditionControlled,
    default_size,
    only_task,
    size_multiple,
)

_TEXT_ENCODERS = (Part("text_encoder", "text_encoder", ClipText()),)
_CONTROLNET = Variant(
    pipelines={
        "text-to-image": "StableDiffusionControlNetPipeline",
        "image-to-image": "StableDiffusionControlNetImg2ImgPipeline",
        "inpainting": "StableDiffusionControlNetInpaintPipeline",
    },
    parts=(
        *_TEXT_ENCODERS,
        Part("controlnet", "controlnet", ControlNet()),
        Part("unet", "unet", UNet2DConditionControlled()),
        *VAE,
    ),
    tiny={"controlnet": ("diffusers", "ControlNetModel", controlnet.TINY)},
)

STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    pipelines={
        "text-to-image": "StableDiffusionPipeline",
        "image-to-image": "StableDiffusionImg2ImgPipeline",
        "inpainting": "StableDiffusionInpaintPipeline",
    },
    parts=(*_TEXT_ENCODERS, Part("unet", "unet", UNet2DCondition()), *VAE),
    latent_shape=latent_shape,
    size_multiple=size_multiple,
    default_size=default_size,
    row_guidance=True,
    unguided_at_most=1.0,
    only=only_task,
    variants={"controlnet": _CONTROLNET},
    tiny={
        "scheduler": (
            "diffusers",
            "DDIMScheduler",
            {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1},
        ),
        "text_encoder": ("transformers", "CLIPTextModel", clip_text.TINY),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "unet": ("diffusers", "UNet2DConditionModel", unet_2d_condition.TINY),
        "vae": ("diffusers", "AutoencoderKL", autoencoder_kl.TINY),
    },
)
