"""What every metric is: weights, and figures of pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from .weights import located

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...pictures import Pictures

BATCH = 8
"""Pictures that go through a network at once."""

_AXES = 4
_CHANNELS = 3


class Metric(ABC):
    """A metric with its weights loaded; what its figures mean is the `Fact` under its name."""

    name: ClassVar[str]

    def __init__(self, weights: str) -> None:
        self.folder = located(weights)

    def values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:
        """Return one figure a picture, or a single one where the metric compares distributions.

        Args:
            expected: the reference's pictures, (N, H, W, 3) uint8 RGB.
            got: the pictures to judge, likewise.
            prompts: what each of `got` was to show.

        Raises:
            InputError: pictures of another dtype or shape, or another number of prompts.
        """
        for pictures in (expected, got):
            _check(pictures)
        if len(prompts) != len(got):
            message = f"got {len(prompts)} prompts for {len(got)} pictures, expected one each"
            raise InputError(message)
        return self._values(expected, got, prompts)

    @abstractmethod
    def _values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:
        """Do what `values` says, with what it has checked."""


def _check(pictures: Pictures) -> None:
    if pictures.dtype != "uint8" or pictures.ndim != _AXES or pictures.shape[-1] != _CHANNELS or not len(pictures):
        message = f"got pictures {pictures.shape} {pictures.dtype}, expected (N, H, W, 3) uint8"
        raise InputError(message)


def batches(count: int) -> Iterator[slice]:
    """Cut `count` pictures into batches."""
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))
