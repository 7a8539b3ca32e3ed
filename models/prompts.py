"""Prompt sets that ship with the package, each prompt with a stable id."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, unknown
from ..recipe import read_text
from ..sources.source import EMBEDDED
from .scenes import is_held_out, random_scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from .scenes import Scene

_SETS: dict[str, Callable[[Scene], bool]] = {
    "shapes-64": lambda scene: not is_held_out(scene),
    "shapes-256": is_held_out,
    "shapes-1024": lambda _: True,
}
_OTHERS = ("everyday-32",)
"""Written by hand, for models that draw more than shapes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the id under which records keep it."""

    id: str
    text: str


def prompt_set(name: str) -> tuple[Prompt, ...]:
    """Return a prompt set.

    `shapes-256` has combinations held out of training, `shapes-64` none of them (to calibrate with), `shapes-1024` any
    scene; `everyday-32` is for models that draw more than shapes.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in (*_SETS, *_OTHERS):
        raise UsageError(unknown("prompt set", name, (*_SETS, *_OTHERS)))
    texts = json.loads(files(__package__).joinpath("prompt_sets", f"{name}.json").read_text())
    return tuple(Prompt(f"{name}/{number:04}", text) for number, text in enumerate(texts))


def read_prompts(name: str, count: int) -> tuple[Prompt, ...]:
    """Return the first prompts of a set, or of the lines of a `.txt` file, whose ids are hashes.

    Raises:
        UsageError: there is no such set or file, it isn't text, it has too few prompts, or none is asked for.
    """
    if count < 1:
        message = f"got a count of {count} prompts, expected 1 at least"
        raise UsageError(message, fix="leave out --count, or give a larger one")
    found = _lines(Path(name)) if name.endswith(".txt") else prompt_set(name)
    if len(found) < count:
        message = f"got {len(found)} prompts in {name}, expected at least {count}"
        raise UsageError(message, fix="give more prompts, one a line" + (", or a smaller --count" if found else ""))
    return found[:count]


def _lines(file: Path) -> tuple[Prompt, ...]:
    lines = [line.strip() for line in read_text(file, "prompt").splitlines() if line.strip()]
    return tuple(Prompt(hashlib.sha256(line.encode()).hexdigest()[:16], line) for line in lines)


def default_prompts(model: str) -> str:
    """Name the prompt set that fits a model."""
    return "shapes-64" if model in EMBEDDED else "everyday-32"


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
