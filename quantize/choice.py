"""Choose a precision for each layer: as small, or as quick, as a bound on the pictures' error allows.

What layers add to a picture's squared error is taken as independent, but for one factor that was measured with all layers
rounded at once. The choice is the multiple-choice knapsack problem; it is solved by Lagrangian relaxation (Shoham and
Gersho, 1988), then what is left of the bound is spent layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HALVINGS = 60


@dataclass(frozen=True)
class Option:
    """A precision that a layer may have."""

    precision: str
    cost: float
    """Bytes or seconds, whatever is to be small."""
    error: float
    """Mean squared error that it adds to the picture, of pixels from 0 to 1."""


def choose(layers: Mapping[str, Sequence[Option]], bound: float) -> dict[str, Option] | None:
    """Return an option for each layer, as cheap together as a bound on the sum of errors allows; None if none fits.

    Args:
        layers: layer -> what it may have, at least one each.
        bound: most that the errors may sum to.
    """
    low, high = 0.0, 1.0
    if _error(_at(layers, None)) > bound:
        return None
    while _error(_at(layers, high)) > bound and high < 1e300:  # noqa: PLR2004 - as far as floats go
        high *= 10
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _error(_at(layers, middle)) <= bound else (middle, high)
    best = _at(layers, high)
    chosen = best if _error(best) <= bound else _at(layers, None)
    return _spend(layers, chosen, bound)


def _at(layers: Mapping[str, Sequence[Option]], price: float | None) -> dict[str, Option]:
    """Return each layer's best option at a price of error; without one, the one with the least error."""

    def rank(option: Option) -> tuple[float, float]:
        return (option.error, option.cost) if price is None else (option.cost + price * option.error, option.error)

    return {name: min(options, key=rank) for name, options in layers.items()}


def _error(chosen: Mapping[str, Option]) -> float:
    return sum(option.error for option in chosen.values())


def _spend(layers: Mapping[str, Sequence[Option]], chosen: dict[str, Option], bound: float) -> dict[str, Option]:
    """Give layers cheaper options while the bound holds, those first that save most for their error."""
    found = dict(chosen)
    room = bound - _error(found)
    while True:
        cheaper = [
            ((found[name].cost - option.cost) / max(option.error - found[name].error, 1e-30), name, option)
            for name, options in layers.items()
            for option in options
            if option.cost < found[name].cost and option.error - found[name].error <= room
        ]
        if not cheaper:
            return found
        _, name, option = max(cheaper, key=lambda each: each[0])
        room -= option.error - found[name].error
        found[name] = option
