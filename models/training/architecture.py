"""The untrained pipeline. Linear layers are multiples of 64 in and 32 out, as low-bit kernels want."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .tokenizer import LONGEST_PROMPT

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

_WIDTH = 128
"""Width of the text encoder, and of what the UNet's cross-attention reads."""


def new_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Build the pipeline with random weights; at most 16 MB in fp16."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=new_vae(),
        text_encoder=_new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=_new_unet(),
        scheduler=_new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def new_vae() -> AutoencoderKL:
    """Build a VAE of factor 4: (B, 3, 64, 64) <-> latents (B, 4, 16, 16)."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )
    _quieten(vae)
    return vae


def _quieten(vae: AutoencoderKL) -> None:
    """Start with little posterior noise, or the decoder learns to ignore the latents."""
    moments = vae.quant_conv
    assert moments is not None  # noqa: S101 - the configuration above has one
    assert moments.bias is not None  # noqa: S101
    with torch.no_grad():
        moments.weight[vae.config.latent_channels :] *= 0.1
        moments.bias[vae.config.latent_channels :] = -6


def _new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=_WIDTH,
            max_position_embeddings=LONGEST_PROMPT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _new_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=_WIDTH,
    )


def _new_scheduler() -> DDIMScheduler:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
