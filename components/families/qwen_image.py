"""Qwen-Image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..family import Family, Part
from ..latents import packed_latent_shape
from ..modules import autoencoder_kl_qwen_image, qwen2_5_vl_text, qwen_image_transformer_2d
from ..modules.autoencoder_kl_qwen_image import FrameVaeDecoder, FrameVaeEncoder, scale_factor
from ..modules.qwen2_5_vl_text import Qwen25VLText
from ..modules.qwen_image_transformer_2d import QwenImageTransformer2D

if TYPE_CHECKING:
    from ..family import Configs

_DEFAULT_LATENTS = 128


def _latent_shape(configs: Configs, batch: int, height: int, width: int) -> tuple[int, ...]:
    return packed_latent_shape(_size_multiple(configs), configs, batch, height, width)


def _size_multiple(configs: Configs) -> int:
    patch: int = configs["transformer"]["patch_size"]
    return scale_factor(configs["vae"]) * patch


def _default_size(configs: Configs) -> tuple[int, int]:
    side = _DEFAULT_LATENTS * scale_factor(configs["vae"])
    return side, side


QWEN_IMAGE = Family(
    name="qwen-image",
    pipelines={
        "text-to-image": "QwenImagePipeline",
        "image-to-image": "QwenImageImg2ImgPipeline",
        "inpainting": "QwenImageInpaintPipeline",
    },
    parts=(
        Part("text_encoder", "text_encoder", Qwen25VLText()),
        Part("transformer", "transformer", QwenImageTransformer2D()),
        Part("vae_encoder", "vae", FrameVaeEncoder()),
        Part("vae_decoder", "vae", FrameVaeDecoder()),
    ),
    latent_shape=_latent_shape,
    size_multiple=_size_multiple,
    default_size=_default_size,
    row_guidance=False,
    unguided_at_most=1.0,
    guidance_argument="true_cfg_scale",
    unconditional=" ",
    tiny={
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", qwen2_5_vl_text.TINY),
        "tokenizer": ("transformers", "Qwen2Tokenizer", {}),
        "transformer": ("diffusers", "QwenImageTransformer2DModel", qwen_image_transformer_2d.TINY),
        "vae": ("diffusers", "AutoencoderKLQwenImage", autoencoder_kl_qwen_image.TINY),
    },
)
