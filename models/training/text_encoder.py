"""The text encoder, before any picture: linear heads must read the scene back from its hidden states.

A UNet that learns words from pixels spends most of its training on it. Here the tokens that pad the caption learn to
say what is where: those at even positions the shape that comes first in the picture (the left or the upper one), those
at odd positions the other, each with size, colour, shape, place and background. So a UNet's cross-attention only has
to find the token that speaks of its place. The heads are then thrown away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ..scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES
from .data import generator_at
from .loop import Stage, optimize
from .tokenizer import tokenize

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from ..scenes import Item, Scene
    from .data import Data
    from .recipe import Recipe

_ALONE = len(RELATIONS)
_NOTHING = (len(SIZES), len(COLORS), len(SHAPES), _ALONE + 1)
"""Labels of an item that isn't there."""
_COUNTS = (len(BACKGROUNDS), *(count + 1 for count in _NOTHING))


def train_text_encoder(pipeline: StableDiffusionPipeline, data: Data, recipe: Recipe, state: Path) -> Stage:
    """Train the text encoder to be read by linear heads, on captions of no held-out combination."""
    scenes = [data.scenes[index] for index in data.seen]
    text_encoder = pipeline.text_encoder
    ids = tokenize(pipeline.tokenizer, [scene.caption for scene in scenes])
    padding = ids == pipeline.tokenizer.eos_token_id
    labels = torch.tensor([_labels(scene) for scene in scenes])
    heads = torch.nn.Linear(text_encoder.config.hidden_size, sum(_COUNTS))
    odd = torch.arange(ids.shape[1]) % 2

    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(len(ids), (recipe.text_batch,), generator=generator_at(recipe, 2, step))
        hidden, speaks = text_encoder(ids[chosen])[0], padding[chosen]
        return _cross_entropies(heads(hidden[speaks]), labels[chosen][:, odd][speaks])

    modules = torch.nn.ModuleDict({"text_encoder": text_encoder, "heads": heads})
    return optimize("text_encoder", modules, loss_at, recipe.text_steps, recipe.text_rate, 0.98, state)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    columns = zip(logits.split(_COUNTS, dim=1), labels.unbind(dim=1), strict=True)
    return torch.stack([functional.cross_entropy(some, label) for some, label in columns]).mean()


def _labels(scene: Scene) -> list[list[int]]:
    """Return the labels of the left or upper item, and of the other."""
    background = tuple(BACKGROUNDS).index(scene.background)
    if scene.relation is None:
        return [[background, *_item_labels(scene.items[0], _ALONE)], [background, *_NOTHING]]
    place = RELATIONS.index(scene.relation)
    both = [[background, *_item_labels(item, at)] for item, at in zip(scene.items, (place, place ^ 1), strict=True)]
    return both[::-1] if place % 2 else both


def _item_labels(item: Item, place: int) -> list[int]:
    return [tuple(SIZES).index(item.size), tuple(COLORS).index(item.color), SHAPES.index(item.shape), place]
