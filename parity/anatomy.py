"""A backend's part by layers: which tensors go into one and come out of it, and what lies between two."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ..runtimes.runtime import Operation

_ROUNDINGS = {"Cast", "Convert", "DynamicQuantizeLinear", "FakeQuantize", "QuantizeLinear", "To", "TypeAs", "Float"}
"""Operations that bring what a layer takes into its own dtype."""


class Anatomy:
    """The operations of a part that depend on its inputs; what is made of constants alone is left out."""

    def __init__(self, operations: Iterable[Operation], inputs: Collection[str]) -> None:
        self._live = set(inputs)
        self._by_layer: dict[str, list[Operation]] = defaultdict(list)
        self._producers: dict[str, Operation] = {}
        for operation in operations:
            if self._live.isdisjoint(operation.inputs):
                continue
            self._live |= set(operation.outputs)
            self._producers |= dict.fromkeys(operation.outputs, operation)
            if operation.layer is not None:
                self._by_layer[operation.layer].append(operation)

    def operations(self, layer: str) -> list[Operation]:
        return self._by_layer.get(layer, [])

    def given(self, layer: str) -> list[str]:
        """Return tensors from outside that a layer takes; before they are brought into its dtype, where they are."""
        inside = {name for operation in self.operations(layer) for name in operation.outputs}
        taken = [name for operation in self.operations(layer) for name in operation.inputs]
        return list(dict.fromkeys(self._wide(name) for name in taken if name in self._live and name not in inside))

    def made(self, layer: str) -> list[str]:
        """Return the tensors that a layer computes, the last one first."""
        return [name for operation in reversed(self.operations(layer)) for name in operation.outputs]

    def roundings(self, layer: str) -> list[Operation]:
        """Return the operations outside of a layer that bring what it takes into its dtype."""
        makers = [self._producers.get(name) for operation in self.operations(layer) for name in operation.inputs]
        inside = self.operations(layer)
        return [maker for maker in makers if maker and maker.kind in _ROUNDINGS and maker not in inside]

    def between(self, tensor: str, known: Collection[str]) -> tuple[list[Operation], set[str]]:
        """Go back from a tensor to those that are known, or to the part's inputs.

        Returns:
            The operations on the way, in the order in which they run, and the known tensors that they begin with.
        """
        found: set[str] = set()
        seen: set[str] = set()
        waiting = [tensor]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._producers:
                continue
            seen.add(name)
            if name in known and name != tensor:
                found.add(name)
            else:
                waiting.extend(self._producers[name].inputs)
        operations = dict.fromkeys(self._producers.values())
        on_the_way = [each for each in operations if not (seen - found).isdisjoint(each.outputs)]
        return on_the_way, found

    def _wide(self, name: str) -> str:
        producer = self._producers.get(name)
        return self._wide(producer.inputs[0]) if producer and producer.kind in _ROUNDINGS else name
