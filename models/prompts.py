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
        UsageError: there is no such set or file, or it has too few prompts.
    """
    if not name.endswith(".txt"):
        found = prompt_set(name)
    elif Path(name).is_file():
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
        found = tuple(Prompt(hashlib.sha256(line.encode()).hexdigest()[:16], line) for line in lines)
    else:
        message = f"no prompt file {name}"
        raise UsageError(message)
    if len(found) < count:
        message = f"got {len(found)} prompts in {name}, expected at least {count}"
        raise UsageError(message, fix=f"ask for no more than {len(found)}, or give more prompts")
    return found[:count]


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
