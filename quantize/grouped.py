"""What the formats of 4 bits share: matrices in groups along their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .format import Format, too_small

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

GROUP = 64


class Grouped(Format):
    """A scale for each 64 inputs of an output channel; convolutions stay as they are."""

    bits: ClassVar[int] = 4
    group: ClassVar[int | None] = GROUP

    def obstacle(self, shape: Sequence[int]) -> str | None:
        if len(shape) > 2:  # noqa: PLR2004 - a matrix
            return f"{self.name} is for matrices, not convolutions"
        if too_small(shape):
            return too_small(shape)
        return f"{shape[1]} inputs, not a multiple of {GROUP}" if shape[1] % GROUP else None


def grouped(rows: Tensor) -> Tensor:
    """Return rows (N, K) as groups (N, K / 64, 64)."""
    return rows.unflatten(1, (-1, GROUP))
