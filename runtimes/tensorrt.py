"""Run a part with a TensorRT engine: tensors by address on the device, one block of memory for all parts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .. import nvinfer
from ..components.component import solve_sizes
from ..errors import ArtifactError
from . import tensorrt_profiles as profiles
from .runtime import PartFiles, Runtime, as_port
from .tensorrt_device import Device
from .tensorrt_files import ABOUT, WEIGHTS, EngineFiles
from .tensorrt_inspection import inspect, refuse_another_precision
from .tensorrt_refit import Refit, shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor

    from ..hardware import Availability
    from ..recipe import Placement
    from ..sources.lora import Delta

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
}
"""TensorRT's dtype -> torch's."""
_MARGIN_BYTES = 512 << 20
"""Device memory that is left alone when weights are placed: inputs, outputs, and what else runs there."""


@dataclass
class _Captured:
    """A CUDA graph of one set of shapes, and the tensors whose addresses are in it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    addresses: tuple[int, ...] = ()
    graph: Any = None


@dataclass
class _Memory:
    """What an engine takes of the device, in bytes."""

    plan: int
    weights: int
    streamable: int
    streaming_budget: int | None
    activations: int
    scratch: int

    def as_dict(self) -> dict[str, int | None]:
        return {f"{name}_bytes": value for name, value in vars(self).items()}


@dataclass
class _Counts:
    captures: int = 0
    replays: int = 0
    profiles: dict[int, int] = field(default_factory=dict)


class TensorRTRuntime(Runtime):
    """Inputs that lie on the GPU stay there, and so do their results; those of the host come and go once.

    With `cuda_graphs`, what a run launches is recorded once for each set of shapes; again when an address in it changed.
    """

    options: ClassVar[frozenset[str]] = frozenset({"cuda_graphs"})
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    @classmethod
    def probe(cls) -> Availability:
        return nvinfer.runnable()

    @classmethod
    def device_for(cls, placement: Placement) -> str:  # noqa: ARG003 - there is no other
        return "cuda"

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:
        about = json.loads((folder / ABOUT).read_text())
        return shapes(folder, {name: (str(each[0]), bool(each[1])) for name, each in about["weights"].items()})

    def __init__(self, part: PartFiles, placement: Placement) -> None:
        super().__init__(part, placement)
        self._files = EngineFiles.open(part.folder, part.vouched)
        trt = nvinfer.library()
        self._files.refuse_elsewhere(nvinfer.binding())
        self._trt, self._log = trt, list[str]()
        self._logger = nvinfer.logger(trt, self._log)
        self._device = Device.shared()
        self._engine = self._deserialized()
        self._refit = Refit(trt, self._engine, self._logger, self._files) if self._engine.refittable else None
        if self._files.settings["strip"] and self._refit:
            self._refit.load_all()
        if part.deltas:
            self._change(part.deltas)
        self._memory = self._place_weights()
        self._dtypes = self._interface()
        self._profiles = profiles.read(self._engine, [port.name for port in self.inputs if port.dims])
        self._contexts: dict[int, Any] = {}
        self._shapes: dict[int, tuple[Any, ...]] = {}
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._counts = _Counts()
        self._device.reserve(self, self._memory.activations)
        self.configuration = {
            "device": "cuda",
            "fallback": None if placement.device in {"auto", "cuda"} else f"TensorRT doesn't run on {placement.device}",
            "tensorrt": str(trt.__version__),
            "profiles": [str(each) for each in self._profiles],
            "cuda_graphs": self._with_graphs,
            "memory": self._memory.as_dict(),
            **self._inspected(),
        }

    @property
    def _with_graphs(self) -> bool:
        """Whether launches are recorded; not where weights come from host memory in each run, which isn't known to work."""
        memory = self._memory
        streams = memory.streaming_budget is not None and memory.streaming_budget < memory.streamable
        return bool(getattr(self.placement, "cuda_graphs", False)) and not streams

    def _deserialized(self) -> Any:  # noqa: ANN401 - tensorrt is untyped
        runtime = self._trt.Runtime(self._logger)
        if self._files.settings["version_compatible"]:
            runtime.engine_host_code_allowed = True
        with self._files.mapped() as plan:
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            message = f"TensorRT can't open {self._files.folder}: {' '.join(self._log) or 'nothing said why'}"
            raise ArtifactError(message, fix="export the model again on this machine")
        self._runtime = runtime
        return engine

    def _place_weights(self) -> _Memory:
        """Keep as many weights on the device as fit; contexts are made afterwards, for what that leaves."""
        engine, stat = self._engine, self._trt.EngineStat.TOTAL_WEIGHTS_SIZE
        streamable = int(engine.streamable_weights_size) if self._files.settings["weight_streaming"] else 0
        budget = None
        if streamable:
            room = self._device.free_bytes() - _MARGIN_BYTES - int(engine.device_memory_size_v2)
            budget = max(0, min(streamable, room))
            engine.weight_streaming_budget_v2 = budget
        return _Memory(
            plan=self._files.plan_bytes,
            weights=int(engine.get_engine_stat(stat)),
            streamable=streamable,
            streaming_budget=budget,
            activations=int(engine.device_memory_size_v2),
            scratch=int(engine.weight_streaming_scratch_memory_size) if streamable else 0,
        )

    def _interface(self) -> dict[str, torch.dtype]:
        """Return tensor -> dtype; bring the ports in line with the engine's own.

        Raises:
            ArtifactError: they aren't this component's.
        """
        import torch

        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        dtypes = {name: _DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        for name in names:
            if engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                message = f"{self.part.name} wants {name} in host memory: its shapes depend on what is in it"
                raise ArtifactError(message, fix="bake this part for another backend")
        inputs = {
            name: (dtypes[name], len(engine.get_tensor_shape(name)))
            for name in names
            if engine.get_tensor_mode(name) == mode.INPUT
        }
        self._adopt(inputs, set(names) - set(inputs))
        return {name: getattr(torch, dtype) for name, dtype in dtypes.items()}

    def _inspected(self) -> dict[str, Any]:
        """Read back what the engine runs, at the first profile's best shapes.

        Raises:
            ArtifactError: none of its products run in what the recipe says.
        """
        if self._profiles:
            best = {name: ranges[1] for name, ranges in self._profiles[0].ranges.items()}
            self._set_shapes(self._profiles[0], best)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context(0)
        found = inspect(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON), self._files.products)
        refuse_another_precision(self.part.name, found, self._files.products)
        return found.as_dict()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `Runtime.run`; where all inputs lie on the GPU, so do the results."""
        sizes = solve_sizes(self.part.name, self.inputs, inputs)
        fed = {port.name: as_port(self.part.name, port, inputs[port.name]) for port in self.inputs}
        on_device = all(tensor.device.type != "cpu" for tensor in fed.values())
        results = self._execute(fed, {port.name: port.shape(sizes) for port in self.outputs})
        if not on_device:
            self._device.finish()
            results = {name: tensor.to("cpu") for name, tensor in results.items()}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in results.items()}

    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return self._execute(inputs, outputs)

    def _execute(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Run on the device; return tensors there, which are the caller's."""
        assert self._engine is not None, "closed"  # noqa: S101
        brought = {name: self._device.bring(tensor, self._dtypes[name]) for name, tensor in inputs.items()}
        given = {name: tuple(tensor.shape) for name, tensor in brought.items() if tensor.ndim}
        profile = profiles.choose(self.part.name, self._profiles, given)
        self._counts.profiles[profile.index] = self._counts.profiles.get(profile.index, 0) + 1
        self._set_shapes(profile, given)
        made = self._outputs(profile, outputs)
        if self._with_graphs:
            results = self._replayed(profile, given, brought, made)
        else:
            results = {name: self._device.empty(shape, self._dtypes[name]) for name, shape in made.items()}
            self._launch(profile, {**brought, **results})
        self.configuration["runs"] = {
            "by_profile": dict(self._counts.profiles),
            "graph_captures": self._counts.captures,
            "graph_replays": self._counts.replays,
        }
        return {name: self._device.hand_over(tensor) for name, tensor in results.items()}

    def _set_shapes(self, profile: profiles.Profile, given: Mapping[str, tuple[int, ...]]) -> None:
        """Tell a context the shapes; nothing is done where they are the same as before."""
        key = tuple(sorted(given.items()))
        if self._shapes.get(profile.index) == key:
            return
        context = self._context(profile.index)
        for name, shape in given.items():
            if not context.set_input_shape(name, shape):
                message = f"{self.part.name}: TensorRT doesn't take {name} of shape {shape} in profile {profile.index}"
                raise ArtifactError(message, fix="export it again with other +profiles=…")
        self._shapes[profile.index] = key

    def _outputs(
        self, profile: profiles.Profile, expected: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        context = self._context(profile.index)
        lacking = context.infer_shapes()
        if lacking:
            message = f"{self.part.name}: TensorRT can't tell the results' shapes without {', '.join(lacking)}"
            raise ArtifactError(message, fix="export it again")
        found = {name: tuple(int(size) for size in context.get_tensor_shape(name)) for name in expected}
        if found != dict(expected):
            message = f"{self.part.name} would give {found}, expected {dict(expected)}"
            raise ArtifactError(message, fix="export it again")
        return found

    def _context(self, index: int) -> Any:  # noqa: ANN401 - tensorrt is untyped
        """Return the context of a profile; none has device memory of its own."""
        if index not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
            if context is None:
                message = f"{self.part.name}: TensorRT made no context: {' '.join(self._log) or 'nothing said why'}"
                raise ArtifactError(message, fix="free device memory, or export it again")
            if index and not context.set_optimization_profile_async(index, self._device.stream):
                message = f"{self.part.name}: TensorRT can't use profile {index}"
                raise ArtifactError(message, fix="export it again")
            self._device.finish()
            self._contexts[index] = context
        return self._contexts[index]

    def _launch(self, profile: profiles.Profile, tensors: Mapping[str, Tensor]) -> None:
        """Put a run on the stream, on tensors where they lie."""
        context = self._context(profile.index)
        context.set_device_memory(*self._device.block())
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                message = f"{self.part.name}: TensorRT doesn't take an address for {name}"
                raise ArtifactError(message, fix="export it again")
        self._enqueue(context)

    def _enqueue(self, context: Any) -> None:  # noqa: ANN401 - tensorrt is untyped
        if not context.execute_async_v3(self._device.stream):
            message = f"{self.part.name} failed in TensorRT: {' '.join(self._log[-3:]) or 'nothing said why'}"
            raise ArtifactError(message, fix="export it again; bakeoff verify says whether its files are whole")

    def _replayed(
        self,
        profile: profiles.Profile,
        given: Mapping[str, tuple[int, ...]],
        brought: Mapping[str, Tensor],
        made: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        """Run the graph of these shapes, on tensors that are its own; what it gave is copied, since a later run changes it."""
        key = (profile.index, *sorted(given.items()))
        captured = self._graphs.get(key)
        if captured is None:
            captured = _Captured(
                {name: self._device.empty(tuple(each.shape), each.dtype) for name, each in brought.items()},
                {name: self._device.empty(shape, self._dtypes[name]) for name, shape in made.items()},
            )
            self._graphs[key] = captured
        for name, tensor in brought.items():
            self._device.copy(tensor, captured.inputs[name])
        tensors = {**captured.inputs, **captured.outputs}
        addresses = (*self._device.block(), *(tensor.data_ptr() for tensor in tensors.values()))
        if captured.graph is None or captured.addresses != addresses:
            self._launch(profile, tensors)  # TensorRT settles what it keeps for new shapes outside of a graph
            context = self._context(profile.index)
            captured.graph = self._device.capture(lambda: self._enqueue(context))
            captured.addresses = addresses
            self._counts.captures += 1
        else:
            self._device.replay(captured.graph)
            self._counts.replays += 1
        results = {name: self._device.empty(tuple(each.shape), each.dtype) for name, each in captured.outputs.items()}
        for name, tensor in results.items():
            self._device.copy(captured.outputs[name], tensor)
        return results

    def adapt(self, deltas: Mapping[str, Sequence[Delta]]) -> bool:
        """Exchange the LoRAs of the open engine, if it can; its recorded graphs go, since they may hold old weights.

        Where an exchange fails the engine is closed: some of its weights may be new ones.
        """
        if self._refit is None or not self._files.refits or not (self._files.folder / WEIGHTS).is_file():
            return False
        try:
            self._change(deltas)
        except ArtifactError:
            self.close()
            return False
        self._graphs.clear()
        return True

    def _change(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        if self._refit is None:
            message = f"LoRAs can't be added to {self._files.folder}: its engine can't be refitted"
            raise ArtifactError(message, fix="export it with +refit, or bake the LoRA in: --lora FILE:SCALE")
        self._device.finish()
        self._refit.change(deltas)
        self.configuration["refit"] = dict(self._refit.last)

    def synchronize(self) -> None:
        self._device.finish()

    def close(self) -> None:
        if self._engine is None:
            return
        self._device.finish()
        self._graphs.clear()
        self._contexts.clear()
        self._refit = self._engine = self._runtime = None
        self._device.release(self)
