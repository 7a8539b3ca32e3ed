"""w8a8: int8 weights, and activations rounded to 8 bits to numbers that were calibrated."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .int8 import Int8

if TYPE_CHECKING:
    from torch import nn

    from .grid import Grids


class Int8Static(Int8):
    """Layers that weren't calibrated have int8 weights alone."""

    version: ClassVar[int] = 2
    calibrated: ClassVar[bool] = True
    uses_inputs: ClassVar[bool] = False  # next to what the activations lose it is nothing

    def watch(self, layer: nn.Module, grids: Grids | None) -> None:
        """Let a layer that was calibrated round what it is given, and a convolution what it gives."""
        from torch import nn

        if grids is None:
            return
        before, after = grids
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        layer.register_forward_pre_hook(lambda _, given: (before.round(given[0], axis), *given[1:]))
        if after and isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *made: after.round(made[-1], axis))
