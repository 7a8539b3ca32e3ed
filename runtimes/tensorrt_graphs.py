"""CUDA graphs of a TensorRT engine: one a set of shapes, each recorded from a context of its own."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from .tensorrt_context import Context
    from .tensorrt_device import Device

KEPT = 4
"""Sets of shapes whose graphs are kept at a time, as of the other backends."""


@dataclass
class _Recorded:
    """A graph, and what it must find as it was: the context that it was recorded from, and all that its addresses name."""

    context: Context
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    block: tuple[int, int] = (0, 0)
    graph: Any = None


class Graphs:
    """Records what a run launches, and replays it; anew when the shared block moved.

    TensorRT keeps in a context what its launches refer to, so a context that a graph was recorded from gets no other shapes.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept: OrderedDict[Any, _Recorded] = OrderedDict()
        self.captures = self.replays = 0

    def context(self, key: Any, make: Callable[[], Context]) -> Context:  # noqa: ANN401 - whatever tells shapes apart
        """Return the context of a set of shapes; the one that was used least recently goes for a new one."""
        if key not in self._kept:
            if len(self._kept) == KEPT:
                self._device.finish()
                self._kept.popitem(last=False)
            self._kept[key] = _Recorded(make())
        self._kept.move_to_end(key)
        return self._kept[key].context

    def run(
        self,
        key: Any,  # noqa: ANN401 - as of `context`
        block: tuple[int, int],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Run the shapes of a key on copies of the inputs; fill the outputs."""
        recorded = self._kept[key]
        if not recorded.inputs:
            recorded.inputs = {name: self._device.like(tensor) for name, tensor in inputs.items()}
            recorded.outputs = {name: self._device.like(tensor) for name, tensor in outputs.items()}
        for name, tensor in inputs.items():
            self._device.copy(tensor, recorded.inputs[name])
        if recorded.graph is None or recorded.block != block:
            self._record(recorded, block)
        else:
            self._device.replay(recorded.graph)
            self.replays += 1
        for name, tensor in outputs.items():
            self._device.copy(recorded.outputs[name], tensor)

    def _record(self, recorded: _Recorded, block: tuple[int, int]) -> None:
        """Run once, by which TensorRT settles what it keeps for new shapes, and record that run."""
        stream, context = self._device.stream, recorded.context
        context.place(block, {**recorded.inputs, **recorded.outputs})
        context.enqueue(stream)
        recorded.graph = self._device.capture(lambda: context.enqueue(stream))
        recorded.block = block
        self.captures += 1

    def clear(self) -> None:
        self._kept.clear()
