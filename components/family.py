"""A pipeline family: which parts it has, and what its pipelines expect of the caller."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
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
class Variant:
    """Other parts and pipelines of the same family: such as a UNet that takes a ControlNet's residuals, and the ControlNet."""

    pipelines: Mapping[str, str]
    parts: tuple[Part, ...]
    tiny: Mapping[str, tuple[str, str, Mapping[str, Any]]]
    """What a tiny pipeline has beside the family's own."""


@dataclass(frozen=True)
class Family:
    """One file in `families/` makes one of these and registers it under the entry points `bakeoff.families`."""

    name: str
    pipelines: Mapping[str, str]
    """Task -> class name, `text-to-image` first. The names also recognise a folder by its `model_index.json`."""
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
    tiny: Mapping[str, tuple[str, str, Mapping[str, Any]]]
    """What a tiny pipeline is made of: name in `model_index.json` -> library, class, config (none for tokenizers)."""
    guidance_argument: str = "guidance_scale"
    """What the pipelines call the guidance scale."""
    unconditional: str | None = None
    """The negative prompt that stands for none, where the pipeline needs one to guide at all."""
    negative_prompts: bool = True
    """Whether guidance takes a negative prompt: not where the scale is an input of a distilled model."""
    only: Callable[[Configs], str | None] = lambda _: None
    """The one task that a model with these configs can do, if it can do but one: inpainting, with its own channels."""
    largest_size: Callable[[Configs], int | None] = lambda _: None
    """Longest side in pixels that the model has positions for, if it is bounded."""

    fewest_steps: int = 1
    """Denoising steps that the pipeline needs."""
    library: str = "diffusers"
    """The Python module that has the pipelines' classes."""
    variants: Mapping[str, Variant] = field(default_factory=dict)
    """By the name of the module that is given beside the pipeline: `controlnet`."""

    def variant(self, name: str | None) -> Family:
        """Return this family with a variant's parts and pipelines; itself for none."""
        if name is None:
            return self
        chosen = self.variants[name]
        return replace(self, pipelines=chosen.pipelines, parts=chosen.parts, tiny={**self.tiny, **chosen.tiny})

    def pipeline_class(self, task: str) -> Any:  # noqa: ANN401 - some Diffusers pipeline's class
        """Return the class, such as Diffusers' own, of the pipeline for a task."""
        return getattr(importlib.import_module(self.library), self.pipelines[task])

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)
