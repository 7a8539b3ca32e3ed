"""What a suspect took and gave, as a cause is found from: a layer, or the operations between layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .distance import relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ..runtimes.runtime import Operation
    from .traces import Attended

EXPLAINED = 0.1
"""A cause explains an error of which it leaves at most this share."""
GRIDS = frozenset({"FakeQuantize", "QuantizeLinear"})
"""Operations that round activations to numbers that were calibrated."""
_STEPS = 255
"""From the first code of a byte to its last."""
_PRODUCTS = ("Conv", "MatMul", "Gemm", "Linear", "Gather", "Embedding", "Norm", "ScaledDotProductAttention")
_LAYOUT = frozenset(
    {
        "Broadcast", "Cast", "Chunk", "Concat", "Contiguous", "Convert", "Expand", "Flatten", "Gather", "Getitem", "Identity",
        "Movedim", "Permute", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "To", "Transpose", "Unflatten",
        "Unsqueeze", "VariadicSplit", "View",
    }
)  # fmt: skip
"""Operations, in any backend, that move values and leave them as they are."""


@dataclass(frozen=True)
class Rounding:
    """What an operation that rounds to a grid was given, and the ends of that grid, which broadcast to it."""

    operation: Operation
    given: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, operation: Operation, taken: Sequence[Tensor], made: Tensor) -> Rounding:
        """Read the ends from a QuantizeLinear's scale and zero point, or a FakeQuantize's limits.

        Args:
            operation: one of these.
            taken: its inputs, in their order.
            made: its output.
        """
        import torch

        given, first, second, *_ = (each.float() for each in taken)
        if operation.kind == "FakeQuantize":
            return cls(operation, given, first, second)
        limits = torch.iinfo(made.dtype)
        shape = [1, -1, *[1] * (given.ndim - 2)] if first.numel() > 1 else []
        step, zero = first.reshape(shape), second.reshape(shape if second.numel() > 1 else [])
        return cls(operation, given, (limits.min - zero) * step, (limits.max - zero) * step)

    @property
    def clipped(self) -> Tensor:
        """What lies farther than half a step beyond the grid."""
        beyond = (self.high - self.low) / (2 * _STEPS)
        return (self.given < self.low - beyond) | (self.given > self.high + beyond)


@dataclass(frozen=True)
class Evidence:
    """What a suspect took and gave: a layer, or the operations between layers."""

    made: Tensor
    expected: Tensor
    """What eager float32 makes of what the suspect was given; between layers, of what the part was given."""
    inner: Sequence[tuple[Operation, Tensor]]
    """Its operations as they run, each with what it gave."""
    precision: str = "fp32"
    module: nn.Module | None = None
    given: Tensor | None = None
    rounded: Tensor | None = None
    """What eager makes of it with weights that are rounded as the recipe says."""
    attended: Sequence[Attended] = ()
    """Attentions of eager among it."""
    roundings: Sequence[Rounding] = ()
    """Of activations among it, to grids that were calibrated."""

    @property
    def error(self) -> float:
        return relative_error(self.made, self.expected)

    @cached_property
    def unproved(self) -> Sequence[tuple[Operation, Tensor]]:
        """Its operations without those that lead to the last softmax whose result is eager's: these aren't at fault."""
        kinds = [operation.kind for operation, _ in self.inner]
        places = [place for place, kind in enumerate(kinds) if kind == "Softmax"]
        for place, attended in reversed([*zip(places, self.attended, strict=False)]):
            got = self.inner[place][1].float()
            same = got.numel() == attended.shares.numel()
            if same and relative_error(got.reshape(attended.shares.shape), attended.shares) < EXPLAINED * self.error:
                sound = _leading_to(self.inner[place][0], self.inner)
                return [each for each in self.inner if each[0].outputs[0] not in sound] or self.inner
        return self.inner


def _leading_to(last: Operation, inner: Sequence[tuple[Operation, Tensor]]) -> set[str]:
    """Return the first results of an operation and of those that it comes from."""
    makers = {name: operation for operation, _ in inner for name in operation.outputs}
    found, waiting = set(), [last]
    while waiting:
        operation = waiting.pop()
        if operation.outputs[0] not in found:
            found.add(operation.outputs[0])
            waiting += [makers[name] for name in operation.inputs if name in makers]
    return found


def principal(inner: Sequence[tuple[Operation, Tensor]]) -> Operation | None:
    """Return the operation that a layer is for: its product or norm, else the last one that changes values."""
    operations = [operation for operation, _ in inner]
    found = [operation for operation in operations if any(kind in operation.kind for kind in _PRODUCTS)]
    return next(iter(found or _changing(inner)[-1:] or operations[-1:]), None)


def _changing(inner: Sequence[tuple[Operation, Tensor]]) -> list[Operation]:
    """Return the operations whose results are other values than what they took, such as sums: not layouts, not `x / 1`."""
    values = {operation.outputs[0]: tensor for operation, tensor in inner}
    computing = [(operation, made) for operation, made in inner if operation.kind not in _LAYOUT]
    return [
        operation
        for operation, made in computing
        if not any(name in values and values[name].equal(made) for name in operation.inputs)
    ]
