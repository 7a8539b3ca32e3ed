"""w8a8: int8 weights, and activations rounded to 8 bits with scales that were calibrated."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .int8 import Int8

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

MOST = 127


class Int8Static(Int8):
    """Layers that weren't calibrated have int8 weights alone."""

    calibrated: ClassVar[bool] = True

    def round_module(
        self, module: nn.Module, activations: Mapping[str, tuple[float, float]] | None = None
    ) -> nn.Module:
        """Round weights, and let each calibrated layer round what it is given, and a convolution what it gives."""
        from torch import nn

        layers = dict(super().round_module(module, activations).named_modules())
        for path, (before, after) in (activations or {}).items():
            layer = layers[path]
            layer.register_forward_pre_hook(lambda _, given, scale=before: (rounded(given[0], scale), *given[1:]))
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda *made, scale=after: rounded(made[-1], scale))
        return module


def rounded(values: Tensor, scale: float) -> Tensor:
    """Round to whole multiples of a scale, from -128 to 127 of them."""
    return ((values.float() / scale).round().clamp(-MOST - 1, MOST) * scale).to(values.dtype)
