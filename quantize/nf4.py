"""nf4: 16 levels that are equally likely under a normal distribution, in groups of 64.

Dettmers et al., QLoRA (https://arxiv.org/abs/2305.14314); the levels are bitsandbytes'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .grouped import Grouped, grouped

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the codes 0 to 15 stand for, times the group's largest magnitude."""


class Nf4(Grouped):
    """Each weight becomes the nearest level; the scale is the group's largest magnitude."""

    name: ClassVar[str] = "nf4"

    def pack(self, rows: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - by ends
        import torch

        values = grouped(rows)
        scales = values.abs().amax(2, keepdim=True)
        levels = torch.tensor(LEVELS)
        between = (levels[1:] + levels[:-1]) / 2
        shares = values / scales.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.bucketize(shares, between).to(torch.int8).flatten(1), scales.squeeze(2)

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        import torch

        return (grouped(torch.tensor(LEVELS)[codes.int()]) * scales[..., None]).flatten(1)
