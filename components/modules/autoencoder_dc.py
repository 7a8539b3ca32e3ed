"""The two halves of AutoencoderDC, which makes few, deep latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..component import Component, Port, Sizes
from ..loading import load_diffusers
from .autoencoder_kl import FlatHalf, RunnerModule, runtime_vae
from .sana_transformer_2d import linear_attention

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

_TINY_HALF: dict[str, Any] = {
    "block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "block_out_channels": (16, 16, 32, 32, 32),
    "layers_per_block": (1,) * 5,
    "qkv_multiscales": ((), (), (), (5,), (5,)),
}
TINY: dict[str, Any] = {
    **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _TINY_HALF.items()},
    "latent_channels": 8,
    "attention_head_dim": 16,
    "scaling_factor": 0.4,
}
"""A config of a tiny model for tests: 8 latents, 16 pixels each."""


def scale_factor(config: Config) -> int:
    """Pixels a latent, along one side."""
    return int(2 ** (len(config["encoder_block_out_channels"]) - 1))


class _AutoencoderDCHalf(Component):
    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import AutoencoderDC

        return load_diffusers(AutoencoderDC, folder, dtype)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        (port,) = self.inputs(config)
        return {port.name: torch.randn(port.shape(sizes.as_dict()), generator=generator)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import AutoencoderDC

        vae = runtime_vae(AutoencoderDC, config)
        vae.encoder = RunnerModule(runners.get("vae_encoder"), "sample", "latent")
        vae.decoder = RunnerModule(runners.get("vae_decoder"), "latent_sample", "sample")
        return vae


class DeepVaeEncoder(_AutoencoderDCHalf):
    """`sample (batch, 3, s*height, s*width) in [-1, 1] -> latent (batch, C, height, width)`, before the scaling factor."""

    name = "deep-vae-encoder"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        s = scale_factor(config)
        return (Port("sample", "float32", ("batch", config.get("in_channels", 3), f"{s}*height", f"{s}*width")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("latent", "float32", ("batch", config["latent_channels"], "height", "width")),)

    def flat(self, module: nn.Module) -> nn.Module:
        return FlatHalf(_with_linear_attention(module), "encoder")


class DeepVaeDecoder(_AutoencoderDCHalf):
    """`latent_sample (batch, C, height, width) -> sample (batch, 3, s*height, s*width)`, already unscaled."""

    name = "deep-vae-decoder"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("latent_sample", "float32", ("batch", config["latent_channels"], "height", "width")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        s = scale_factor(config)
        return (Port("sample", "float32", ("batch", config.get("in_channels", 3), f"{s}*height", f"{s}*width")),)

    def flat(self, module: nn.Module) -> nn.Module:
        return FlatHalf(_with_linear_attention(module), "decoder")


def _with_linear_attention(vae: nn.Module) -> nn.Module:
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    for module in vae.modules():
        if isinstance(module, SanaMultiscaleLinearAttention):
            module.processor = _multiscale_attention
    return vae


def _multiscale_attention(attn: Any, hidden_states: Tensor) -> Tensor:  # noqa: ANN401 - Diffusers' SanaMultiscaleLinearAttention
    """Attend as Diffusers does, and for small pictures too, where it would sum the same in another order."""
    batch, _, height, width = hidden_states.shape
    channels_last = hidden_states.movedim(1, -1)
    projected = [layer(channels_last) for layer in (attn.to_q, attn.to_k, attn.to_v)]
    plain = torch.cat(projected, dim=3).movedim(-1, 1)
    scales = torch.cat([plain, *(block(plain) for block in attn.to_qkv_multiscale)], dim=1)
    heads = scales.float().reshape(batch, -1, 3 * attn.attention_head_dim, height * width)
    query, key, value = heads.chunk(3, dim=2)
    attended = linear_attention(query, key, value, attn.eps).to(hidden_states.dtype)
    output = attn.to_out(attended.reshape(batch, -1, height, width).movedim(1, -1))
    if attn.norm_type == "rms_norm":
        output = attn.norm_out(output).movedim(-1, 1)
    else:
        output = attn.norm_out(output.movedim(-1, 1))
    return output + hidden_states if attn.residual_connection else output
