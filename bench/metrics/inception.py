"""Inception v3 (Szegedy and others, 2015) as FID has it, under the names of torchvision and pytorch-fid.

It differs from torchvision's in its poolings, which don't count what is padded, and in Mixed_7c's, which takes the
largest; and its classes are 1008.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_SIDE = 299
"""Pixels: what pictures are resized to."""
_INPUT, _POOL = "input", "pool"


class _Layer(NamedTuple):
    """A convolution of a block: its name, whose output it takes, its channels, kernel (height, width) and stride."""

    name: str
    source: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Inception(nn.Module):
    """Pictures (N, 3, H, W) uint8 to features (N, 2048), the average over places of the last block.

    `fc` computes nothing here. It is in the weights, and by its shape they are told from ImageNet's.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        channels = 192
        for name, (layers, pool) in _BLOCKS.items():
            block = _Block(channels, layers, pool)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, 1008)

    def forward(self, pictures: Tensor) -> Tensor:
        x = functional.interpolate(pictures / 255, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_half(x)))
        x = _half(x)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


class _Convolution(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Chains of convolutions of one input and of its pooling; what no other layer takes is joined along the channels."""

    def __init__(self, inputs: int, layers: tuple[_Layer, ...], pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._layers, self._pool = layers, pool
        taken = {layer.source for layer in layers}
        self._ends = [name for name in (*(layer.name for layer in layers), _POOL) if name not in taken]
        channels = {_INPUT: inputs, _POOL: inputs}
        for name, source, outputs, (high, wide), stride in layers:
            padding = (high // 2, wide // 2) if stride == 1 else 0
            self.add_module(name, _Convolution(channels[source], outputs, (high, wide), stride=stride, padding=padding))
            channels[name] = outputs
        self.channels = sum(channels[name] for name in self._ends)

    def forward(self, x: Tensor) -> Tensor:
        found = {_INPUT: x, _POOL: self._pool(x)}
        for layer in self._layers:
            found[layer.name] = self.get_submodule(layer.name)(found[layer.source])
        return torch.cat([found[name] for name in self._ends], dim=1)


_half = partial(functional.max_pool2d, kernel_size=3, stride=2)
_average = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_largest = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)


def _block_a(pooled: int) -> tuple[_Layer, ...]:
    return (
        _Layer("branch1x1", _INPUT, 64),
        _Layer("branch5x5_1", _INPUT, 48),
        _Layer("branch5x5_2", "branch5x5_1", 64, (5, 5)),
        _Layer("branch3x3dbl_1", _INPUT, 64),
        _Layer("branch3x3dbl_2", "branch3x3dbl_1", 96, (3, 3)),
        _Layer("branch3x3dbl_3", "branch3x3dbl_2", 96, (3, 3)),
        _Layer("branch_pool", _POOL, pooled),
    )


_BLOCK_B = (
    _Layer("branch3x3", _INPUT, 384, (3, 3), stride=2),
    _Layer("branch3x3dbl_1", _INPUT, 64),
    _Layer("branch3x3dbl_2", "branch3x3dbl_1", 96, (3, 3)),
    _Layer("branch3x3dbl_3", "branch3x3dbl_2", 96, (3, 3), stride=2),
)


def _block_c(inner: int) -> tuple[_Layer, ...]:
    return (
        _Layer("branch1x1", _INPUT, 192),
        _Layer("branch7x7_1", _INPUT, inner),
        _Layer("branch7x7_2", "branch7x7_1", inner, (1, 7)),
        _Layer("branch7x7_3", "branch7x7_2", 192, (7, 1)),
        _Layer("branch7x7dbl_1", _INPUT, inner),
        _Layer("branch7x7dbl_2", "branch7x7dbl_1", inner, (7, 1)),
        _Layer("branch7x7dbl_3", "branch7x7dbl_2", inner, (1, 7)),
        _Layer("branch7x7dbl_4", "branch7x7dbl_3", inner, (7, 1)),
        _Layer("branch7x7dbl_5", "branch7x7dbl_4", 192, (1, 7)),
        _Layer("branch_pool", _POOL, 192),
    )


_BLOCK_D = (
    _Layer("branch3x3_1", _INPUT, 192),
    _Layer("branch3x3_2", "branch3x3_1", 320, (3, 3), stride=2),
    _Layer("branch7x7x3_1", _INPUT, 192),
    _Layer("branch7x7x3_2", "branch7x7x3_1", 192, (1, 7)),
    _Layer("branch7x7x3_3", "branch7x7x3_2", 192, (7, 1)),
    _Layer("branch7x7x3_4", "branch7x7x3_3", 192, (3, 3), stride=2),
)
_BLOCK_E = (
    _Layer("branch1x1", _INPUT, 320),
    _Layer("branch3x3_1", _INPUT, 384),
    _Layer("branch3x3_2a", "branch3x3_1", 384, (1, 3)),
    _Layer("branch3x3_2b", "branch3x3_1", 384, (3, 1)),
    _Layer("branch3x3dbl_1", _INPUT, 448),
    _Layer("branch3x3dbl_2", "branch3x3dbl_1", 384, (3, 3)),
    _Layer("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3)),
    _Layer("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1)),
    _Layer("branch_pool", _POOL, 192),
)
_BLOCKS: dict[str, tuple[tuple[_Layer, ...], Callable[[Tensor], Tensor]]] = {
    "Mixed_5b": (_block_a(32), _average),
    "Mixed_5c": (_block_a(64), _average),
    "Mixed_5d": (_block_a(64), _average),
    "Mixed_6a": (_BLOCK_B, _half),
    "Mixed_6b": (_block_c(128), _average),
    "Mixed_6c": (_block_c(160), _average),
    "Mixed_6d": (_block_c(160), _average),
    "Mixed_6e": (_block_c(192), _average),
    "Mixed_7a": (_BLOCK_D, _half),
    "Mixed_7b": (_BLOCK_E, _average),
    "Mixed_7c": (_BLOCK_E, _largest),
}
