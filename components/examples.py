"""What the examples of several components share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .component import Sizes


def right_padded(sizes: Sizes) -> Tensor:
    """Return a mask (batch, sequence) int64 of texts of different lengths, whose ones come first."""
    lengths = sizes.sequence - torch.arange(sizes.batch)
    return (torch.arange(sizes.sequence)[None] < lengths[:, None]).to(torch.int64)
