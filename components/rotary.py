"""Rotary embeddings spelled in real numbers: complex ones can't be lowered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn pairs of neighbours in (batch, tokens, heads, width) by their angles, in float32: (a + ib)(c + is).

    Cosines and sines are (batch or 1, tokens, 1, width / 2).
    """
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cosines - imaginary * sines, real * sines + imaginary * cosines], dim=-1)
    return turned.flatten(3).type_as(heads)
