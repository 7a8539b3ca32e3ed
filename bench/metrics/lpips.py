"""LPIPS (Zhang and others, 2018: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric")."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import InputError
from .alexnet import CHANNELS, AlexNet
from .metric import Metric, batches
from .weights import fill, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from ...pictures import Pictures

_SMALLEST = 64
"""Pixels: the side of the patches that the linear weights were fitted on."""
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation, for pictures in [-1, 1]."""
_EPSILON = 1e-10


class Lpips(Metric):
    """LPIPS v0.1 over AlexNet: 0 equal, about 1 unlike.

    Weights: torchvision's AlexNet (`features.*`; its classifier isn't needed). The linear weights
    (`lin0.model.1.weight`…) come from torchmetrics unless the folder has them.
    """

    name = "lpips"

    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        found = tensors(self.folder)
        self._network = AlexNet()
        fill(self._network, {name: found[name] for name in found if name.startswith("features.")}, self.folder)
        linear = {name: found[name] for name in found if name.startswith("lin")}
        self._linear = _Linear()
        fill(self._linear, linear or _published(), self.folder)

    def _values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:  # noqa: ARG002 - no prompt counts
        """Return the distance of each pair.

        Raises:
            InputError: the pairs differ in size, or are smaller than 64 px.
        """
        if expected.shape != got.shape or min(got.shape[1:3]) < _SMALLEST:
            message = (
                f"got pictures {got.shape[1:3]} for {expected.shape[1:3]}, expected the same, {_SMALLEST} px or more"
            )
            raise InputError(message)
        return [value for batch in batches(len(got)) for value in self._distances(expected[batch], got[batch])]

    @torch.inference_mode()
    def _distances(self, expected: Pictures, got: Pictures) -> list[float]:
        layers = zip(self._network(_pixels(expected)), self._network(_pixels(got)), strict=True)
        differences = [(_unit(a) - _unit(b)) ** 2 for a, b in layers]
        distances: list[float] = self._linear(differences).tolist()
        return distances


class _Linear(nn.Module):
    """Weighs the channels of each layer's squared differences, (N, C, H, W), and sums over layers: (N,)."""

    def __init__(self) -> None:
        super().__init__()
        for layer, channels in enumerate(CHANNELS):
            # Named as in the published weights, where a dropout comes first.
            model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{layer}", nn.ModuleDict({"model": model}))

    def forward(self, differences: list[Tensor]) -> Tensor:
        weighed = [self.get_submodule(f"lin{i}.model")(each) for i, each in enumerate(differences)]
        return torch.stack([layer.mean(dim=(1, 2, 3)) for layer in weighed]).sum(dim=0)


def _published() -> dict[str, Tensor]:
    with as_file(files("torchmetrics") / "functional" / "image" / "lpips_models" / "alex.pth") as file:
        published: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return published


def _pixels(pictures: Pictures) -> Tensor:
    """Bring pictures (N, H, W, 3) uint8 to what the network was trained on, (N, 3, H, W)."""
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    return (pixels - torch.tensor(_SHIFT)[:, None, None]) / torch.tensor(_SCALE)[:, None, None]


def _unit(features: Tensor) -> Tensor:
    """Scale the channels at each place to length 1."""
    return features / (features.norm(dim=1, keepdim=True) + _EPSILON)
