"""A pipeline family: which parts it has, and what its pipelines expect of the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .component import Component

    Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """A part as it is exported: its folder in an artifact, the module (folder) it comes from, and its component."""

    name: str
    module: str
    component: Component


@dataclass(frozen=True)
class Family:
    """One file in `families/` makes one of these and registers it under the entry points `bakeoff.families`."""

    name: str
    pipelines: Mapping[str, str]
    """Task -> class name in Diffusers. The names also recognise a folder by its `model_index.json`."""
    parts: tuple[Part, ...]
    latent_shape: Callable[[Configs, int, int, int], tuple[int, ...]]
    """(configs, batch, height, width in pixels) -> shape of the injected unit-normal latents, float32."""
    size_multiple: Callable[[Configs], int]
    """Height and width in pixels must be multiples of this."""
    default_size: Callable[[Configs], tuple[int, int]]
    """Height and width in pixels."""
    row_guidance: bool
    """True: the pipeline multiplies by the guidance scale, so rows of one batch may differ in it."""
    unguided_at_most: float
    """The pipeline skips guidance at scales up to this one."""

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)
