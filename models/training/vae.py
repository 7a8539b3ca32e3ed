"""The VAE: L1 on values and edges, shapes counting more, a little divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .data import generator_at, pixels
from .loop import Stage, optimize

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import Tensor

    from .data import Data
    from .recipe import Recipe

_FOREGROUND = 0.2
"""Least difference from the corner's colour, summed over channels of [-1, 1], of a shape's pixel."""
_DIVERGENCE = 1e-5


def train_vae(vae: AutoencoderKL, data: Data, recipe: Recipe, state: Path) -> Stage:
    """Train on scenes and crowds, half of each batch of either."""
    vae = vae.to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        generator = generator_at(recipe, 0, step)
        half = (recipe.vae_batch // 2,)
        chosen = [some[torch.randint(len(some), half, generator=generator)] for some in (data.pictures, data.crowds)]
        noise = torch.randn(recipe.vae_batch, 4, 16, 16, generator=generator)
        return _loss(vae, pixels(torch.cat(chosen)), noise)

    modules = torch.nn.ModuleDict({"vae": vae})
    return optimize("vae", modules, loss_at, recipe.vae_steps, recipe.vae_rate, recipe.vae_ema, state)


def _loss(vae: AutoencoderKL, wanted: Tensor, noise: Tensor) -> Tensor:
    posterior = vae.encode(wanted).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    decoded = vae.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0]
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return _picture_distance(decoded, wanted) + _DIVERGENCE * divergence


def _picture_distance(decoded: Tensor, wanted: Tensor) -> Tensor:
    """L1 on values and on differences between neighbours, which keeps edges sharp.

    The shapes count five times: they are a tenth of the picture, and all of its meaning.
    """
    foreground = (wanted - wanted[:, :, :1, :1]).abs().sum(dim=1, keepdim=True) > _FOREGROUND
    error = (decoded - wanted) * (1 + 4 * foreground)
    edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    return error.abs().mean() + edges
