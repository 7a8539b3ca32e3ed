"""Lower a captured part to ONNX whose weights stay in the checkpoint's own safetensors files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

from ..errors import LoweringError
from ..weights import place, write_entries
from .exporter import Lowered
from .layers import write_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx_ir
    from torch import Tensor

    from ..components.component import Port
    from ..weights import Entry
    from .exporter import Subject

FILE = "model.onnx"
_INLINE_BYTES = 1024
"""Smaller constants stay in the graph."""
_FOLD_ELEMENTS = 8192
_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I64": "INT64", "I32": "INT32"}


class OnnxExporter:
    """`model.onnx`: a graph of a few MB; every tensor that equals one of the checkpoint points into its file.

    2-D weights keep their bytes too: Linear layers come as MatMul with Transpose(weight), which the runtimes
    fold when they load.
    """

    version: ClassVar[int] = 2
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    own_weights: ClassVar[bool] = False

    def storage(self, precision: str) -> str:  # noqa: ARG002
        return "float32"

    def packages(self) -> tuple[str, ...]:
        return ("torch", "onnx", "onnx-ir", "onnxscript")

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        model = _translate(subject)
        _optimize(model)
        _name_dims(model, subject.inputs, subject.outputs)
        placed = _move_weights_out(model, subject, folder)
        _strip(model)
        write_layers(_layers(model), subject.checkpoint, folder)
        _save(model, folder)
        return Lowered(weights=placed, weight_bytes=_weight_bytes(model))


def _translate(subject: Subject) -> onnx_ir.Model:
    import torch

    try:
        with _quiet():
            program = torch.onnx.export(
                subject.program(),
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
    """Fold constants and simplify, but never materialise a transposed weight."""
    from onnxscript.optimizer import optimize_ir

    optimize_ir(
        model, input_size_limit=_FOLD_ELEMENTS, should_fold=lambda node: False if node.op_type == "Transpose" else None
    )


def _name_dims(model: onnx_ir.Model, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Give the dynamic dimensions of the interface the names that the ports have."""
    import onnx_ir

    for values, ports in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, port in zip(values, ports, strict=True):
            value.shape = onnx_ir.Shape(
                [dim if isinstance(dim, int) else dim.replace("*", "_").replace("/", "_over_") for dim in port.dims]
            )


def _move_weights_out(model: onnx_ir.Model, subject: Subject, folder: Path) -> str:
    """Point initializers into safetensors files in the folder; what equals nothing there is written beside them."""
    found: dict[str, Entry] = {}
    changed: dict[str, Tensor] = {}
    for name, value in model.graph.initializers.items():
        tensor = _torch_tensor(value)
        if tensor is None or tensor.numel() * tensor.element_size() < _INLINE_BYTES:
            continue
        entry = subject.checkpoint.locate(tensor)
        if entry is None:
            changed[name] = tensor
        else:
            found[name] = entry
    placed, moved = _bring(found, subject, folder)
    for name, entry in moved.items():
        _point(model.graph.initializers[name], entry, folder)
    if changed:
        _write_changed(model, changed, folder)
    return placed


def _torch_tensor(value: onnx_ir.Value) -> Tensor | None:
    import torch

    constant = value.const_value
    if constant is None:
        return None
    raw = constant.raw
    if isinstance(raw, torch.Tensor):
        return raw.detach().contiguous()
    return torch.from_numpy(constant.numpy().copy())


def _bring(found: dict[str, Entry], subject: Subject, folder: Path) -> tuple[str, dict[str, Entry]]:
    """Bring the checkpoint's files into the folder; return how, and where each initializer's bytes lie now."""
    from dataclasses import replace

    if subject.weights == "copy":
        used = {entry.name: entry for entry in found.values()}
        written = write_entries(used.values(), folder / "model.safetensors") if used else {}
        return "copied", {name: written[entry.name] for name, entry in found.items()}
    how = {place(file, folder / file.name, subject.weights) for file in {entry.file for entry in found.values()}}
    moved = {name: replace(entry, file=folder / entry.file.name) for name, entry in found.items()}
    return min(how, default="written"), moved


def _point(value: onnx_ir.Value, entry: Entry, folder: Path) -> None:
    import onnx_ir

    value.const_value = onnx_ir.ExternalTensor(
        location=entry.file.name,
        offset=entry.offset,
        length=entry.length,
        dtype=onnx_ir.DataType[_DTYPES[entry.dtype]],
        shape=onnx_ir.Shape(entry.shape),
        name=value.name or entry.name,
        base_dir=folder,
    )


def _write_changed(model: onnx_ir.Model, changed: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    from ..weights import read_header

    file = folder / "constants.safetensors"
    save_file(changed, file)
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
