"""w8a8-dynamic: int8 weights, and activations that products round to 8 bits as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .int8 import Int8

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .grid import Grids

_STEPS = 255


class Int8Dynamic(Int8):
    """Weights are `Int8`'s. How many activations share a scale is the backend's: all of a tensor, or some in a row."""

    uses_inputs: ClassVar[bool] = False

    def watch(self, layer: nn.Module, grids: Grids | None) -> None:  # noqa: ARG002 - needs none
        """Let a Linear layer round what it is given with one scale, as ONNX Runtime does."""
        from torch import nn

        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))


def rounded(values: Tensor) -> Tensor:
    """Round to 256 numbers from the smallest to the largest value, nought among them (ONNX, DynamicQuantizeLinear)."""
    least, most = values.float().min().clamp(max=0), values.float().max().clamp(min=0)
    scale = ((most - least) / _STEPS).clamp_min(1e-30)
    zero = (-least / scale).round()
    codes = ((values.float() / scale).round() + zero).clamp(0, _STEPS)
    return ((codes - zero) * scale).to(values.dtype)
