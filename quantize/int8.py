"""int8: 255 steps, symmetric, a scale for each output channel. Matrices and convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .format import Format, too_small

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MOST = 127


class Int8(Format):
    """The largest magnitude of an output channel becomes 127."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    group: ClassVar[int | None] = None

    def obstacle(self, shape: Sequence[int]) -> str | None:
        return too_small(shape)

    def pack(self, rows: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - by ends
        import torch

        scales = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _MOST
        return (rows / scales).round().to(torch.int8), scales

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes.float() * scales
