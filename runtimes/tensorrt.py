"""Run a part with a TensorRT engine: tensors by address on the device, one block of memory for all parts."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from .. import nvinfer
from ..errors import ArtifactError, ResourceError
from . import tensorrt_profiles as profiles
from .crossing import Crossing, home_of
from .runtime import PartFiles, Runtime
from .tensorrt_context import Context, Contexts
from .tensorrt_device import ALIGNMENT, Device
from .tensorrt_files import ABOUT, WEIGHTS, EngineFiles
from .tensorrt_graphs import Graphs
from .tensorrt_inspection import inspect, refuse_another_precision
from .tensorrt_memory import Memory
from .tensorrt_refit import Refit, shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
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
_ROWS = "batch"
"""Dimension whose rows have nothing to do with each other."""


class TensorRTRuntime(Runtime):
    """Inputs that lie on the GPU stay there, and so do their results; those of the host come and go once.

    What has more rows than a profile takes is run in pieces.

    With `cuda_graphs`, what a run launches is recorded once for each set of shapes; again when the shared block moved.
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
    def home_for(cls, placement: Placement) -> str:  # noqa: ARG003 - there is no other
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
        self._logger = self._heard()
        self._device, self.home = Device.shared(), self.home_for(placement)
        self._crossing = Crossing(self._device.name)
        self._engine = self._deserialized()
        self._contexts = Contexts(part.name, trt, self._engine, self._device, self._log)
        self._graphs = Graphs(self._device)
        self._by_profile: Counter[int] = Counter()
        self._unknown = 0
        try:
            self._open(part.deltas)
        except BaseException:
            self.close()
            raise

    def _heard(self) -> Any:  # noqa: ANN401 - tensorrt is untyped
        """Let what TensorRT says from here on be this part's; return its logger."""
        return nvinfer.logger(self._trt, self._log)

    def _open(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        """Give the engine its weights, look at it, and place it on the device."""
        self._refit = Refit(self._trt, self._engine, self._logger, self._files) if self._engine.refittable else None
        if self._files.settings["strip"]:
            self._load_weights()
        if deltas:
            self._change(deltas)
        self._dtypes = self._interface()
        self._profiles = profiles.read(self._engine, [port.name for port in self.inputs if port.dims])
        self._memory = Memory(self._trt, self._files, self._contexts, self._graphs, self._device)
        self._expect(self._needed_at_best())
        self.configuration |= {
            "device": "cuda",
            "tensorrt": str(self._trt.__version__),
            "profiles": [str(each) for each in self._profiles],
            **self._inspected(),
            "fallback": self._fallback,
        }

    def _load_weights(self) -> None:
        """Fill a plan that was stripped of its weights.

        Raises:
            ArtifactError: it takes none.
        """
        if self._refit is None:
            message = f"the plan in {self._files.folder} has no weights, and TensorRT says that it takes none"
            raise ArtifactError(message, fix="export the model again without +strip")
        self._refit.load_all()

    @property
    def _with_graphs(self) -> bool:
        """Whether launches are recorded; not where weights are streamed, with which that isn't known to work."""
        return self.placement.cuda_graphs and not self._memory.streams

    @property
    def _fallback(self) -> str | None:
        """Say what was asked for and isn't so."""
        asked = self.placement
        found = [] if asked.device in {"auto", "cuda"} else [f"TensorRT doesn't run on {asked.device}"]
        if asked.cuda_graphs and self._memory.streams:
            found.append("no cuda_graphs: some weights come from host memory in each run")
        if self._unknown:
            found.append(
                f"its inspector doesn't tell what {self._unknown} of {len(self._files.products)} products run in"
            )
        return "; ".join(found) or None

    def _deserialized(self) -> Any:  # noqa: ANN401 - tensorrt is untyped
        runtime = self._trt.Runtime(self._logger)
        if self._files.settings["version_compatible"]:
            runtime.engine_host_code_allowed = True
        self._device.give_back()
        with self._files.mapped() as plan:
            engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            said = " ".join(self._log)
            message = f"TensorRT can't open {self._files.folder}: {said or 'nothing said why'}"
            if "out of memory" in said.lower():
                fix = "close what uses the GPU; --offload parts; or export it with +weight_streaming"
                raise ResourceError(message, fix=fix)
            raise ArtifactError(message, fix="export the model again on this machine")
        self._runtime = runtime
        return engine

    def _needed_at_best(self) -> int:
        """Return the device memory that a run of the first profile's best shapes takes."""
        context = self._contexts.of(0)
        context.set_shapes(self._profiles[0].best)
        return context.needs

    def _expect(self, needed: int) -> None:
        """Prepare for runs that take so much device memory."""
        self._device.expect(self, needed)
        self._memory.make_room(needed)
        self.configuration |= {
            "fallback": self._fallback,
            "cuda_graphs": self._with_graphs,
            "memory": self._memory.as_dict(),
        }

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
        """Read back what the engine runs, at each profile's best shapes.

        Raises:
            ArtifactError: none of its products run in what the recipe says.
        """
        products = self._files.products
        found = inspect([self._information(profile) for profile in self._profiles], products)
        refuse_another_precision(self.part.name, found, products)
        self._unknown = len(found.undecided) + (0 if found.precision else len(found.unseen))
        return found.as_dict()

    def _information(self, profile: profiles.Profile) -> str:
        """Return what the inspector says of the engine in a profile."""
        contexts, first = self._contexts, profile.index == 0
        context = contexts.of(0) if first else contexts.make(profile.index)  # which may never be run
        context.set_shapes(profile.best)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = context.trt
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        import torch

        home = home_of(inputs.values())
        pieces = [self._brought_home(self._execute(*piece), home) for piece in self._pieces(inputs, outputs)]
        if not pieces[1:]:
            return pieces[0]
        return {name: torch.cat([each[name] for each in pieces]) for name in pieces[0]}

    def _brought_home(self, results: dict[str, Tensor], home: torch.device) -> dict[str, Tensor]:
        if home.type != "cpu":
            return {name: self._device.hand_over(tensor) for name, tensor in results.items()}
        with self._device.working():
            return dict(zip(results, self._crossing.to_host([*results.values()]), strict=True))

    def _pieces(
        self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]]:
        """Cut a run evenly into as many rows at a time as a profile takes: inputs, and the shapes of outputs."""
        given = {name: tuple(tensor.shape) for name, tensor in inputs.items() if tensor.ndim}
        by_rows = [port.name for port in self.inputs if port.dims and port.dims[0] == _ROWS]
        rows = given[by_rows[0]][0] if by_rows else 0
        most = profiles.most_rows(self._profiles, by_rows, given)
        if rows <= most or most == 0:
            yield inputs, outputs
            return
        size = -(-rows // -(-rows // most))
        for start in range(0, rows, size):
            cut = {name: inputs[name][start : start + size] for name in by_rows}
            yield {**inputs, **cut}, {name: (min(size, rows - start), *shape[1:]) for name, shape in outputs.items()}

    def _execute(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Run on the device's stream; return tensors there, which are the caller's.

        Raises:
            ResourceError: the device hasn't the memory.
        """
        import torch

        assert self._engine is not None, "closed"  # noqa: S101
        given = {name: tuple(tensor.shape) for name, tensor in inputs.items() if tensor.ndim}
        profile = profiles.choose(self.part.name, self._profiles, given)
        try:
            results = self._launch(profile.index, given, inputs, outputs)
        except torch.OutOfMemoryError as error:
            raise self._too_large(given) from error
        self._by_profile[profile.index] += 1
        self.configuration["runs"] = {
            "by_profile": dict(self._by_profile),
            "graph_captures": self._graphs.captures,
            "graph_replays": self._graphs.replays,
        }
        return results

    def _launch(
        self,
        index: int,
        given: Mapping[str, tuple[int, ...]],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        self._heard()
        context = self._context(index, given)
        made = context.outputs(outputs)
        block = self._device.block(context.needs)
        brought = {name: self._brought(name, tensor) for name, tensor in inputs.items()}
        results = {name: self._device.empty(shape, self._dtypes[name]) for name, shape in made.items()}
        if self._with_graphs:
            self._graphs.run(_key(index, given), block, brought, results)
        else:
            context.place(block, {**brought, **results})
            context.enqueue(self._device.stream)
        return results

    def _context(self, index: int, given: Mapping[str, tuple[int, ...]]) -> Context:
        """Return a context of these shapes, once there is room for what they need."""
        while (needed := self._shaped(index, given).needs) > self._memory.activations:
            self._expect(needed)  # weights that move to the host for it may need scratch
        return self._shaped(index, given)

    def _shaped(self, index: int, given: Mapping[str, tuple[int, ...]]) -> Context:
        if self._with_graphs:
            context = self._graphs.context(_key(index, given), partial(self._contexts.make, index))
        else:
            context = self._contexts.of(index)
        context.set_shapes(given)
        return context

    def _brought(self, name: str, tensor: Tensor) -> Tensor:
        """Return an input on the device, contiguous, aligned and in the engine's dtype; the same one if it is that already."""
        dtype = self._dtypes[name]
        with self._device.working(tensor):
            return self._crossing.to_device(name, tensor, lambda each: _aligned(each.to(dtype).contiguous()))

    def _too_large(self, given: Mapping[str, tuple[int, ...]]) -> ResourceError:
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in given.items())
        message = (
            f"{self.part.name} has too little device memory for {shapes}: beside its weights it takes "
            f"{self._memory.activations / 1e9:.1f} GB, {self._device.free_bytes() / 1e9:.1f} GB are free"
        )
        fix = "a smaller picture or --max-batch; close what uses the GPU"
        return ResourceError(
            message, fix=fix if self._memory.streams else f"{fix}; or export it with +weight_streaming"
        )

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
        self._heard()
        self._refit.change(deltas)
        self.configuration["refit"] = dict(self._refit.last)

    def between_runs(self, *, same: bool) -> None:
        self._crossing.same.forget()
        self._crossing.same.active = same

    def synchronize(self) -> None:
        self._crossing.finish()
        self._device.finish()

    def close(self) -> None:
        if self._engine is None:
            return
        self._device.finish()
        self._crossing.same.forget()
        self._graphs.clear()
        self._contexts.close()
        self._refit = self._engine = self._runtime = None
        self._device.release(self)


def _aligned(tensor: Tensor) -> Tensor:
    """Return a device's tensor, or a copy where its address is none that TensorRT takes: a row of another may lie anywhere."""
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % ALIGNMENT else tensor


def _key(index: int, given: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """Return what tells the runs of one graph from others."""
    return (index, *sorted(given.items()))
