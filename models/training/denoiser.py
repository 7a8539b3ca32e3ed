"""The UNet: v-prediction on the VAE's latents, the text encoder frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from tqdm import tqdm

from .data import generator_at, pixels
from .loop import Stage, optimize
from .tokenizer import tokenize

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from torch import Tensor

    from .data import Data
    from .recipe import Recipe

_LARGEST_SNR = 5.0
_LEAST_WEIGHT = 0.1


def train_denoiser(pipeline: StableDiffusionPipeline, data: Data, recipe: Recipe, state: Path) -> Stage:
    """Train on scenes of no held-out combination; sets the VAE's scaling factor to what makes latents of variance 1.

    The loss is of v-prediction (Salimans and Ho, 2022, appendix D), timesteps uniform, weighted by Min-SNR (Hang and
    others, 2023) and a floor: so every timestep counts about as much, where by itself the noisiest, whose error no
    training removes, would drown the fine details.
    """
    latents = _stored_latents(pipeline.vae, data.pictures[data.seen], state)
    pipeline.vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    latents = latents * pipeline.vae.config.scaling_factor
    tokens = tokenize(pipeline.tokenizer, [data.scenes[index].caption for index in data.seen])
    empty = tokenize(pipeline.tokenizer, [""])
    text_encoder, unet = pipeline.text_encoder, pipeline.unet.to(memory_format=torch.channels_last)
    text_encoder.requires_grad_(requires_grad=False)
    alphas = pipeline.scheduler.alphas_cumprod

    def loss_at(step: int) -> Tensor:
        generator = generator_at(recipe, 1, step)
        chosen = torch.randint(len(latents), (recipe.denoiser_batch,), generator=generator)
        dropped = torch.rand(len(chosen), 1, generator=generator) < recipe.empty_captions
        timesteps = torch.randint(1000, (len(chosen),), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        text = text_encoder(torch.where(dropped, empty, tokens[chosen]))[0]
        error = functional.mse_loss(unet(noisy, timesteps, text, return_dict=False)[0], velocity, reduction="none")
        return (_weight(alpha / (1 - alpha)) * error).mean()

    modules = torch.nn.ModuleDict({"unet": unet})
    steps, rate = recipe.denoiser_steps, recipe.denoiser_rate
    return optimize("denoiser", modules, loss_at, steps, rate, recipe.denoiser_ema, state)


def _weight(snr: Tensor) -> Tensor:
    """Return the weight of v-prediction's error at a signal-to-noise ratio."""
    return snr.clamp(max=_LARGEST_SNR) / (snr + 1) + _LEAST_WEIGHT


def _stored_latents(vae: AutoencoderKL, pictures: Tensor, state: Path) -> Tensor:
    """Return the means of the latents of all pictures: (N, 4, 16, 16) float32."""
    from safetensors.torch import load_file, save_file

    file = state / "latents.safetensors"
    if not file.exists():
        batches = tqdm(pictures.split(96), desc="latents", mininterval=10)
        with torch.no_grad():
            means = [vae.encode(pixels(batch)).latent_dist.mean for batch in batches]
        partial = file.with_suffix(".partial")
        save_file({"latents": torch.cat(means).contiguous()}, partial)
        partial.replace(file)
    return load_file(file)["latents"]
