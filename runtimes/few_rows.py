"""torchao's integer products on NVIDIA GPUs: of few rows, and without a wait for each.

They take more than 16 rows, so layers that get fewer, such as embeddings of timesteps, are given rows of noughts, too. And where
nothing is compiled torchao writes each tensor out as text to learn what it is, which waits for the GPU, and copies the whole
weight: here it does neither.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAST_ROWS = 32
"""`torch._int_mm` asks for 17 or more on CUDA; a whole tile's costs no more."""
_FEWEST_ROWS, _MULTIPLE = 16, 8
"""More rows than these, and multiples of this, are what CUDA's integer product takes."""


def fill_up(module: nn.Module) -> int:
    """Have every layer that multiplies torchao's int8 codes get `LEAST_ROWS` rows or more; return how many these are.

    Rows are rounded each by itself, so those that are added change nothing of the others. Layers change their class, not
    their `forward`: a compiled block would be compiled anew for every other function.
    """
    layers = [layer for layer in module.modules() if type(getattr(layer, "weight", None)).__name__ == "Int8Tensor"]
    if layers:
        multiply_plainly()
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _filled_up(kind)
    return len(layers)


@cache
def multiply_plainly() -> None:
    """Have torchao's layers call torch's integer product, for the rest of the process, where its shapes are torch's."""
    import torch
    from torchao.kernel import intmm

    careful: Any = intmm.safe_int_mm

    def product(left: Tensor, right: Tensor) -> Tensor:
        """Multiply int8 codes (rows, inner) and (inner, columns); return int32."""
        if torch.compiler.is_compiling() or not fits(left, right):
            found: Tensor = careful(left, right)
            return found
        return torch._int_mm(left, right)  # noqa: SLF001 - torch has no other name for it

    intmm.safe_int_mm = product


def fits(left: Tensor, right: Tensor) -> bool:
    """Say whether torch multiplies these codes on an NVIDIA GPU; a CPU's product may saturate, which torchao knows."""
    rows, inner = left.shape
    return left.is_cuda and rows > _FEWEST_ROWS and not inner % _MULTIPLE and not right.shape[1] % _MULTIPLE


@cache
def _filled_up(whole: Any) -> type[nn.Module]:  # noqa: ANN401 - a class of layers
    from torch.nn.functional import pad

    class FilledUp(whole):  # type: ignore[misc]
        def forward(self, given: Tensor) -> Tensor:
            rows = given.shape[:-1].numel()
            if rows >= LEAST_ROWS:
                return super().forward(given)
            made = super().forward(pad(given.reshape(rows, given.shape[-1]), (0, 0, 0, LEAST_ROWS - rows)))
            return made[:rows].reshape(*given.shape[:-1], made.shape[-1])

    FilledUp.__name__ = whole.__name__
    return FilledUp
