"""Reads a picture of `shapes` and says, attribute by attribute, whether it shows what its prompt says.

Analysis by synthesis, no learnt weights: the picture is split into a background and blobs of one colour; each blob's
coverage is compared with that of every shape as the scene generator draws it (several radii, places within a pixel and
blurs), and the nearest drawing names it, if it is near enough. Frozen: `scorer_hash()` is in every record.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Item, Scene, coverage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

ATTRIBUTES = ("background", "count", "shape", "color", "size", "relation")

_BACKGROUND_DISTANCE = 48.0
"""Farthest that the background may be from its colour, as Euclidean distance in levels of RGB."""
_SEED_DISTANCE = 80.0
"""A pixel nearer than this to a colour, and nearest to it, may seed a blob."""
_SEED_PIXELS = 10
_REACH = 4
"""Pixels around its seeds in which a blob's soft edge lies."""
_PATCH = 40
_RADII = {"small": (6.5, 7.2, 8.0, 8.8, 9.7), "large": (11.0, 12.0, 13.0, 14.0, 15.0)}
_OFFSETS = (-0.375, -0.125, 0.125, 0.375)
_BLURS = (0.0, 0.8, 1.3)
_FARTHEST = 0.15
"""Largest difference from the nearest drawing, as a share of both energies, of a blob that counts as a shape."""


@dataclass(frozen=True)
class Found:
    """One blob: what it is, and its centre (x, y) in pixels."""

    color: str
    shape: str | None
    size: str | None
    center: tuple[float, float]
    misfit: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str | None
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """Which attributes of the prompt the picture shows; `relation` is true where the prompt has none."""

    background: bool
    count: bool
    shape: bool
    color: bool
    size: bool
    relation: bool

    @property
    def right(self) -> bool:
        return all(getattr(self, attribute) for attribute in ATTRIBUTES)


def score(prompt: str | Scene, picture: NDArray[np.uint8]) -> Verdict:
    """Judge a picture (64, 64, 3) uint8 by its prompt.

    Raises:
        InputError: the prompt isn't a caption of a scene, or the picture has another shape or dtype.
    """
    scene = prompt if isinstance(prompt, Scene) else parse_caption(prompt)
    reading = read(picture)
    return max((_verdict(scene, reading, order) for order in _orders(reading)), key=_rightness)


def parse_caption(caption: str) -> Scene:
    """Return the scene that a caption describes; the inverse of `Scene.caption`.

    Raises:
        InputError: it is no such caption.
    """
    match = _grammar().fullmatch(caption.strip().lower())
    if match is None:
        message = f"{caption!r} is no caption of a scene, such as {_EXAMPLE.caption!r}"
        raise InputError(message)
    items = tuple(Item(match[f"size{n}"], match[f"color{n}"], match[f"shape{n}"]) for n in (1, 2) if match[f"size{n}"])
    return Scene(match["background"], items, match["relation"])


_EXAMPLE = Scene("gray", (Item("small", "red", "star"), Item("large", "blue", "ring")), "left of")


@cache
def _grammar() -> re.Pattern[str]:
    def item(number: int) -> str:
        return (
            f"an? (?P<size{number}>{'|'.join(SIZES)}) (?P<color{number}>{'|'.join(COLORS)})"
            f" (?P<shape{number}>{'|'.join(SHAPES)})"
        )

    relation = f"(?: (?P<relation>{'|'.join(RELATIONS)}) {item(2)})?"
    return re.compile(f"{item(1)}{relation} on an? (?P<background>{'|'.join(BACKGROUNDS)}) background")


def read(picture: NDArray[np.uint8]) -> Reading:
    """Find the background and the shapes of a picture (64, 64, 3) uint8.

    Raises:
        InputError: another shape or dtype.
    """
    if picture.dtype != np.uint8 or picture.shape != (64, 64, 3):
        message = f"got a picture of {picture.shape} {picture.dtype}, expected (64, 64, 3) uint8"
        raise InputError(message)
    pixels = picture.astype(np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    distances = {name: float(np.linalg.norm(ground - np.asarray(rgb, np.float32))) for name, rgb in BACKGROUNDS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    background = nearest if distances[nearest] <= _BACKGROUND_DISTANCE else None
    return Reading(background, tuple(_blobs(pixels, ground)))


def _blobs(pixels: Floats, ground: Floats) -> list[Found]:
    from scipy import ndimage

    palette = np.asarray([ground, *COLORS.values()], np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=3)
    nearest = distance.argmin(axis=2)
    seeds = np.zeros(nearest.shape, dtype=np.int32)
    colors: list[str] = []
    for index, color in enumerate(COLORS, 1):
        labels, count = ndimage.label((nearest == index) & (distance[:, :, index] < _SEED_DISTANCE), np.ones((3, 3)))
        for label in range(1, count + 1):
            blob = labels == label
            if blob.sum() >= _SEED_PIXELS:
                colors.append(color)
                seeds[blob] = len(colors)
    if not colors:
        return []
    away, (rows, columns) = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    owner = np.where(away <= _REACH, seeds[rows, columns], 0)
    return [_identify(pixels, ground, color, owner == number) for number, color in enumerate(colors, 1)]


def _identify(pixels: Floats, ground: Floats, color: str, region: NDArray[np.bool_]) -> Found:
    """Name the blob in a region by the drawing whose coverage is nearest to its own."""
    direction = np.asarray(COLORS[color], np.float32) - ground
    alpha = np.clip((pixels - ground) @ direction / (direction @ direction), 0, 1.2) * region
    rows, columns = np.nonzero(region)
    weights = alpha[rows, columns]
    y, x = np.average(rows, weights=weights) + 0.5, np.average(columns, weights=weights) + 0.5
    padded = np.pad(alpha, _PATCH // 2)
    top, left = round(y), round(x)
    patch = padded[top : top + _PATCH, left : left + _PATCH].reshape(-1).astype(np.float32)
    drawings, energies, names = _drawings()
    misfits = (energies + patch @ patch - 2 * drawings @ patch) / (energies + patch @ patch)
    best = int(misfits.argmin())
    misfit = float(misfits[best])
    shape, size = names[best] if misfit <= _FARTHEST else (None, None)
    return Found(color, shape, size, (float(x), float(y)), misfit)


@cache
def _drawings() -> tuple[Floats, Floats, list[tuple[str, str]]]:
    """Return every shape's coverage around its centroid: (N, 1600), their energies (N,), and (shape, size) of each."""
    from scipy import ndimage

    rows: list[Any] = []
    names: list[tuple[str, str]] = []
    for shape in SHAPES:
        for size, radii in _RADII.items():
            for radius in radii:
                for dx in _OFFSETS:
                    for dy in _OFFSETS:
                        sharp = coverage(shape, radius, _PATCH / 2 + dx, _PATCH / 2 + dy, _PATCH)
                        rows += [ndimage.gaussian_filter(sharp, blur) if blur else sharp for blur in _BLURS]
                        names += [(shape, size)] * len(_BLURS)
    drawings = np.stack(rows).reshape(len(rows), -1).astype(np.float32)
    return drawings, (drawings**2).sum(axis=1), names


def _orders(reading: Reading) -> list[tuple[Found, ...]]:
    """Return every way of giving the blobs to the prompt's items."""
    return [order for count in (1, 2) for order in permutations(reading.found, count)] or [()]


def _verdict(scene: Scene, reading: Reading, order: Sequence[Found]) -> Verdict:
    pairs = list(zip(scene.items, order, strict=False))
    complete = len(pairs) == len(scene.items)
    return Verdict(
        background=reading.background == scene.background,
        count=len(reading.found) == len(scene.items),
        shape=complete and all(item.shape == found.shape for item, found in pairs),
        color=complete and all(item.color == found.color for item, found in pairs),
        size=complete and all(item.size == found.size for item, found in pairs),
        relation=scene.relation is None or (complete and _holds(scene.relation, order[0].center, order[1].center)),
    )


def _holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    across, down = second[0] - first[0], second[1] - first[1]
    along, other = (across, down) if relation in {"left of", "right of"} else (down, across)
    return abs(along) > abs(other) and (along > 0) == (relation in {"left of", "above"})


def _rightness(verdict: Verdict) -> tuple[int, int]:
    """Rank a way of giving blobs to items: first by what the items look like, then by all attributes."""
    looks = verdict.shape + verdict.color + verdict.size
    return looks, sum(getattr(verdict, attribute) for attribute in ATTRIBUTES)


def scorer_hash() -> str:
    """Return the sha256 over the source of the scorer and of the scenes: a figure counts for one of them alone."""
    from . import scenes

    source = inspect.getsource(sys.modules[__name__]) + inspect.getsource(scenes)
    return hashlib.sha256(source.encode()).hexdigest()
