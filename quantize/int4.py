"""int4: whole numbers from -8 to 7 in groups of 64, with the scale that leaves the least squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .grouped import Grouped, grouped

if TYPE_CHECKING:
    from torch import Tensor

_LEAST, _MOST = -8, 7
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's largest magnitude that are tried as the end of its range: clipping a few widens the rest's steps."""
_REFINEMENTS = 3


class Int4(Grouped):
    """The scale of each group is searched by what it does to the weights, or to what the layer makes of known inputs.

    Scales may be negative: of the two ends, -8 is the farther one, and the largest weight may have it whatever its sign.
    """

    name: ClassVar[str] = "int4"
    version: ClassVar[int] = 2

    def pack(self, rows: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        import torch

        values = grouped(rows)
        shares = torch.ones(1, 1, 1) if importance is None else grouped(importance.float()[None])
        largest = values.gather(2, values.abs().argmax(2, keepdim=True))
        tiny = torch.finfo(torch.float32).tiny
        largest = torch.where(largest.abs() < tiny, tiny, largest)
        scales, least = largest / _MOST, torch.full_like(largest, torch.inf)
        for end in (_LEAST, _MOST):
            for share in _SHARES:
                scales, least = _better(values, shares, largest * share / end, scales, least)
        for _ in range(_REFINEMENTS):
            codes = _codes(values, scales)
            fitted = (shares * codes * values).sum(2, keepdim=True) / (shares * codes * codes).sum(2, keepdim=True)
            scales, least = _better(values, shares, torch.where(fitted.abs() > tiny, fitted, scales), scales, least)
        return _codes(values, scales).to(torch.int8).flatten(1), scales.squeeze(2)

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        return (grouped(codes.float()) * scales[..., None]).flatten(1)


def _better(values: Tensor, shares: Tensor, tried: Tensor, scales: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return the better scale of each group, and its error: the sum of squares, each by its share in what is made."""
    import torch

    error = (shares * (_codes(values, tried) * tried - values).square()).sum(2, keepdim=True)
    return torch.where(error < least, tried, scales), torch.minimum(error, least)


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    return (values / scales).round().clamp(_LEAST, _MOST)
