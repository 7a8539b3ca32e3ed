"""Runs of an ONNX Runtime session on tensors of torch's that lie on a device, at addresses that stay: what CUDA graphs ask for."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .crossing import Crossing

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

KEPT = 4
"""Sets of shapes whose tensors stay on the device."""
_NO_GRAPH = -1


@dataclass
class _Slot:
    """The tensors of one set of shapes, and the number of its graph."""

    number: int
    binding: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class DeviceBinding:
    """Inputs are copied to tensors that stay, what is the same as before only once; results are copies.

    Results lie on the device if an input does, else in host memory. ONNX Runtime has a stream of its own: torch's is
    waited for before a run, and a run returns when it is done, all but the copies.

    With `graphs` each set of shapes is a CUDA graph, recorded in its first run; ONNX Runtime keeps a graph as long as
    the session, so shapes after the first few run without.
    """

    def __init__(self, session: Any, device: torch.device, dtypes: Mapping[str, str], *, graphs: bool = False) -> None:  # noqa: ANN401 - onnxruntime is untyped
        self._session, self._device, self._dtypes, self._graphs = session, device, dtypes, graphs
        self._slots: OrderedDict[Any, _Slot] = OrderedDict()
        self._made = 0
        self._crossing = Crossing(device)
        self.same = self._crossing.same

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        slot = self._slot(inputs, outputs)
        for name, tensor in inputs.items():
            fill = partial(self._crossing.fill, slot.inputs[name], tensor)
            self.same.get(f"{slot.number}/{name}", tensor, fill)
        self._crossing.finish()
        self._session.run_with_iobinding(slot.binding, self._run_options(slot))
        made = [tensor.clone() for tensor in slot.outputs.values()]
        return dict(zip(slot.outputs, self._crossing.bring_home(made, inputs), strict=True))

    def finish(self) -> None:
        """Wait for what torch's stream was asked for: copies of inputs and results."""
        self._crossing.finish()

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
        import torch

        binding = self._session.io_binding()
        given = {name: torch.empty(each.shape, dtype=each.dtype, device=self._device) for name, each in inputs.items()}
        made = {
            name: torch.empty(shape, dtype=getattr(torch, self._dtypes[name]), device=self._device)
            for name, shape in outputs.items()
        }
        for name, tensor in given.items():
            binding.bind_input(name, *place_of(tensor))
        for name, tensor in made.items():
            binding.bind_output(name, *place_of(tensor))
        self._made += 1
        return _Slot(self._made, binding, given, made)

    def _has_graph(self, slot: _Slot) -> bool:
        return self._graphs and slot.number <= KEPT

    def _run_options(self, slot: _Slot) -> Any:  # noqa: ANN401 - RunOptions
        if not self._graphs:
            return None
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(slot.number if self._has_graph(slot) else _NO_GRAPH))
        return options


def place_of(tensor: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Return what ONNX Runtime binds a tensor by: device, its number, NumPy's dtype, shape, address."""
    import numpy as np

    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return tensor.device.type, tensor.device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr()
