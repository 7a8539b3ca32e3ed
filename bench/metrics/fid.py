"""FID (Heusel and others, 2017: "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from ...errors import InputError
from .inception import Inception
from .metric import Metric, batches
from .weights import fill, tensors

if TYPE_CHECKING:
    from ...pictures import Pictures

_FEWEST = 2
"""Pictures of which a covariance can be computed; how many are needed for a figure that means something is a fact."""


class Fid(Metric):
    """Fréchet distance of two sets' Inception features, each taken for normally distributed: 0 equal.

    Weights: FID's own Inception v3, not ImageNet's: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, as it is or
    as safetensors.
    """

    name = "fid"

    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        found = tensors(self.folder)
        self._network = Inception()
        fill(self._network, found, self.folder)

    @torch.inference_mode()
    def _values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:  # noqa: ARG002 - no prompt counts
        """Return the distance, alone.

        Raises:
            InputError: a set has a single picture.
        """
        if min(len(expected), len(got)) < _FEWEST:
            message = f"got {len(expected)} and {len(got)} pictures, expected at least {_FEWEST} of each"
            raise InputError(message)
        distance = FrechetInceptionDistance(feature=self._network)
        for pictures, real in ((expected, True), (got, False)):
            for batch in batches(len(pictures)):
                distance.update(torch.tensor(pictures[batch]).permute(0, 3, 1, 2), real=real)
        return [float(distance.compute())]
