"""What decides the weights of `shapes`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the machine's arithmetic. Rates are peaks of one cycle."""

    seed: int = 0
    scenes: int = 24_000
    crowds: int = 6_000
    vae_steps: int = 1_200
    vae_batch: int = 8
    vae_rate: float = 1e-3
    vae_ema: float = 0.98
    text_steps: int = 1_000
    text_batch: int = 64
    text_rate: float = 1e-3
    denoiser_steps: int = 4_000
    denoiser_batch: int = 32
    denoiser_rate: float = 1e-3
    denoiser_ema: float = 0.998
    empty_captions: float = 0.1
