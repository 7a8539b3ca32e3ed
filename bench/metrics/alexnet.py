"""AlexNet's convolutions (Krizhevsky, 2014: "One weird trick"), under torchvision's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

CHANNELS = (64, 192, 384, 256, 256)
"""Of the five layers, first to last."""


class AlexNet(nn.Module):
    """Pictures (N, 3, H, W) to the five layers' outputs, each (N, C, H', W'); at least 31 px high and wide."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, pictures: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.features:
            pictures = layer(pictures)
            if isinstance(layer, nn.ReLU):
                outputs.append(pictures)
        return outputs
