"""A guidance scale for each row of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class RowGuidance:
    """A guidance scale a row, for pipelines that compute `scale > 1` and `uncond + scale * difference`.

    A row whose scale is at most `unguided_at_most` gets its conditional prediction, as it would alone.
    """

    def __init__(self, scales: Sequence[float], unguided_at_most: float, ndim: int) -> None:
        import torch

        effective = [1.0 if scale <= unguided_at_most else scale for scale in scales]
        self._largest = max(scales)
        self._tensor = torch.tensor(effective).reshape(-1, *[1] * (ndim - 1))

    def __gt__(self, other: float) -> bool:
        return self._largest > other

    def __mul__(self, difference: Tensor) -> Tensor:
        self._tensor = self._tensor.to(difference)  # the same in each step
        return self._tensor * difference
