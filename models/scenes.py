"""Captioned pictures of coloured shapes: what the embedded model learns to draw.

A scene is one or two shapes with a colour and a size, a relation between the two, and a background.
Its caption says all of that and nothing else, so that whether a picture shows its prompt can be checked exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLORS = {
    "red": (225, 40, 40),
    "green": (35, 165, 60),
    "blue": (40, 75, 225),
    "yellow": (250, 215, 30),
    "purple": (150, 50, 190),
    "cyan": (40, 205, 220),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}
SIZES = {"small": 8, "large": 13}
"""Radius of the circle around a shape, in pixels of a 64×64 picture."""
RELATIONS = ("left of", "right of", "above", "below")
"""Each beside its opposite."""

PICTURE_SIZE = 64
_MARGIN = 2
_GAP = 3
_JITTER = 4
_SUPERSAMPLING = 4
_ALONE = 0.25
"""Share of scenes with one shape."""


@dataclass(frozen=True)
class Item:
    """One shape of a scene."""

    size: str
    color: str
    shape: str

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"

    @property
    def radius(self) -> int:
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """One shape, or two and the relation of the first to the second."""

    background: str
    items: tuple[Item, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        subject = f" {self.relation} ".join(item.phrase for item in self.items)
        return f"{subject} on a {self.background} background"

    def render(self, rng: random.Random) -> Image:
        """Draw the scene at places that `rng` chooses within what the caption allows: a 64×64 RGB picture."""
        from PIL import Image, ImageDraw

        side = PICTURE_SIZE * _SUPERSAMPLING
        picture = Image.new("RGB", (side, side), BACKGROUNDS[self.background])
        draw = ImageDraw.Draw(picture)
        for item, (x, y) in zip(self.items, self._places(rng), strict=True):
            _draw_item(draw, item, x * _SUPERSAMPLING, y * _SUPERSAMPLING, BACKGROUNDS[self.background])
        return picture.reduce(_SUPERSAMPLING)

    def _places(self, rng: random.Random) -> list[tuple[float, float]]:
        """Centres of the items, in pixels; the relation holds without overlap."""
        if self.relation is None:
            return [(_anywhere(self.items[0].radius, rng), _anywhere(self.items[0].radius, rng))]
        reverse = self.relation in {"right of", "below"}
        ordered = self.items[::-1] if reverse else self.items
        slack = PICTURE_SIZE - 2 * _MARGIN - _GAP - 2 * sum(item.radius for item in ordered)
        before, between = sorted((rng.uniform(0, slack), rng.uniform(0, slack)))
        first = _MARGIN + before + ordered[0].radius
        second = first + ordered[0].radius + _GAP + (between - before) + ordered[1].radius
        widest = max(item.radius for item in ordered)
        across = _anywhere(widest + _JITTER, rng)
        places = [(along, across + rng.uniform(-_JITTER, _JITTER)) for along in (first, second)]
        if self.relation in {"above", "below"}:
            places = [(x, y) for y, x in places]
        return places[::-1] if reverse else places


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene: one shape in a quarter of the cases, else two that differ in shape or colour."""
    background = rng.choice(tuple(BACKGROUNDS))
    first = _random_item(rng)
    if rng.random() < _ALONE:
        return Scene(background, (first,))
    second = _random_item(rng)
    while (second.shape, second.color) == (first.shape, first.color):
        second = _random_item(rng)
    return Scene(background, (first, second), rng.choice(RELATIONS))


def is_held_out(scene: Scene) -> bool:
    """Whether the caption is kept out of training: one of its shapes has a place that its colour never has there.

    A tenth of all (colour, shape, place) is held out, place being where the relation puts the shape; every two of
    the three are seen together. Both captions of a picture, `a left of b` and `b right of a`, are in or out alike.
    """
    if scene.relation is None:
        return False
    first = RELATIONS.index(scene.relation)
    places = (first, first ^ 1)
    return any(_held_out(item, place) for item, place in zip(scene.items, places, strict=True))


def _held_out(item: Item, place: int) -> bool:
    return (tuple(COLORS).index(item.color) + 2 * SHAPES.index(item.shape) + 3 * place) % 10 == 0


def random_crowd(rng: random.Random) -> Image:
    """Draw five shapes anywhere, overlapping: no scene of the model's, but five times as much for a VAE to learn from."""
    from PIL import Image, ImageDraw

    background = BACKGROUNDS[rng.choice(tuple(BACKGROUNDS))]
    picture = Image.new("RGB", (PICTURE_SIZE * _SUPERSAMPLING,) * 2, background)
    draw = ImageDraw.Draw(picture)
    for _ in range(5):
        item = _random_item(rng)
        x, y = (_anywhere(item.radius, rng) * _SUPERSAMPLING for _ in range(2))
        _draw_item(draw, item, x, y, background)
    return picture.reduce(_SUPERSAMPLING)


def _random_item(rng: random.Random) -> Item:
    return Item(rng.choice(tuple(SIZES)), rng.choice(tuple(COLORS)), rng.choice(SHAPES))


def _anywhere(radius: int, rng: random.Random) -> float:
    return rng.uniform(_MARGIN + radius, PICTURE_SIZE - _MARGIN - radius)


def _draw_item(draw: ImageDraw, item: Item, x: float, y: float, background: tuple[int, int, int]) -> None:
    place = (x, y, item.radius * _SUPERSAMPLING)
    _draw_shape(draw, item.shape, place, COLORS[item.color], background)


def _draw_shape(draw: ImageDraw, shape: str, place: tuple[float, float, float], fill: Any, ground: Any) -> None:  # noqa: ANN401 - colours of any mode
    x, y, radius = place
    if shape in {"circle", "ring"}:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if shape == "ring":
            hole = radius * 0.55
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
    elif shape == "square":
        half = radius * 0.88
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        draw.polygon(_corners(shape, x, y, radius), fill=fill)


def coverage(shape: str, radius: float, x: float, y: float, side: int) -> NDArray[np.float32]:
    """Return which share of each pixel a shape around (x, y) covers: (side, side) float32 in [0, 1]."""
    import numpy as np
    from PIL import Image, ImageDraw

    picture = Image.new("L", (side * _SUPERSAMPLING,) * 2, 0)
    place = (x * _SUPERSAMPLING, y * _SUPERSAMPLING, radius * _SUPERSAMPLING)
    _draw_shape(ImageDraw.Draw(picture), shape, place, 255, 0)
    return np.asarray(picture.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of an upright triangle, or of a five-pointed star."""
    radii = [radius, radius * 0.45] * 5 if shape == "star" else [radius] * 3
    turn = 2 * math.pi / len(radii)
    return [(x + r * math.sin(i * turn), y - r * math.cos(i * turn)) for i, r in enumerate(radii)]
