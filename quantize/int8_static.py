"""w8a8: int8 weights, and activations rounded to 8 bits with scales that were calibrated."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .int8 import Int8

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST = 127


class Int8Static(Int8):
    """Layers that weren't calibrated have int8 weights alone."""

    calibrated: ClassVar[bool] = True

    def watch(self, layer: nn.Module, scales: tuple[float, float] | None) -> None:
        """Let a layer that was calibrated round what it is given, and a convolution what it gives."""
        from torch import nn

        if scales is None:
            return
        before, after = scales
        layer.register_forward_pre_hook(lambda _, given: (rounded(given[0], before), *given[1:]))
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *made: rounded(made[-1], after))


def rounded(values: Tensor, scale: float) -> Tensor:
    """Round to whole multiples of a scale, from -128 to 127 of them."""
    return ((values.float() / scale).round().clamp(-MOST - 1, MOST) * scale).to(values.dtype)
