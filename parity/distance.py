"""How far what a part gave is from what eager float32 gave.

Errors are relative root mean squares, `|got - expected| / |expected|`, and as SQNR, `-20 log10` of that, in dB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """One case of one part: its sizes, error and the two other views of it."""

    sizes: dict[str, int]
    error: float
    sqnr_db: float
    cosine: float
    worst: float
    """Largest absolute difference over the largest absolute value expected."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the relative root-mean-square error; infinite if either isn't finite, or `got` has another shape."""
    import torch

    if got.shape != expected.shape or not all(bool(torch.isfinite(each).all()) for each in (got, expected)):
        return math.inf
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def measure(got: Tensors, expected: Tensors, sizes: dict[str, int]) -> Measured:
    """Compare a part's outputs with eager's, over all outputs that both have: the worst counts."""
    names = sorted(set(got) & set(expected))
    errors = {name: relative_error(got[name], expected[name]) for name in names}
    error = max(errors.values(), default=math.inf)
    if math.isinf(error):
        return Measured(sizes, math.inf, -math.inf, 0.0, math.inf)
    cosine = min(_cosine(got[name], expected[name]) for name in names)
    worst = max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-30)) for n in names)
    return Measured(sizes, error, -20 * math.log10(max(error, 1e-15)), cosine, worst)


def row_errors(got: Tensors, expected: Tensors) -> list[float]:
    """Return each row's relative error, of all outputs that both have: the worst counts."""
    names = sorted(set(got) & set(expected))
    count = min(len(expected[name]) for name in names)
    return [max(relative_error(got[name][row], expected[name][row]) for name in names) for row in range(count)]


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))
