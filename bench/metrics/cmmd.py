"""CMMD (Jayasumana and others, 2024: "Rethinking FID: Towards a Better Evaluation Metric for Image Generation")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clip import Clip
from .metric import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from ...pictures import Pictures

_SIGMA = 10.0
"""Bandwidth of the Gaussian kernel."""
_SCALE = 1000.0
_ROWS = 1024
"""Rows of a kernel matrix that are in memory at once."""


class Cmmd(Metric):
    """1000 times the squared maximum mean discrepancy of two sets of CLIP vectors: 0 equal.

    The estimator is the reference's, with the least variance (V-statistic: equal pairs count, so it's never below 0).
    Pictures are squeezed to the model's square, not cropped, likewise.

    Weights: a CLIPModel folder; the paper's is openai/clip-vit-large-patch14-336.
    """

    name = "cmmd"

    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        self._clip = Clip(self.folder)

    def _values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:  # noqa: ARG002 - no prompt counts
        a, b = self._vectors(expected), self._vectors(got)
        return [_SCALE * (_mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b))]

    def _vectors(self, pictures: Pictures) -> Tensor:
        side = {"height": self._clip.side, "width": self._clip.side}
        # Double, because the figure is the small difference of means that are all near 1.
        return self._clip.pictures(pictures, size=side, do_center_crop=False).double()


def _mean_kernel(a: Tensor, b: Tensor) -> float:
    """Return the mean of exp(-|x - y|² / 2σ²) over all pairs; of vectors of length 1, |x - y|² is 2 - 2 x·y."""
    total = sum(((rows @ b.T - 1) / _SIGMA**2).exp().sum().item() for rows in a.split(_ROWS))
    return total / (len(a) * len(b))
