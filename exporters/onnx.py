"""Lower a captured part to ONNX whose weights stay in the checkpoint's own safetensors files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ..errors import LoweringError
from ..weights import as_bytes, place, read_header, write_entries
from .exporter import Cost, Lowered
from .hollow import lower_hollow
from .layers import write_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx_ir
    from torch import Tensor
    from torch.export import ExportedProgram

    from ..components.component import Port
    from ..weights import Checkpoint, Entry
    from .exporter import Subject
    from .hollow import Hollow

FILE = "model.onnx"
_INLINE_BYTES = 1024
"""Smaller constants stay in the graph."""
_FOLD_ELEMENTS = 8192
_FOLDS = 2
_STORAGE = {"fp32": "float32", "bf16": "bfloat16"}
"""Precision -> torch dtype that weights are stored in."""
_BASE_BYTES, _OPERATION_BYTES, _OPERATION_S, _BYTES_PER_S = 400_000_000, 80_000, 0.032, 4e8
"""Memory and time of an export: of a small graph, for each operation, and to write; see `make bench-full-size`."""
_WIDENED = ("BF16", "F16")
_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I64": "INT64", "I32": "INT32"}


class OnnxExporter:
    """`model.onnx`: a graph of a few MB; every tensor that equals one of the checkpoint points into its file.

    2-D weights keep their bytes too: Linear layers come as MatMul with Transpose(weight), which the runtimes
    fold when they load. bf16 is what weights are stored in: the graph widens them and computes in float32, which
    every execution provider can.
    """

    version: ClassVar[int] = 4
    precisions: ClassVar[tuple[str, ...]] = tuple(_STORAGE)
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def cost(self, checkpoint: Checkpoint, precision: str, *, operations: int, shared: bool) -> Cost:
        dtype = _STORAGE[precision]
        weights = checkpoint.bytes_in(dtype)
        written = 0 if shared and checkpoint.is_in(dtype) else weights
        return Cost(
            anon_bytes=_BASE_BYTES + _OPERATION_BYTES * operations,
            disk_bytes=written,
            seconds=_OPERATION_S * operations + written / _BYTES_PER_S,
            weight_bytes={dtype: weights},
        )

    def packages(self) -> tuple[str, ...]:
        return ("torch", "onnx", "onnx-ir", "onnxscript")

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        def translate(program: ExportedProgram, hollow: Hollow) -> tuple[tuple[onnx_ir.Model, Weights], set[str]]:
            model = _translate(subject, program)
            _optimize(model)
            weights = _weights(model, hollow)
            return (model, weights), {entry.name for entry in weights.found.values()}

        model, weights = lower_hollow(subject.part, subject.capture, translate)
        _name_dims(model, subject.inputs, subject.outputs)
        placed = _bring(model, weights, subject, folder)
        _strip(model)
        write_layers(_layers(model), subject.checkpoint, folder)
        _save(model, folder)
        return Lowered(weights=placed, weight_bytes=_weight_bytes(model))


@dataclass(frozen=True)
class Weights:
    """A graph's large initializers, by name: tensors of the checkpoint, and what the lowering made itself."""

    found: dict[str, Entry]
    made: dict[str, Tensor]


def _translate(subject: Subject, captured: ExportedProgram) -> onnx_ir.Model:
    import torch

    try:
        with _quiet():
            program = torch.onnx.export(
                captured,
                (),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[port.name for port in subject.inputs],
                output_names=[port.name for port in subject.outputs],
            )
    except Exception as error:
        message = f"{subject.part} couldn't be lowered to ONNX: {error}"
        raise LoweringError(message) from error
    assert program is not None  # noqa: S101 - only the old exporter returns None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (steps, deprecations, that torchvision is missing) to itself."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _optimize(model: onnx_ir.Model) -> None:
    """Fold constants and drop what is unused or there twice, but never materialise a transposed weight.

    onnxscript's rewrite rules are left out: they take ten times as long as all of this, grow faster than the graph, and
    drop additions of less than 1e-8, which divisions rely on. Runtimes do the same when they load.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants_ir

    for _ in range(_FOLDS):
        fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=_FOLD_ELEMENTS,
            output_size_limit=_FOLD_ELEMENTS,
            should_fold=lambda node: False if node.op_type == "Transpose" else None,
        )
        common.RemoveUnusedNodesPass()(model)
    Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _name_dims(model: onnx_ir.Model, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Give the dynamic dimensions of the interface the names that the ports have."""
    import onnx_ir

    for values, ports in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = onnx_ir.Shape(
                [dim if isinstance(dim, int) else dim.replace("*", "_").replace("/", "_over_") for dim in port.dims]
            )


def _weights(model: onnx_ir.Model, hollow: Hollow) -> Weights:
    weights = Weights({}, {})
    for name, value in model.graph.initializers.items():
        tensor = _torch_tensor(value)
        if tensor is None or tensor.numel() * tensor.element_size() < _INLINE_BYTES:
            continue
        entry = hollow.entry_of(as_bytes(tensor))
        if entry is None:
            weights.made[name] = tensor
        else:
            weights.found[name] = entry
    return weights


def _torch_tensor(value: onnx_ir.Value) -> Tensor | None:
    import torch

    constant = value.const_value
    if constant is None:
        return None
    raw = constant.raw
    if isinstance(raw, torch.Tensor):
        return raw.detach().contiguous()
    return torch.from_numpy(constant.numpy().copy())


def _bring(model: onnx_ir.Model, weights: Weights, subject: Subject, folder: Path) -> str:
    """Point initializers into safetensors files in the folder, the checkpoint's own where nothing changes; say how."""
    placed, moved = _place(weights.found, subject, folder)
    for name, entry in moved.items():
        value = model.graph.initializers[name]
        _point(value, entry, folder)
        if entry.dtype in _WIDENED:
            _widen(model, value)
    if weights.made:
        _write_made(model, weights.made, folder)
    return placed


def _place(found: dict[str, Entry], subject: Subject, folder: Path) -> tuple[str, dict[str, Entry]]:
    """Bring the checkpoint's tensors into the folder; return how, and where each initializer's bytes lie now."""
    dtype = _STORAGE[subject.precision]
    used = {entry.name: entry for entry in found.values()}
    if not used:
        return "written", {}
    if subject.weights == "copy" or not subject.checkpoint.is_in(dtype):
        written = write_entries(used.values(), folder / "model.safetensors", dtype)
        how = "copied" if subject.checkpoint.is_in(dtype) else "written"
        return how, {name: written[entry.name] for name, entry in found.items()}
    how = min(place(file, folder / file.name, subject.weights) for file in {entry.file for entry in used.values()})
    return how, {name: replace(entry, file=folder / entry.file.name) for name, entry in found.items()}


def _point(value: onnx_ir.Value, entry: Entry, folder: Path) -> None:
    import onnx_ir

    dtype = onnx_ir.DataType[_DTYPES[entry.dtype]]
    assert value.shape is not None  # noqa: S101 - an initializer has one
    value.const_value = onnx_ir.ExternalTensor(
        location=entry.file.name,
        offset=entry.offset,
        length=entry.length,
        dtype=dtype,
        shape=value.shape,
        name=value.name or entry.name,
        base_dir=folder,
    )
    value.type = onnx_ir.TensorType(dtype)


def _widen(model: onnx_ir.Model, value: onnx_ir.Value) -> None:
    """Let an initializer's users have it in float32."""
    import onnx_ir

    wide = onnx_ir.Value(
        name=f"{value.name}.float32", shape=value.shape, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )
    onnx_ir.convenience.replace_all_uses_with(value, wide)
    to = onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT)
    model.graph.insert_before(model.graph[0], onnx_ir.Node("", "Cast", [value], [to], outputs=[wide]))


def _write_made(model: onnx_ir.Model, made: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    file = folder / "constants.safetensors"
    save_file(made, file)
    for entry in read_header(file):
        _point(model.graph.initializers[entry.name], entry, folder)


def _strip(model: onnx_ir.Model) -> None:
    """Drop stack traces: they hold paths of the machine that exported."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "bakeoff"
    for node in model.graph:
        kept = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if kept:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = kept
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _layers(model: onnx_ir.Model) -> Iterator[tuple[str, str]]:
    """Yield (module path, name) of each node that came from a module."""
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes and node.name:
            yield _module_path(scopes), node.name


def _module_path(scopes: str) -> str:
    """`['', 'module', 'module.conv_in', 'conv2d']` -> `module.conv_in`."""
    import ast

    names: list[str] = ast.literal_eval(scopes)
    return names[-2] if len(names) > 1 else ""


def _save(model: onnx_ir.Model, folder: Path) -> None:
    import onnx_ir

    onnx_ir.save(model, folder / FILE)


def _weight_bytes(model: onnx_ir.Model) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            totals[str(value.const_value.dtype.numpy())] += value.const_value.nbytes
    return dict(totals)
