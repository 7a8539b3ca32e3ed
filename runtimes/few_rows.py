"""Integer products of few rows on GPUs: CUDA's take more than 16, so layers that get fewer are given rows of noughts, too.

Embeddings of timesteps and what modulates a block come as one row a picture.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAST_ROWS = 32
"""`torch._int_mm` asks for 17 or more on CUDA; a whole tile's costs no more."""


def fill_up(module: nn.Module) -> int:
    """Have every layer that multiplies torchao's int8 codes get `LEAST_ROWS` rows or more; return how many these are.

    Rows are rounded each by itself, so those that are added change nothing of the others. Layers change their class, not
    their `forward`: a compiled block would be compiled anew for every other function.
    """
    layers = [layer for layer in module.modules() if type(getattr(layer, "weight", None)).__name__ == "Int8Tensor"]
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _filled_up(kind)
    return len(layers)


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
