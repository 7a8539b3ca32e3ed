"""The two halves of AutoencoderKLQwenImage, which knows videos: here one of a single frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..component import Component, Port, Sizes
from ..loading import load_diffusers
from .autoencoder_kl import RunnerModule, runtime_vae

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..component import Config, Runner

TINY: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
"""A config of a tiny model for tests: 16 latents, 8 pixels each."""


def scale_factor(config: Config) -> int:
    """Pixels a latent, along one side."""
    return int(2 ** len(config["temperal_downsample"]))


class _AutoencoderKLQwenImageHalf(Component):
    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import AutoencoderKLQwenImage

        return load_diffusers(AutoencoderKLQwenImage, folder, dtype)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        (port,) = self.inputs(config)
        return {port.name: torch.randn(port.shape(sizes.as_dict()), generator=generator)}

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        from diffusers import AutoencoderKLQwenImage

        vae = runtime_vae(AutoencoderKLQwenImage, config)
        vae.encoder = _FrameRunner(runners.get("vae_encoder"), "sample", "latent_parameters")
        vae.decoder = _FrameRunner(runners.get("vae_decoder"), "latent_sample", "sample")
        vae.quant_conv = vae.post_quant_conv = nn.Identity()
        return vae


class FrameVaeEncoder(_AutoencoderKLQwenImageHalf):
    """`sample (batch, 3, s*height, s*width) in [-1, 1] -> latent_parameters (batch, 2*C, height, width)`.

    The parameters are mean and log-variance, before they are shifted and scaled; s is the VAE's scale factor.
    """

    name = "frame-vae-encoder"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        s = scale_factor(config)
        return (Port("sample", "float32", ("batch", config.get("input_channels", 3), f"{s}*height", f"{s}*width")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("latent_parameters", "float32", ("batch", 2 * config["z_dim"], "height", "width")),)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatEncoder(module)


class FrameVaeDecoder(_AutoencoderKLQwenImageHalf):
    """`latent_sample (batch, C, height, width) -> sample (batch, 3, s*height, s*width) in [-1, 1]`."""

    name = "frame-vae-decoder"

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return (Port("latent_sample", "float32", ("batch", config["z_dim"], "height", "width")),)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        s = scale_factor(config)
        return (Port("sample", "float32", ("batch", config.get("input_channels", 3), f"{s}*height", f"{s}*width")),)

    def flat(self, module: nn.Module) -> nn.Module:
        return _FlatDecoder(module)


class _FlatEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:  # noqa: ANN401 - an AutoencoderKLQwenImage
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.quant_conv(_first_frame(self.encoder, sample))[:, :, 0],)


class _FlatDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:  # noqa: ANN401 - an AutoencoderKLQwenImage
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        for module in self.decoder.modules():
            if isinstance(module, nn.Upsample):
                module.mode = "nearest"  # the same as nearest-exact for whole factors, and backends know it

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        latents = self.post_quant_conv(latent_sample.unsqueeze(2))
        return (_first_frame(self.decoder, latents[:, :, 0])[:, :, 0].clamp(-1.0, 1.0),)


def _first_frame(half: nn.Module, frame: Tensor) -> Tensor:
    """Run a half on (batch, C, height, width) as on a video's first frame: with a cache of nothing for each layer."""
    return half(frame.unsqueeze(2), feat_cache=[None] * len(list(half.modules())), feat_idx=[0])


class _FrameRunner(RunnerModule):
    def forward(self, tensor: Tensor, **_: Any) -> Tensor:  # noqa: ANN401 - Diffusers' caches of earlier frames
        if tensor.shape[2] != 1:
            message = f"the exported VAE takes one frame, got {tensor.shape[2]}"
            raise InputError(message, fix="use the original Diffusers pipeline for videos")
        return super().forward(tensor[:, :, 0]).unsqueeze(2)
