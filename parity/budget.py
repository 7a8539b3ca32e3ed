"""How far a part may be from eager float32: the gate that an export passes, or says that it didn't."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FP32_FLOORS = 32
"""An fp32 part may lie this many F0 from eager: other summation orders and other exponentials, no more."""
FP32_LEAST = 2e-5
"""F0 can be nearly nothing; 2e-5 (94 dB) is the least that an fp32 part is granted."""
LOW_PRECISION_FLOORS = 2.0
"""A part of which anything is in less than fp32 may lie this many F1 from eager fp32."""
MOST = 0.5
"""No floor justifies more (6 dB): F1 grows with what rounding breaks, and at 1 there is nothing left of a part's output."""
MOST_DB = 300
"""More isn't asked for: float64 has no more."""
_T_95 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
"""Two-sided 95 % quantiles of Student's t for 1, 2, 3… degrees of freedom."""


@dataclass(frozen=True)
class Budget:
    """What a user grants a part instead of what the floors justify."""

    sqnr_db: float
    """Least signal to quantization noise, in dB."""
    reason: str | None = None
    """Why it is looser than what the floors justify; needed if it is."""

    @property
    def error(self) -> float:
        """Largest relative root-mean-square error."""
        return 10 ** (-self.sqnr_db / 20)


@dataclass(frozen=True)
class Gate:
    """What an export has to pass."""

    budgets: Mapping[str, Budget] = field(default_factory=dict)
    """Part -> what it is granted instead of what the floors justify."""
    allow_failing: bool = False
    """Keep an artifact that doesn't pass; its manifest says so for good."""


def tolerance(f0: float, f1: float | None) -> float:
    """Return the relative error that a part's floors justify; F1 is there if any of its layers is in less than fp32."""
    if f1 is None:
        return max(FP32_FLOORS * f0, FP32_LEAST)
    return min(max(LOW_PRECISION_FLOORS * f1, FP32_LEAST), MOST)


def granted(part: str, justified: float, budget: Budget | None) -> float:
    """Return the relative error that a part may have.

    Raises:
        UsageError: the budget is looser than what the floors justify, and nobody says why.
    """
    if budget is None:
        return justified
    if budget.error > justified and not budget.reason:
        message = (
            f"the budget of {part}, {budget.sqnr_db:g} dB, is looser than the {decibels(justified):.1f} dB that the "
            f"noise floors justify"
        )
        raise UsageError(message, fix="say why, which is kept in the manifest: --budget-reason TEXT")
    return budget.error


def upper_bound(errors: Sequence[float]) -> float:
    """Return the upper end of the 95 % interval of errors' geometric mean (Student's t on their logarithms)."""
    if len(errors) == 1 or not all(0 < error < math.inf for error in errors):
        return max(errors)
    logs = [math.log(error) for error in errors]
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in logs) / (len(logs) - 1))
    t = _T_95[min(len(logs) - 1, len(_T_95)) - 1]
    return math.exp(mean + t * deviation / math.sqrt(len(logs)))


def decibels(error: float) -> float:
    """Return a relative error as SQNR in dB."""
    return -20 * math.log10(max(error, 1e-15))


def parse(texts: Iterable[str], reason: str | None) -> dict[str, Budget]:
    """Read budgets as the command line takes them: `unet=30dB`.

    Raises:
        UsageError: one can't be meant.
    """
    found: dict[str, Budget] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(\d+(?:\.\d*)?|\.\d+) ?(?:dB)?", text, re.IGNORECASE)
        if not match or not 0 < float(match[2]) <= MOST_DB:
            message = f"got budget {text!r}, expected a part and its least SQNR, to {MOST_DB} dB, such as unet=30dB"
            raise UsageError(message)
        found[match[1]] = Budget(float(match[2]), reason)
    return found


def check_parts(budgets: Mapping[str, Budget], parts: Iterable[str]) -> None:
    """Refuse a budget of a part that isn't among those that are proved.

    Raises:
        UsageError: naming it.
    """
    known = list(parts)
    for part in budgets:
        if part not in known:
            raise UsageError(unknown("part", part, known))
