"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..family import Family, Part
from ..latents import VAE, latent_shape
from ..modules import autoencoder_kl, qwen3_text, z_image_transformer_2d
from ..modules.autoencoder_kl import scale_factor
from ..modules.qwen3_text import Qwen3Text
from ..modules.z_image_transformer_2d import ZImageTransformer2D

if TYPE_CHECKING:
    from ..family import Configs

_PATCH = 2
_DEFAULT_SIDE = 1024


def _size_multiple(configs: Configs) -> int:
    return scale_factor(configs["vae"]) * _PATCH


def _largest_size(configs: Configs) -> int:
    lengths = configs["transformer"].get("axes_lens", (1024, 512, 512))
    return min(lengths[1:]) * _size_multiple(configs)


Z_IMAGE = Family(
    name="z-image",
    pipelines={
        "text-to-image": "ZImagePipeline",
        "image-to-image": "ZImageImg2ImgPipeline",
        "inpainting": "ZImageInpaintPipeline",
    },
    parts=(
        Part("text_encoder", "text_encoder", Qwen3Text()),
        Part("transformer", "transformer", ZImageTransformer2D()),
        *VAE,
    ),
    latent_shape=latent_shape,
    size_multiple=_size_multiple,
    default_size=lambda _: (_DEFAULT_SIDE, _DEFAULT_SIDE),
    row_guidance=False,
    unguided_at_most=0.0,
    largest_size=_largest_size,
    tiny={
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        "text_encoder": ("transformers", "Qwen3Model", qwen3_text.TINY),
        "tokenizer": ("transformers", "Qwen2Tokenizer", {}),
        "transformer": ("diffusers", "ZImageTransformer2DModel", z_image_transformer_2d.TINY),
        "vae": ("diffusers", "AutoencoderKL", autoencoder_kl.TINY_16),
    },
)
