"""The pictures that are trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from ..scenes import is_held_out, random_crowd, random_scene

if TYPE_CHECKING:
    from torch import Tensor

    from ..scenes import Scene
    from .recipe import Recipe


@dataclass(frozen=True)
class Data:
    """Scenes with their pictures, and pictures full of shapes for the VAE: (N, 64, 64, 3) uint8."""

    scenes: list[Scene]
    pictures: Tensor
    crowds: Tensor

    @property
    def seen(self) -> list[int]:
        """Indices of scenes whose caption may be trained on: those of no held-out combination."""
        return [index for index, scene in enumerate(self.scenes) if not is_held_out(scene)]


def draw(recipe: Recipe) -> Data:
    """Draw scenes and crowds from the recipe's seed."""
    rng = random.Random(recipe.seed)
    scenes = [random_scene(rng) for _ in range(recipe.scenes)]
    pictures = [np.asarray(scene.render(rng)) for scene in tqdm(scenes, desc="scenes", mininterval=10)]
    rng = random.Random(recipe.seed)
    crowds = [np.asarray(random_crowd(rng)) for _ in tqdm(range(recipe.crowds), desc="crowds", mininterval=10)]
    return Data(scenes, torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(crowds)))


def pixels(pictures: Tensor) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def generator_at(recipe: Recipe, stage: int, step: int) -> torch.Generator:
    """Return the random numbers of one step of one stage, whatever was drawn before."""
    return torch.Generator().manual_seed(recipe.seed * 1_000_003 + stage * 500_000 + step)
