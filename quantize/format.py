"""The seam of a weight format: a weight in, codes and scales out, which every backend stores in its own encoding."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from .grid import Grids

LEAST_ELEMENTS = 4096
"""Elements of the smallest weight that is worth its scales."""


class Format(ABC):
    """A weight-only format. Registered under the entry points `bakeoff.formats`; its name is a precision in recipes."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when a change here changes codes or scales: part of an artifact's key."""
    bits: ClassVar[int]
    """Bits of a code."""
    calibrated: ClassVar[bool] = False
    """Whether activations are rounded, too, with scales that were calibrated."""
    uses_inputs: ClassVar[bool] = True
    """Whether weights are rounded, and biases corrected, for inputs that are known."""
    activations_method: ClassVar[str | None] = None
    """How steps of activations are to be chosen, of `calibration.METHODS`; None: as the backend does."""
    group: ClassVar[int | None]
    """Weights of one output channel that share a scale; None: all of them."""

    @abstractmethod
    def obstacle(self, shape: Sequence[int]) -> str | None:
        """Say why a weight of this shape, output channels first, is left as it is; None where it becomes codes."""

    @abstractmethod
    def pack(self, rows: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Round weights.

        Args:
            rows: (N, K) float32, some or all output channels of a weight, each with its K inputs.
            importance: mean squares (K,) of the inputs where they are known: an error counts for so much in what is made.

        Returns:
            Codes (N, K) int8 and scales (N, K / group) float32.
        """

    @abstractmethod
    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the float32 weights (N, K) that codes and scales stand for."""

    def groups(self, shape: Sequence[int]) -> int:
        """Return how many scales an output channel has."""
        return math.prod(shape[1:]) // self.group if self.group else 1

    def stored_bytes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the bytes of a weight's codes and of its float32 scales."""
        return math.prod(shape) * self.bits // 8, 4 * shape[0] * self.groups(shape)

    def round_weight(
        self, weight: Tensor, columns: Sequence[float] | None = None, importance: Tensor | None = None
    ) -> None:
        """Give a weight the values that it will have, in place, if it becomes codes.

        Args:
            weight: (N, K, …).
            columns: K factors that its inputs' weights are multiplied by before they are rounded, and divided by after.
            importance: mean squares (K,) of its inputs, for `pack`.
        """
        import torch

        if self.obstacle(weight.shape) is None:
            with torch.no_grad():
                rows = by_columns(weight.float(), columns).flatten(1)
                rounded = self.unpack(*self.pack(rows, importance)).reshape(weight.shape)
                weight.copy_(by_columns(rounded, [1 / each for each in columns] if columns else None))

    def lost(self, weight: Tensor, mean: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return what rounding a weight takes from each output on average: (W - Q(W)) E[x].

        Added to the bias it is given back (Nagel et al., https://arxiv.org/abs/1906.04721).

        Args:
            weight: (N, K, …), some or all output channels.
            mean: of the inputs, (K,).
            importance: for `pack`.
        """
        rows = weight.float().flatten(1)
        error = (rows - self.unpack(*self.pack(rows, importance))).reshape(len(rows), len(mean), -1)
        return error.sum(2) @ mean.float()

    def watch(self, layer: nn.Module, grids: Grids | None) -> None:  # noqa: B027 - most have nothing to do
        """Let a layer round what it is given and gives, where this format does; most round weights alone.

        Args:
            layer: of any class.
            grids: what its input and its output are rounded to, where that is calibrated.
        """


def by_columns(rows: Tensor, columns: Sequence[float] | None) -> Tensor:
    """Return weights (N, K, …), each input's multiplied by its factor, if there are any."""
    import torch

    if not columns:
        return rows
    return rows * torch.tensor(columns).reshape(1, -1, *[1] * (rows.ndim - 2))


def too_small(shape: Sequence[int]) -> str | None:
    """Say that a tensor is no weight worth codes: a bias, a norm, a table of one row, a tiny matrix."""
    if len(shape) < 2 or shape[0] == 1:  # noqa: PLR2004 - a matrix
        return "not a matrix"
    return f"under {LEAST_ELEMENTS} elements" if math.prod(shape) < LEAST_ELEMENTS else None
