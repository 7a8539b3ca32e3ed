"""int4: whole numbers from -8 to 7 in groups of 64, with the scale that leaves the least squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .grouped import Grouped, grouped

if TYPE_CHECKING:
    from torch import Tensor

_LEAST, _MOST = -8, 7
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a group's largest magnitude that are tried as the end of its range: clipping a few widens the rest's steps."""


class Int4(Grouped):
    """Data-free: the scale of each group is searched by what it does to the weights alone."""

    name: ClassVar[str] = "int4"

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        values = grouped(rows)
        largest = values.abs().amax(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scales, least = largest / _MOST, torch.full_like(largest, torch.inf)
        for share in _SHARES:
            tried = largest * share / _MOST
            error = (_codes(values, tried) * tried - values).square().sum(2, keepdim=True)
            scales, least = torch.where(error < least, tried, scales), torch.minimum(error, least)
        return _codes(values, scales).to(torch.int8).flatten(1), scales.squeeze(2)

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        return (grouped(codes.float()) * scales[..., None]).flatten(1)


def _codes(values: Tensor, scales: Tensor) -> Tensor:
    return (values / scales).round().clamp(_LEAST, _MOST)
