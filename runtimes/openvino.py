"""Run a part with OpenVINO, in the precision that the recipe says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ArtifactError
from ..hardware import OVERFLOWS, Availability, choose_device, has_instructions, overflows_bytes, usable_cores
from . import openvino_graph, openvino_weights
from .openvino_gates import keep_gates_apart
from .openvino_heads import leave_large_heads, round_within_attention
from .openvino_pieces import cut_in_pieces
from .openvino_splits import split_weights
from .runtime import Operation, PartFiles, Runtime

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ..recipe import Placement

_HINTS = {
    "fp32": "f32",
    "bf16": "bf16",
    "fp16": "f16",
    "int8": "bf16",
    "int4": "bf16",
    "nf4": "bf16",
    "w8a8": "bf16",
    "w8a8-dynamic": "bf16",
}
"""Precision -> what is computed in; of those of low bits, what their products give."""
_ROUNDED = {"w8a8-dynamic": "128"}
"""Precision -> how many activations in a row the products round with one scale, as they come."""
_PRODUCTS = {
    "Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention",
    "LLMMLP", "QKVProjection",  # several products in one, with AMX
}  # fmt: skip
_INTEGERS, _FLOATS = {"i8", "u8", "i4", "u4", "nf4"}, {"f32", "bf16", "f16"}
_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}


_MOST_SHAPES = 2
"""Compiled models that `static` keeps: with guidance and without. Each packs the weights anew."""


class OpenVINORuntime(Runtime):
    options: ClassVar[frozenset[str]] = frozenset({"static"})
    reads_ports: ClassVar[bool] = True
    held: ClassVar[Mapping[str, float]] = {"float32": 1.1, "bfloat16": 1.2, "int8": 1.6, "int4": 2.2, "nf4": 2.2}
    held_int8_convolutions: ClassVar[float | None] = 5.6
    live_maps: ClassVar[Mapping[str, float]] = {"fp32": 17, "bf16": 12}
    devices: ClassVar[tuple[str, ...]] = ("gpu", "cpu", "npu")

    @classmethod
    def relative_time(cls, precision: str) -> float:
        if precision != "w8a8" or overflows_bytes():
            return 1.0
        return 0.55 if has_instructions("amx_bf16") else 0.35

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:
        return openvino_weights.shapes(folder / "openvino_model.xml")

    @classmethod
    def probe(cls) -> Availability:
        try:
            import openvino
        except ImportError:
            return Availability(ok=False, reason="openvino is not installed", fix="pip install 'bakeoff[openvino]'")
        found = ", ".join(openvino.Core().available_devices)
        return Availability(ok=True, reason=f"openvino {openvino.__version__}: {found}")

    @classmethod
    def obstacle(cls, precision: str) -> Availability | None:
        said = _limits().get(precision)
        return Availability(ok=True, reason=said) if said else None

    def __init__(self, part: PartFiles, placement: Placement) -> None:
        import openvino

        super().__init__(part, placement)
        device, fallback = choose_device(placement.device, self.devices, "openvino")
        file = part.folder / "openvino_model.xml"
        try:
            model = openvino.Core().read_model(file)
        except RuntimeError as error:
            message = f"{file} is not an OpenVINO model: {error}"
            raise ArtifactError(message, fix="export it again") from error
        openvino_weights.adapt(model, part.deltas)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": _HINTS[part.precision],
        }
        if device == "cpu":
            settings["INFERENCE_NUM_THREADS"] = placement.threads or usable_cores()
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _ROUNDED.get(part.precision, "0")
            widened = _avoid_overflow(model, part.precision, settings)
            fallback = "; ".join(filter(None, (fallback, widened))) or None
        self._model, self._device, self._settings = model, device.upper(), settings
        self._requests: dict[Any, Any] = {}
        """Shapes of the inputs, or None for any -> a compiled model's request, the one used last at the end."""
        declared = {port.name for port in part.inputs}
        actual = {
            _name(i, declared): (_DTYPES.get(i.element_type.to_string(), "?"), i.partial_shape.rank.get_length())
            for i in model.inputs
        }
        self._positions = {name: index for index, output in enumerate(model.outputs) for name in output.get_names()}
        self._adopt(actual, set(self._positions))
        self.configuration = {"device": device, "static": placement.static, "fallback": fallback}
        if not placement.static:
            self._requests[None] = self._compile()

    def _compile(self) -> Any:  # noqa: ANN401 - openvino is untyped
        import openvino

        model = self._copy(split=True)
        compiled = openvino.Core().compile_model(model, self._device, self._settings)
        self.configuration |= {
            "threads": compiled.get_property("INFERENCE_NUM_THREADS") if self._device == "CPU" else None,
            "precision": _executed_precision(compiled),
        }
        return compiled.create_infer_request()

    def _copy(self, *, split: bool) -> Any:  # noqa: ANN401 - openvino is untyped
        """Return a copy of the model to compile, or to look at: then products are as `layers.json` names them."""
        model = self._model.clone()
        if self._device != "CPU":
            return model
        if split:
            split_weights(model)
        if _multiplies_tiles(self._settings):
            leave_large_heads(model)
            if split:
                round_within_attention(model)
                cut_in_pieces(model)
        if _fuses_gates_wrongly(self._settings):
            keep_gates_apart(model)
        return model

    def _request_for(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - openvino is untyped
        """Return the request of the model compiled for any shapes, or for these alone."""
        if not self.placement.static:
            return self._requests[None]
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        request = self._requests.pop(shapes, None)
        if request is None:
            while len(self._requests) >= _MOST_SHAPES:
                del self._requests[next(iter(self._requests))]
            self._model.reshape({name: list(shape) for name, shape in shapes})
            request = self._compile()
        self._requests[shapes] = request
        return request

    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        import openvino
        import torch

        request = self._request_for(inputs)
        for name, tensor in inputs.items():
            request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=tensor.ndim > 0))
        results = {name: torch.empty(shape) for name, shape in outputs.items()}
        for name, tensor in results.items():
            shared = openvino.Tensor(tensor.numpy(), shared_memory=True)
            request.set_output_tensor(self._positions[name], shared)
        request.infer()
        return {name: self._collect(request, name, tensor) for name, tensor in results.items()}

    def _collect(self, request: Any, name: str, tensor: Tensor) -> Tensor:  # noqa: ANN401 - openvino is untyped
        """Return the bound tensor, or a copy of OpenVINO's own where it chose another shape or place."""
        import torch

        data = request.get_output_tensor(self._positions[name]).data
        return tensor if data.ctypes.data == tensor.data_ptr() else torch.from_numpy(data.copy())

    def operations(self, inputs: Mapping[str, Tensor]) -> list[Operation]:  # noqa: ARG002 - as Runtime's
        return openvino_graph.operations(self._copy(split=False), self.part.folder)

    def _tap(self, inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        return openvino_graph.tap(self._copy(split=False), self._device, self._settings, inputs, names)

    def close(self) -> None:
        self._requests.clear()
        self._model = None


def _multiplies_tiles(settings: Mapping[str, Any]) -> bool:
    """Say whether products run in AMX's units."""
    return settings["INFERENCE_PRECISION_HINT"] == "bf16" and has_instructions("amx_bf16")


def _fuses_gates_wrongly(settings: Mapping[str, Any]) -> bool:
    """Say whether compiling gated layers would end the process: in bfloat16, with AMX, on one thread."""
    one_thread = 1 in {settings["INFERENCE_NUM_THREADS"], usable_cores()}
    return one_thread and _multiplies_tiles(settings)


def _avoid_overflow(model: Any, precision: str, settings: dict[str, Any]) -> str | None:  # noqa: ANN401 - openvino is untyped
    """Let products of integers run in floats where this CPU's would be wrong; return in words what it doesn't do.

    oneDNN has no other kernels for unsigned and signed bytes there, and OpenVINO asks for no reduced range. Without its
    low-precision transformations FakeQuantize still rounds activations: what comes out is the same.
    """
    limits = _limits()
    if overflows_bytes() and any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops()):
        settings["LP_TRANSFORMS_MODE"] = False
        return limits["w8a8"]
    return limits.get(precision) if precision in _ROUNDED else None


def _limits() -> dict[str, str]:
    """Return precision -> what of it this CPU doesn't do."""
    if overflows_bytes():
        return {
            "w8a8": f"{OVERFLOWS}: layers of w8a8 are multiplied in floats",
            "w8a8-dynamic": f"{OVERFLOWS}: OpenVINO doesn't round activations as they come",
        }
    wide = "with AMX OpenVINO multiplies in bfloat16 and doesn't round activations as they come"
    return {"w8a8-dynamic": wide} if has_instructions("amx_int8") else {}


def _name(node: Any, declared: set[str]) -> str:  # noqa: ANN401 - openvino is untyped
    """Return an input's name: of several, which it has where an operation on it fell away, the declared one."""
    names: set[str] = node.get_names()
    return next(iter(sorted(names & declared)), node.get_any_name())


def _executed_precision(compiled: Any) -> dict[str, int]:  # noqa: ANN401 - openvino is untyped
    """Count the compiled matrix products and convolutions by the precision that they really run in, one in pieces by these.

    Masks and indices are u8 and i32 whatever the recipe, so the other operations say nothing.
    """
    counts: dict[str, int] = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        if "runtimePrecision" in info and str(info["layerType"].astype(str)) in _PRODUCTS:
            precision = _computed(str(info["runtimePrecision"].astype(str)), str(info["primitiveType"].astype(str)))
            counts[precision] = counts.get(precision, 0) + 1
    return counts


def _computed(precision: str, kernel: str) -> str:
    """Return what a product is computed in: OpenVINO gives its weights' dtype where a kernel of floats widens them."""
    ending = kernel.rpartition("_")[2]
    return ending if precision in _INTEGERS and ending in _FLOATS else precision
