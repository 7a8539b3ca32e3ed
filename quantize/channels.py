"""What each channel of an activation took on: its ends, its mean and its mean square, however many values were seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .grid import LEAST, MOST, Grid

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_STEP = 1e-3
"""Of the widest channel's step: a channel that hardly moved in calibration may move more elsewhere."""


@dataclass
class Channels:
    """Statistics of C channels, float64 (C,) each; empty before the first values."""

    count: int = 0
    least: Tensor | None = None
    most: Tensor | None = None
    sums: Tensor | None = None
    squares: Tensor | None = None

    def see(self, values: Tensor, axis: int) -> None:
        """Count values whose channels are along `axis`."""
        import torch

        values = values.detach().float()
        if not values.numel():
            return
        others = [number for number in range(values.ndim) if number != axis % values.ndim]
        least, most = values.amin(others).double(), values.amax(others).double()
        sums, squares = (each.sum(others, dtype=torch.float64) for each in (values, values.square()))
        if self.least is not None and self.most is not None and self.sums is not None and self.squares is not None:
            least, most = torch.minimum(least, self.least), torch.maximum(most, self.most)
            sums, squares = sums + self.sums, squares + self.squares
        self.count += values.numel() // values.shape[axis]
        self.least, self.most, self.sums, self.squares = least, most, sums, squares

    @property
    def size(self) -> int:
        """How many channels there are."""
        return 0 if self.least is None else len(self.least)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 (C,)."""
        assert self.sums is not None  # noqa: S101 - made by `see`
        return self.sums / self.count

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each channel, float64 (C,)."""
        assert self.squares is not None  # noqa: S101 - made by `see`
        return self.squares / self.count

    def given(self) -> Grid:
        """Return steps of its own for each channel, and one code of nought for all: padding is the same everywhere.

        Each channel uses as many codes as it can on either side of nought, whose code is the one with the least sum of
        squared steps. It is SmoothQuant (Xiao et al., https://arxiv.org/abs/2211.10438) at its end: all of the activations'
        unevenness goes to the weights, which have a scale for each output channel to bear it.
        """
        import torch

        least, most = self._ends()
        zeros = torch.arange(LEAST, MOST + 1, dtype=torch.float64)[:, None]
        below = torch.where(least < 0, -least / (zeros - LEAST), 0.0)
        above = torch.where(most > 0, most / (MOST - zeros), 0.0)
        steps = torch.maximum(below, above)  # (256, C), infinite where there is no code for what there is
        best = int(steps.square().sum(1).argmin())
        return Grid(_floats(_bounded(steps[best])), (LEAST + best,))

    def made(self) -> Grid:
        """Return steps and a code of nought for each channel: its ends are the first and the last code."""
        least, most = self._ends()
        steps = _bounded((most - least) / (MOST - LEAST))
        zeros = (LEAST - (least / steps)).round().clamp(LEAST, MOST)
        return Grid(_floats(steps), tuple(int(zero) for zero in zeros))

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Return each channel's ends, with nought between them."""
        assert self.least is not None and self.most is not None  # noqa: S101, PT018 - made by `see`
        return self.least.clamp(max=0), self.most.clamp(min=0)

    def as_tensor(self) -> Tensor:
        """Return ends, means and mean squares, float32 (4, C)."""
        import torch

        assert self.least is not None and self.most is not None  # noqa: S101, PT018 - made by `see`
        return torch.stack([self.least, self.most, self.mean, self.mean_square]).float()

    @classmethod
    def read(cls, rows: Tensor) -> Channels:
        """Read what `as_tensor` gave.

        Raises:
            ValueError: it can't be.
        """
        if rows.ndim != 2 or len(rows) != 4 or not bool(rows.isfinite().all()) or bool((rows[0] > rows[1]).any()):  # noqa: PLR2004
            message = "no statistics of channels"
            raise ValueError(message)
        return cls(1, *rows.double())


def _bounded(steps: Tensor) -> Tensor:
    return steps.clamp_min(max(_LEAST_STEP * float(steps.max()), 1e-12))


def _floats(values: Tensor) -> tuple[float, ...]:
    """Return float32's nearest to each, so that JSON and every backend have the same ones."""
    return tuple(values.float().tolist())
