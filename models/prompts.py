"""Prompt sets that ship with the package, each prompt with a stable id."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from ..errors import UsageError, unknown
from .scenes import is_held_out, random_scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from .scenes import Scene

_SETS: dict[str, Callable[[Scene], bool]] = {
    "shapes-256": is_held_out,
    "shapes-1024": lambda _: True,
}


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the id under which records keep it."""

    id: str
    text: str


def prompt_set(name: str) -> tuple[Prompt, ...]:
    """Return a prompt set: `shapes-256` (combinations held out of training) or `shapes-1024` (any scene).

    Raises:
        UsageError: there is none of that name.
    """
    if name not in _SETS:
        raise UsageError(unknown("prompt set", name, _SETS))
    texts = json.loads(files(__package__).joinpath("prompt_sets", f"{name}.json").read_text())
    return tuple(Prompt(f"{name}/{number:04}", text) for number, text in enumerate(texts))


def draw_prompt_set(name: str) -> list[str]:
    """Draw the captions of a set again, all different; what ships was drawn so."""
    rng = random.Random(name)
    count, wanted = int(name.rpartition("-")[2]), _SETS[name]
    captions: dict[str, None] = {}
    while len(captions) < count:
        scene = random_scene(rng)
        if wanted(scene):
            captions.setdefault(scene.caption)
    return list(captions)
