"""The 256 evenly spaced numbers that activations are rounded to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CorruptError

if TYPE_CHECKING:
    from torch import Tensor

LEAST, MOST = -128, 127
"""Codes of the first and the last of them."""


@dataclass(frozen=True)
class Grid:
    """Codes from -128 to 127: a code stands for its distance from that of nought, in steps."""

    steps: tuple[float, ...]
    """One for all values, or one a channel."""
    zeros: tuple[int, ...] = (0,)
    """The code of nought: one for all values, or one a channel."""

    @property
    def by_channel(self) -> bool:
        """Whether channels have steps of their own."""
        return len(self.steps) > 1

    @property
    def even(self) -> float:
        """The one step of a grid around nought, for backends that take no other."""
        assert len(self.steps) == 1 and self.zeros == (0,)  # noqa: S101, PT018 - the exporter offers no other methods
        return self.steps[0]

    def round(self, values: Tensor, axis: int) -> Tensor:
        """Return the nearest numbers, in the dtype that was given; `axis` is that of the channels."""
        import torch

        shape = [1] * values.ndim
        shape[axis] = -1
        steps = torch.tensor(self.steps).reshape(shape if self.by_channel else [])
        zeros = torch.tensor(self.zeros).reshape(shape if len(self.zeros) > 1 else [])
        codes = ((values.float() / steps).round() + zeros).clamp(LEAST, MOST)
        return ((codes - zeros) * steps).to(values.dtype)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, data: Any) -> Grid:  # noqa: ANN401 - any JSON value
        """Read what `as_dict` gave, or the one step that older artifacts have.

        Raises:
            CorruptError: it is neither.
        """
        if isinstance(data, int | float):
            return cls((float(data),))
        try:
            return cls(tuple(map(float, data["steps"])), tuple(map(int, data["zeros"])))
        except (KeyError, TypeError, ValueError) as error:
            message = f"got {str(data)[:80]} as the numbers that activations are rounded to, expected steps and zeros"
            raise CorruptError(message, fix="export again") from error


Grids = tuple[Grid, Grid | None]
"""Of a layer's input and its output; None: a convolution's output stays as it is."""


def grids_to_json(grids: Grids) -> list[dict[str, Any] | None]:
    return [each.as_dict() if each else None for each in grids]


def grids_from_json(data: Any) -> Grids:  # noqa: ANN401 - any JSON value
    before, after = data
    return Grid.read(before), None if after is None else Grid.read(after)
