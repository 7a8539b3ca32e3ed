"""Runs of an ONNX Runtime session whose tensors lie on a device, at addresses that stay: what CUDA graphs ask for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .crossing import Same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

KEPT = 4
"""Sets of shapes whose tensors stay on the device."""
_NO_GRAPH = -1


@dataclass
class _Slot:
    """The tensors of one set of shapes, and the number of its graph."""

    number: int
    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class DeviceBinding:
    """Inputs are copied to the device, what is the same as before only once; outputs come back when all is done.

    With `graphs` each set of shapes is a CUDA graph, recorded in its first run; ONNX Runtime keeps a graph as long as
    the session, so shapes after the first few run without.
    """

    def __init__(self, session: Any, device: str, dtypes: Mapping[str, str], *, graphs: bool = False) -> None:  # noqa: ANN401 - onnxruntime is untyped
        self._session, self._device, self._dtypes, self._graphs = session, device, dtypes, graphs
        self._slots: OrderedDict[Any, _Slot] = OrderedDict()
        self._made = 0
        self.same = Same()

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        import torch

        slot = self._slot(inputs, outputs)
        for name, tensor in inputs.items():
            value = slot.inputs[name]
            self.same.get(f"{slot.number}/{name}", tensor, partial(_fill, value, tensor))
        self._session.run_with_iobinding(slot.binding, self._run_options(slot))
        return {name: torch.from_numpy(value.numpy().copy()) for name, value in slot.outputs.items()}

    def _slot(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, ...]]) -> _Slot:
        key = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        if key not in self._slots:
            free = [key for key, slot in self._slots.items() if not self._has_graph(slot)]
            if len(free) == KEPT:
                del self._slots[free[0]]
            self._slots[key] = self._new(inputs, outputs)
        self._slots.move_to_end(key)
        return self._slots[key]

    def _new(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, ...]]) -> _Slot:
        binding = self._session.io_binding()
        given = {name: self._value(tensor.shape, str(tensor.dtype)) for name, tensor in inputs.items()}
        made = {name: self._value(shape, self._dtypes[name]) for name, shape in outputs.items()}
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in made.items():
            binding.bind_ortvalue_output(name, value)
        self._made += 1
        return _Slot(self._made, binding, given, made)

    def _value(self, shape: tuple[int, ...], dtype: str) -> Any:  # noqa: ANN401 - an OrtValue
        import numpy as np
        import onnxruntime

        kind = np.dtype(dtype.removeprefix("torch."))
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(tuple(shape), kind, self._device, 0)

    def _has_graph(self, slot: _Slot) -> bool:
        return self._graphs and slot.number <= KEPT

    def _run_options(self, slot: _Slot) -> Any:  # noqa: ANN401 - RunOptions
        if not self._graphs:
            return None
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(slot.number if self._has_graph(slot) else _NO_GRAPH))
        return options


def _fill(value: Any, tensor: Tensor) -> bool:  # noqa: ANN401 - an OrtValue
    value.update_inplace(tensor.numpy())
    return True
