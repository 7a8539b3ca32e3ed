"""What `generate` was asked for, checked before anything runs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .image import as_tensor, pictures_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from ..components.family import Family

_MAX_SEED = 2**63


def task_of(image: object, mask: object) -> str:
    """Return what is asked for by what is there to start from."""
    if image is None:
        return "text-to-image"
    return "image-to-image" if mask is None else "inpainting"


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
    """(B, …) float32, unit normal, before the scheduler's scaling; unused where there is a picture to start from."""
    image: Tensor | None = None
    """(B, 3, H, W) float32 in [0, 1]."""
    mask: Tensor | None = None
    """(B, 1, H, W) float32 in [0, 1]; what is white is painted anew."""
    strength: float | None = None
    """How much of the picture is noised away; None: the pipeline's default."""
    control_image: Tensor | None = None
    """(B, 3, H, W) float32 in [0, 1], for a ControlNet."""
    control_scale: float = 1.0

    @property
    def task(self) -> str:
        return task_of(self.image, self.mask)

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
            image=None if self.image is None else self.image[list(chosen)],
            mask=None if self.mask is None else self.mask[list(chosen)],
            control_image=None if self.control_image is None else self.control_image[list(chosen)],
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
        image: Any = None,  # noqa: ANN401 - a picture or many, PIL's or arrays
        mask: Any = None,  # noqa: ANN401 - the same
        strength: float | None = None,
        control_image: Any = None,  # noqa: ANN401 - the same
        control_scale: float = 1.0,
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
        if negatives is not None and not self.family.negative_prompts:
            message = f"{self.family.name} has its guidance built in and takes no negative prompts"
            raise InputError(message, fix="leave them out")
        scales = tuple(float(each) for each in _one_each("guidance_scale", guidance_scale, count, int | float))
        if not all(map(math.isfinite, scales)):
            message = f"got guidance_scale = {guidance_scale!r}, expected finite numbers"
            raise InputError(message)
        chosen = _seeds(seeds, count)
        for name, value, least in (("steps", steps, self.family.fewest_steps), ("max_batch", max_batch, 1)):
            if not isinstance(value, int) or value < least:
                message = f"got {name} = {value!r}, expected a whole number from {least}"
                raise InputError(message, fix=f"{name}={least}")
        pictures = None if image is None else pictures_of("image", image, count)
        masks = None if mask is None else pictures_of("mask", mask, count)
        controls = None if control_image is None else pictures_of("control_image", control_image, count)
        like = pictures or controls
        height, width = self._size(size if size is not None or like is None else like[0].size[::-1])
        self._check_task(pictures, masks, strength, latents, steps)
        self._check_control(controls, control_scale)
        return Request(
            prompts=texts,
            negative_prompts=negatives,
            seeds=chosen,
            guidance=scales,
            steps=steps,
            height=height,
            width=width,
            latents=self._latents(latents, chosen, height, width),
            image=None if pictures is None else as_tensor(pictures, (height, width)),
            mask=None if masks is None else as_tensor(masks, (height, width), mask=True),
            strength=strength,
            control_image=None if controls is None else as_tensor(controls, (height, width)),
            control_scale=float(control_scale),
        )

    def _check_control(self, controls: list[Image] | None, scale: float) -> None:
        """Refuse a control image without a ControlNet, and the reverse."""
        if "controlnet" in self.configs and controls is None:
            message = "this artifact has a ControlNet, and got no control image"
            raise InputError(message, fix="generate(…, control_image=picture)")
        if "controlnet" not in self.configs and controls is not None:
            message = "got a control image, but this artifact has no ControlNet"
            raise InputError(message, fix="bakeoff export MODEL --controlnet FOLDER … makes one that has")
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            message = f"got control_scale = {scale!r}, expected a finite number"
            raise InputError(message)

    def _check_task(
        self,
        pictures: list[Image] | None,
        masks: list[Image] | None,
        strength: float | None,
        latents: Tensor | None,
        steps: int,
    ) -> None:
        """Refuse what doesn't go together, or isn't what the model is for."""
        if pictures is None and (masks is not None or strength is not None):
            message = "got a mask or a strength without an image"
            raise InputError(message, fix="generate(…, image=picture, mask=mask, strength=0.6)")
        if masks is not None and pictures is not None and masks[0].size != pictures[0].size:
            message = f"got a mask of {_size(masks[0])} for an image of {_size(pictures[0])}, expected the same size"
            raise InputError(message, fix="resize the mask, with Image.Resampling.NEAREST")
        if pictures is not None and latents is not None:
            message = "got latents and an image: the noise for an image comes from the seeds"
            raise InputError(message, fix="leave out one of them")
        number = isinstance(strength, int | float)
        if strength is not None and not (number and 0 < strength <= 1 and int(steps * strength) >= 1):
            message = (
                f"got strength = {strength!r} with {steps} steps, expected over 0 to 1 and at least one step of it"
            )
            raise InputError(message, fix=f"strength={max(0.6, 1 / steps):.2g}")
        task = task_of(pictures, masks)
        only = self.family.only(self.configs)
        if only and task != only:
            message = f"this model is made for {only}, not for {task}"
            raise InputError(message, fix="give image= and mask=, or use another model")
        if task not in self.family.pipelines:
            message = f"{self.family.name} does {', '.join(self.family.pipelines)}; {task} isn't among it"
            raise InputError(message)

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
            raise InputError(message, fix=f"use {near[0]}×{near[1]}: size=({near[0]}, {near[1]})")
        largest = self.family.largest_size(self.configs)
        if largest is not None and max(height, width) > largest:
            message = f"got size {height}×{width} (height×width); the model has positions for {largest} pixels a side"
            raise InputError(message, fix=f"use at most {largest}×{largest}")
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


def _size(picture: Image) -> str:
    return f"{picture.height}×{picture.width}"


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
