"""Run a part with ONNX Runtime; the host's inputs and outputs are bound where they lie, on NVIDIA's to tensors that stay."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ArtifactError, UnavailableError
from ..hardware import OVERFLOWS, Availability, overflows_bytes, usable_cores
from . import onnx_attention, onnx_graph, onnx_half, onnx_weights, providers
from .onnx_binding import DeviceBinding, place_of
from .runtime import Operation, PartFiles, Runtime

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor

    from ..recipe import Placement

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}
_ERRORS_ONLY = 3
_MAKES_UNSIGNED = "QDQS8ToU8Transformer"
_ROUNDING = ("DynamicQuantizeLinear", "QuantizeLinear")
"""What rounds activations."""
_EXACT_PRODUCTS = "session.x64quantprecision"
"""Where the CPU's products of unsigned and signed bytes overflow, weights become unsigned, whose kernels are exact. It takes
weights that are constants, so their transpositions have to be folded."""
_FLOAT_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulBnb4", "MatMulNBits")
"""The last two have low-bit weights, which they widen as they go."""
_INT8_PRODUCTS = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul")

_UNTOLD = "this ONNX Runtime doesn't tell which nodes run on the CPU instead: a newer one does"
_IMITATED = "float16 is imitated in float32 on cpu"


class OnnxRuntime(Runtime):
    """With `offload=mapped`, products run on the checkpoint's own bytes, which ONNX Runtime maps.

    Nothing is packed, folded or laid out anew then: opening is quicker and takes next to no memory.
    """

    reads_ports: ClassVar[bool] = True
    held: ClassVar[Mapping[str, float]] = {"float32": 1.1, "bfloat16": 3.9, "int8": 2.2, "int4": 4, "nf4": 4}
    held_mapped: ClassVar[Mapping[str, float] | None] = {**held, "float32": 0.02, "bfloat16": 0.25}
    live_maps: ClassVar[Mapping[str, float]] = {"fp32": 25}
    widens: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset({"provider", "provider_options", "cuda_graphs", "attention"})
    devices: ClassVar[tuple[str, ...]] = tuple(providers.BY_DEVICE)

    @classmethod
    def relative_time(cls, precision: str) -> float:
        if precision != "w8a8":
            return 1.0
        return 0.8 if overflows_bytes() else 0.88

    @classmethod
    def probe(cls) -> Availability:
        try:
            import onnx  # noqa: F401 - checks where a model's data lies
            import onnxruntime
        except ImportError as error:
            return Availability(ok=False, reason=f"{error.name} is not installed", fix="pip install 'bakeoff[onnx]'")
        providers = ", ".join(onnxruntime.get_available_providers())
        return Availability(ok=True, reason=f"onnxruntime {onnxruntime.__version__}: {providers}")

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:
        return onnx_weights.shapes(folder)

    @classmethod
    def device_for(cls, placement: Placement) -> str:
        return providers.choose(placement)[1]

    @classmethod
    def home_for(cls, placement: Placement) -> str:
        memory = providers.torch_device(providers.choose(placement)[0])
        return "cpu" if memory is None else memory.type

    @classmethod
    def fuses_attention(cls, placement: Placement) -> bool:
        return bool(providers.fused_dtypes(providers.choose(placement)[0], placement))

    @classmethod
    def option_obstacle(cls, option: str, placement: Placement) -> tuple[str, str] | None:
        return providers.option_obstacle(option, placement)

    def __init__(self, part: PartFiles, placement: Placement) -> None:
        import onnxruntime

        super().__init__(part, placement)
        model = _model(part.folder)
        operators = Counter(node.op_type for node in model.graph.node)
        provider, device, fallback = providers.choose(placement)
        fallbacks = [fallback] if fallback else []
        halves = onnx_half.rounds(model.graph, _FLOAT_PRODUCTS)
        imitated = bool(halves) and provider == providers.CPU
        if imitated:
            onnx_half.imitate(model, halves)
            fallbacks.append(_IMITATED)
        fused = onnx_attention.fuse(model, providers.fused_dtypes(provider, placement))
        given = model.SerializeToString() if fused or imitated else part.folder / onnx_graph.FILE
        graphs = placement.cuda_graphs and providers.option_obstacle("cuda_graphs", placement) is None
        cache = providers.engine_cache(provider, part)
        providers.prepare(provider, part.precision, cache)
        options = _options(part, placement)
        mapped = placement.offload == "mapped"
        overflows = device == "cpu" and overflows_bytes() and any(operators[name] for name in _ROUNDING)
        keeps = mapped and not overflows
        if overflows:
            options.add_session_config_entry(_EXACT_PRODUCTS, "1")
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if provider == "DmlExecutionProvider":  # which asks for it
            options.enable_mem_pattern = False
        disabled = ["ConstantFolding"] if keeps else []
        if overflows and _lacks_zero_points(model.graph):
            disabled.append(_MAKES_UNSIGNED)
            fallbacks.append(f"{OVERFLOWS}: convolutions are of floats until it is exported again")
        asked = providers.options_of(provider, device, part.precision, replace(placement, cuda_graphs=graphs), cache)
        kept = onnx_weights.adapt(options, part.folder, part.deltas)
        self._session: Any = _opened(part, given, options, providers.listed(provider, asked, part.precision), disabled)
        del kept
        ran = self._session.get_providers()[0]
        if ran != provider:
            fallbacks = [_not_started(provider, ran, placement)]
        nodes = _nodes_by_provider(self._session)
        if not nodes and ran != providers.CPU:
            fallbacks.append(_UNTOLD)
        actual = {i.name: (_DTYPES.get(i.type, i.type), len(i.shape)) for i in self._session.get_inputs()}
        self._output_dtypes = {o.name: _DTYPES.get(o.type, o.type) for o in self._session.get_outputs()}
        self._binding: DeviceBinding | None = None
        memory = providers.torch_device(ran)
        if memory is not None:
            self._binding = DeviceBinding(self._session, memory, self._output_dtypes, graphs=graphs)
            self.home = memory.type
        self._adopt(actual, set(self._output_dtypes))
        self.configuration = {
            "device": device if ran == provider else "cpu",
            "providers": self._session.get_providers(),
            "provider_options": self._session.get_provider_options().get(ran, {}),
            "cuda_graphs": graphs and ran == provider,
            "threads": self._session.get_session_options().intra_op_num_threads,
            "precision": _precisions(
                model.graph,
                set() if ran == providers.CPU else halves,
                half=providers.computes_in_half(ran, asked),
                integer=_rounded_convolutions(model.graph) if ran == providers.CPU and not disabled else set(),
            ),
            "attention": {"fused": fused, "math": operators["Softmax"] - fused},
            "unsigned_weights": overflows,
            "mapped": mapped,
            "nodes": nodes,
            "fallback": "; ".join(fallbacks) or None,
        }

    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        import torch

        if self._binding is not None:
            return self._binding.run(inputs, outputs)
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *place_of(tensor))
        results = {
            name: torch.empty(shape, dtype=getattr(torch, self._output_dtypes[name])) for name, shape in outputs.items()
        }
        for name, tensor in results.items():
            binding.bind_output(name, *place_of(tensor))
        self._session.run_with_iobinding(binding)
        return results

    def operations(self, inputs: Mapping[str, Tensor]) -> list[Operation]:  # noqa: ARG002 - as Runtime's
        return onnx_graph.operations(self.part.folder)

    def _tap(self, inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        return onnx_graph.tap(self.part.folder, self._session, inputs, names)

    def synchronize(self) -> None:
        if self._binding is not None:
            self._binding.finish()

    def between_runs(self, *, same: bool) -> None:
        if self._binding is not None:
            self._binding.same.forget()
            self._binding.same.active = same

    def close(self) -> None:
        self._session = self._binding = None


def _options(part: PartFiles, placement: Placement) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """Return what every session of ours is opened with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = placement.threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry(onnx_graph.WEIGHTS_FOLDER, str(part.folder))
    return options


def _opened(part: PartFiles, model: Path | bytes, options: Any, listed: list[Any], disabled: list[str]) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """Open a session; a provider that refuses the model, or an option, is said to have done so.

    Raises:
        UnavailableError: with ONNX Runtime's reason.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(model, options, providers=listed, disabled_optimizers=disabled)
    except Exception as error:  # ONNX Runtime raises RuntimeError, ValueError and classes of its own
        if len(listed) == 1:  # the CPU's: the model's own fault
            raise
        message = f"{part.name} can't be opened by {listed[0][0]}: {error}"
        raise UnavailableError(message, fix="leave out what it refuses, or run the part on cpu") from error


def _not_started(provider: str, ran: str, placement: Placement) -> str:
    """Say that ONNX Runtime chose another provider.

    Raises:
        UnavailableError: the provider, or something that only it has, was asked for by name.
    """
    message = f"ONNX Runtime couldn't start {provider}"
    if placement.provider or placement.provider_options or placement.cuda_graphs:
        raise UnavailableError(message, fix="its own log on stderr says what it lacks; or let the part run on cpu")
    return f"{message}: using {ran}"


def _nodes_by_provider(session: Any) -> dict[str, int]:  # noqa: ANN401 - onnxruntime is untyped
    """Count the nodes that each execution provider took; empty where this ONNX Runtime can't tell."""
    counts: Counter[str] = Counter()
    for subgraph in getattr(session, "get_provider_graph_assignment_info", list)():
        counts[subgraph.ep_name] += len(subgraph.get_nodes())
    return dict(counts)


def _precisions(
    graph: Any,  # noqa: ANN401 - onnx is untyped
    halves: set[str],
    *,
    half: bool = False,
    integer: Collection[str] = (),
) -> dict[str, int]:
    """Count the matrix products and convolutions by the precision that they run in: integer ones are operators apart.

    Where weights are stored in less than float32 and widened, what runs is float32. Products of fused attention aren't counted.

    Args:
        graph: as it is opened.
        halves: its values that are computed in float16.
        half: the provider computes all products so.
        integer: results of convolutions that become integer ones as the graph is opened.
    """
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in _INT8_PRODUCTS or node.output[0] in integer:
            counts["int8"] += 1
        elif node.op_type in _FLOAT_PRODUCTS:
            counts["float16" if half or node.output[0] in halves else "float32"] += 1
    return dict(counts)


def _rounded_convolutions(graph: Any) -> set[str]:  # noqa: ANN401 - onnx is untyped
    """Return the results of convolutions whose inputs, weights and results are rounded: ONNX Runtime makes them QLinearConv."""
    widened = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    users: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node.op_type)
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "Conv" and widened.issuperset(node.input[:2]) and users[node.output[0]] == ["QuantizeLinear"]
    }


def _lacks_zero_points(graph: Any) -> bool:  # noqa: ANN401 - onnx is untyped
    """Say whether weights are widened without zero points: ONNX Runtime fails to make these unsigned."""
    stored = {tensor.name for tensor in graph.initializer}
    wide = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    return any(len(node.input) < 3 for node in wide)  # noqa: PLR2004 - the third is the zero point


def _model(folder: Path) -> Any:  # noqa: ANN401 - onnx is untyped
    """Read a model without its weights; refuse one whose external data lies outside its folder.

    Raises:
        ArtifactError: with the path.
    """
    import onnx

    file = folder / onnx_graph.FILE
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:
        message = f"{file} is not an ONNX model: {error}"
        raise ArtifactError(message, fix="export it again") from error
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location" and not _is_inside(folder, item.value):
                message = f"{file} points to data outside its folder: {item.value!r}"
                raise ArtifactError(message, fix="don't use this model unless you know who made it")
    return model


def _is_inside(folder: Path, location: str) -> bool:
    return (folder / location).resolve().is_relative_to(folder.resolve())
