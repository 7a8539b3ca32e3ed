"""fp8: 8-bit floats of 4 exponent and 3 mantissa bits (E4M3), for weights and, with calibrated scales, activations.

Micikevicius et al., FP8 formats for deep learning (https://arxiv.org/abs/2209.05433).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .format import Format, too_small

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from .grid import Grids

MOST = 448.0
"""The largest finite E4M3 number."""
CAPABILITY = (8, 9)
"""Compute capability from which NVIDIA's GPUs multiply 8-bit floats."""
LEAST_RANGE = 1e-12
"""What a row of activations is taken to reach at least, where it gets its scale as it comes: a scale of 0 would make a row of
noughts NaN, and SDXL's empty negative prompts are such rows."""
_STEPS = 127
"""What calibrated scales are for: the range's end is so many of them."""


class Fp8(Format):
    """The largest magnitude of an output channel becomes 448; codes are the floats' bytes, as int8.

    Layers that weren't calibrated have such weights alone.
    """

    name: ClassVar[str] = "fp8"
    bits: ClassVar[int] = 8
    group: ClassVar[int | None] = None
    calibrated: ClassVar[bool] = True
    activations_method: ClassVar[str | None] = "max"
    uses_inputs: ClassVar[bool] = False
    """Steps of a float are finest near nought: a wider range costs it nothing, and clipping much."""

    def obstacle(self, shape: Sequence[int]) -> str | None:
        return too_small(shape)

    def pack(self, rows: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - steps go by the largest
        import torch

        scales = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / MOST
        return to_fp8(rows / scales).view(torch.int8), scales

    def unpack(self, codes: Tensor, scales: Tensor) -> Tensor:
        import torch

        return codes.view(torch.float8_e4m3fn).float() * scales

    def watch(self, layer: nn.Module, grids: Grids | None) -> None:
        """Let a layer that was calibrated round what it is given."""
        if grids is not None:
            step = activation_scale(grids[0].even)
            layer.register_forward_pre_hook(lambda _, given: (rounded(given[0], step), *given[1:]))


def activation_scale(step: float) -> float:
    """Return the scale for E4M3 that has the range of 127 calibrated steps."""
    return step * _STEPS / MOST


def to_fp8(values: Tensor) -> Tensor:
    """Round to E4M3, to the nearest, ties to even; what is larger than 448 becomes 448."""
    import torch

    return values.clamp(-MOST, MOST).to(torch.float8_e4m3fn)


def rounded(values: Tensor, scale: float) -> Tensor:
    """Round to E4M3 multiples of a scale."""
    return (to_fp8(values.float() / scale).float() * scale).to(values.dtype)
