"""What `generate` was asked for, checked before anything runs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..components.family import Family

_MAX_SEED = 2**63


@dataclass(frozen=True)
class Request:
    """What `generate` was asked for, checked: one entry a prompt in each tuple."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    seeds: tuple[int, ...]
    guidance: tuple[float, ...]
    steps: int
    height: int
    width: int
    latents: Tensor
    """(B, …) float32, unit normal, before the scheduler's scaling."""

    def rows(self, chosen: Sequence[int]) -> Request:
        """Return the request for some of the prompts."""
        negatives = self.negative_prompts
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in chosen),
            negative_prompts=None if negatives is None else tuple(negatives[row] for row in chosen),
            seeds=tuple(self.seeds[row] for row in chosen),
            guidance=tuple(self.guidance[row] for row in chosen),
            latents=self.latents[list(chosen)],
        )


@dataclass(frozen=True)
class Limits:
    """What a pipeline takes."""

    family: Family
    configs: Mapping[str, Mapping[str, Any]]
    """Config of each part's module."""

    def check(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None,
        seeds: int | Sequence[int] | None,
        guidance_scale: float | Sequence[float],
        steps: int,
        size: tuple[int, int] | None,
        latents: Tensor | None,
        max_batch: int,
    ) -> Request:
        """Return the request that these arguments of `generate` mean.

        Raises:
            InputError: an argument can't be meant as it is.
        """
        texts = (prompts,) if isinstance(prompts, str) or not isinstance(prompts, Iterable) else tuple(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            message = f"got prompts {prompts!r}, expected one text or a sequence of texts"
            raise InputError(message)
        count = len(texts)
        negatives = None if negative_prompts is None else _one_each("negative_prompts", negative_prompts, count, str)
        scales = tuple(float(each) for each in _one_each("guidance_scale", guidance_scale, count, int | float))
        if not all(map(math.isfinite, scales)):
            message = f"got guidance_scale = {guidance_scale!r}, expected finite numbers"
            raise InputError(message)
        chosen = _seeds(seeds, count)
        for name, value in (("steps", steps), ("max_batch", max_batch)):
            if not isinstance(value, int) or value < 1:
                message = f"got {name} = {value!r}, expected a whole number from 1"
                raise InputError(message)
        height, width = self._size(size)
        return Request(
            prompts=texts,
            negative_prompts=negatives,
            seeds=chosen,
            guidance=scales,
            steps=steps,
            height=height,
            width=width,
            latents=self._latents(latents, chosen, height, width),
        )

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        wanted = self.family.default_size(self.configs) if size is None else size
        if not isinstance(wanted, tuple | list) or [type(side) for side in wanted] != [int, int]:
            message = f"got size {size!r}, expected (height, width) in pixels, such as (512, 512)"
            raise InputError(message)
        height, width = wanted
        multiple = self.family.size_multiple(self.configs)
        if height < multiple or width < multiple or height % multiple or width % multiple:
            message = f"got size {height}×{width} (height×width), expected multiples of {multiple} pixels"
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise InputError(message, fix=f"use {near[0]}×{near[1]}")
        return height, width

    def _latents(self, latents: Tensor | None, seeds: tuple[int, ...], height: int, width: int) -> Tensor:
        import torch

        shape = self.family.latent_shape(self.configs, len(seeds), height, width)
        if latents is None:
            return torch.stack([row_generator(seed, shape[1:])[1] for seed in seeds])
        if tuple(latents.shape) != shape or not latents.is_floating_point():
            message = f"got latents {tuple(latents.shape)} {latents.dtype}, expected {shape} float32"
            raise InputError(message)
        return latents.detach().to("cpu", torch.float32)


def row_generator(seed: int, shape: Sequence[int]) -> tuple[Any, Tensor]:
    """Return a CPU generator that has drawn a row's latents, and those latents, unit normal in float32."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return generator, torch.randn(tuple(shape), generator=generator)


def _one_each(name: str, value: Any, count: int, kind: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a value or many of them
    many = isinstance(value, Iterable) and not isinstance(value, str)
    values = tuple(value) if many else (value,) * count
    if len(values) != count or not all(isinstance(each, kind) for each in values):
        message = f"got {name} = {value!r}, expected one, or one for each of the {count} prompts"
        raise InputError(message)
    return values


def _seeds(seeds: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    if seeds is None:
        return tuple(random.SystemRandom().randrange(2**32) for _ in range(count))
    chosen = tuple(range(seeds, seeds + count)) if isinstance(seeds, int) else _one_each("seeds", seeds, count, int)
    if not all(0 <= seed < _MAX_SEED for seed in chosen):
        message = f"got seeds {list(chosen)}, expected whole numbers from 0 to 2**63 - 1"
        raise InputError(message)
    return chosen
