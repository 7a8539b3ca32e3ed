"""The optimization profiles of an engine: which one fits shapes, and the nearest where none does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Input -> least, best and largest shape."""

    index: int
    ranges: Mapping[str, tuple[Shape, Shape, Shape]]

    @property
    def best(self) -> dict[str, Shape]:
        return {name: best for name, (_, best, _) in self.ranges.items()}

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        return self.excess(shapes) == 0

    def excess(self, shapes: Mapping[str, Shape]) -> float:
        """Return how far shapes lie outside, as the logarithm of factors; 0 inside."""
        return sum(
            max(0.0, math.log(low / size), math.log(size / high))
            for name, shape in shapes.items()
            for low, size, high in zip(self.ranges[name][0], shape, self.ranges[name][2], strict=True)
            if size
        )

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """Return how far shapes are from those that the profile is best at."""
        return sum(
            abs(math.log(size / best))
            for name, shape in shapes.items()
            for best, size in zip(self.ranges[name][1], shape, strict=True)
            if size and best
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{name} from {'×'.join(map(str, least))} to {'×'.join(map(str, most))}"
            for name, (least, _, most) in self.ranges.items()
        )


def read(engine: Any, inputs: Sequence[str]) -> list[Profile]:  # noqa: ANN401 - tensorrt is untyped
    """Read an engine's profiles."""
    return [
        Profile(index, {name: _shapes(engine.get_tensor_profile_shape(name, index)) for name in inputs})
        for index in range(engine.num_optimization_profiles)
    ]


def _shapes(found: Sequence[Any]) -> tuple[Shape, Shape, Shape]:
    least, best, most = (tuple(int(size) for size in shape) for shape in found)
    return least, best, most


def choose(part: str, profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> Profile:
    """Return the profile that shapes fit and that is best for sizes like theirs.

    Raises:
        InputError: they lie outside all profiles; with the nearest one.
    """
    fitting = [profile for profile in profiles if profile.fits(shapes)]
    if fitting:
        return min(fitting, key=lambda profile: profile.distance(shapes))
    nearest = min(profiles, key=lambda profile: profile.excess(shapes))
    asked = ", ".join(f"{name} {'×'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
    message = (
        f"{part} got {asked}: outside all {len(profiles)} profiles that it was built for; the nearest, "
        f"{nearest.index}, takes {nearest}"
    )
    raise InputError(message, fix="export again with sizes that hold it, such as +profiles=batch:1:2:6/height:8:64:128")


def most_rows(profiles: Sequence[Profile], by_rows: Collection[str], shapes: Mapping[str, Shape]) -> int:
    """Return how many rows a profile takes at sizes like these; 0 if none takes any.

    Args:
        profiles: of an engine.
        by_rows: inputs whose first dimension is that of rows.
        shapes: of all inputs that have dimensions.
    """
    found = 0
    for profile in profiles:
        most = min((profile.ranges[name][2][0] for name in by_rows), default=0)
        if profile.fits({name: (most, *shape[1:]) if name in by_rows else shape for name, shape in shapes.items()}):
            found = max(found, most)
    return found
