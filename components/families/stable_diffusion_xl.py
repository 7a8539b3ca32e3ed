"""Stable Diffusion XL and its Turbo."""

from __future__ import annotations

from ..family import Family, Part, Variant
from ..latents import VAE, latent_shape
from ..modules import autoencoder_kl, clip_text, controlnet, unet_2d_condition
from ..modules.clip_text import ClipTextHidden, ClipTextProjection
from ..modules.controlnet import ControlNet
from ..modules.unet_2d_condition import (
    UNet2DCondition,
    UNet2DConditionControlled,
    default_size,
    only_task,
    size_multiple,
)

_ADDED_CONDITIONS = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + clip_text.TINY["projection_dim"],
    "cross_attention_dim": 2 * clip_text.TINY["hidden_size"],
}

_TEXT_ENCODERS = (
    Part("text_encoder", "text_encoder", ClipTextHidden()),
    Part("text_encoder_2", "text_encoder_2", ClipTextProjection()),
)
_CONTROLNET = Variant(
    pipelines={
        "text-to-image": "StableDiffusionXLControlNetPipeline",
        "image-to-image": "StableDiffusionXLControlNetImg2ImgPipeline",
        "inpainting": "StableDiffusionXLControlNetInpaintPipeline",
    },
    parts=(
        *_TEXT_ENCODERS,
        Part("controlnet", "controlnet", ControlNet()),
        Part("unet", "unet", UNet2DConditionControlled()),
        *VAE,
    ),
    tiny={"controlnet": ("diffusers", "ControlNetModel", {**controlnet.TINY, **_ADDED_CONDITIONS})},
)

STABLE_DIFFUSION_XL = Family(
    name="stable-diffusion-xl",
    pipelines={
        "text-to-image": "StableDiffusionXLPipeline",
        "image-to-image": "StableDiffusionXLImg2ImgPipeline",
        "inpainting": "StableDiffusionXLInpaintPipeline",
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
            "EulerDiscreteScheduler",
            {"beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading"},
        ),
        "text_encoder": ("transformers", "CLIPTextModel", clip_text.TINY),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", clip_text.TINY),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "tokenizer_2": ("transformers", "CLIPTokenizer", {}),
        "unet": ("diffusers", "UNet2DConditionModel", {**unet_2d_condition.TINY, **_ADDED_CONDITIONS}),
        "vae": ("diffusers", "AutoencoderKL", autoencoder_kl.TINY),
    },
)
