"""The text encoder, before any picture: linear heads must read the scene back from its hidden states.

A UNet that learns words from pixels spends most of its training on it. Here the end token learns to say all of the
scene, and each shape's word to say its size, colour and shape; the heads are then thrown away.
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

_ITEM = (len(SIZES), len(COLORS), len(SHAPES))
_SCENE = (len(BACKGROUNDS), len(RELATIONS) + 1, *_ITEM, *(count + 1 for count in _ITEM))
_NONE = -100
"""Label of a head that a token has nothing to say to; cross_entropy ignores it."""


def train_text_encoder(pipeline: StableDiffusionPipeline, data: Data, recipe: Recipe, state: Path) -> Stage:
    """Train the text encoder to be read by linear heads, on captions of no held-out combination."""
    scenes = [data.scenes[index] for index in data.seen]
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    ids = tokenize(tokenizer, [scene.caption for scene in scenes])
    ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
    words = torch.tensor([token for shape in SHAPES for token in tokenizer(shape, add_special_tokens=False).input_ids])
    nouns = torch.isin(ids, words)
    scene_labels = torch.tensor([_scene_labels(scene) for scene in scenes])
    item_labels = torch.full((*ids.shape, len(_ITEM)), _NONE)
    item_labels[nouns] = torch.tensor([_item_labels(item) for scene in scenes for item in scene.items])
    width = text_encoder.config.hidden_size
    heads = torch.nn.ModuleDict(
        {"scene": torch.nn.Linear(width, sum(_SCENE)), "item": torch.nn.Linear(width, sum(_ITEM))}
    )

    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(len(ids), (recipe.text_batch,), generator=generator_at(recipe, 2, step))
        hidden = text_encoder(ids[chosen])[0]
        at_end = hidden[torch.arange(len(chosen)), ends[chosen]]
        return _cross_entropies(heads["scene"](at_end), scene_labels[chosen], _SCENE) + _cross_entropies(
            heads["item"](hidden).flatten(0, 1), item_labels[chosen].flatten(0, 1), _ITEM
        )

    modules = torch.nn.ModuleDict({"text_encoder": text_encoder, "heads": heads})
    return optimize("text_encoder", modules, loss_at, recipe.text_steps, recipe.text_rate, 0.98, state)


def _cross_entropies(logits: Tensor, labels: Tensor, counts: tuple[int, ...]) -> Tensor:
    columns = zip(logits.split(counts, dim=1), labels.unbind(dim=1), strict=True)
    return torch.stack([functional.cross_entropy(some, label) for some, label in columns]).mean()


def _item_labels(item: Item) -> list[int]:
    return [tuple(SIZES).index(item.size), tuple(COLORS).index(item.color), SHAPES.index(item.shape)]


def _scene_labels(scene: Scene) -> list[int]:
    first = _item_labels(scene.items[0])
    second = _item_labels(scene.items[1]) if scene.relation else list(_ITEM)
    relation = RELATIONS.index(scene.relation) if scene.relation else len(RELATIONS)
    return [tuple(BACKGROUNDS).index(scene.background), relation, *first, *second]
