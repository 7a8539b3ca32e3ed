"""Lower a captured part to OpenVINO IR, with the interface that Optimum Intel and OpenVINO GenAI feed."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LoweringError
from ..quantize.calibration import METHODS
from .costs import graph_cost, stored_bytes
from .exporter import Cost, Lowered
from .graphs import Shelf
from .hollow import lower_hollow
from .layers import write_layers
from .openvino_activations import round_activations, shortened
from .openvino_weights import TENSOR, write_weights
from .openvino_wide import keep_wide

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch.export import ExportedProgram

    from ..components.component import Port
    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint, Entry
    from .exporter import Subject
    from .hollow import Hollow

FILE = "openvino_model.xml"
_ABOUT = "graph.json"
_LEAST_BYTES = 1024
"""Smaller constants are OpenVINO's to write."""
_DECOMPOSED = {"conv": "convolution", "layer_norm": "native_layer_norm", "group_norm": "native_group_norm"}
"""Part of a torch operation's name -> what OpenVINO calls the node that it makes of it."""
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "boolean": "bool"}


class OpenVINOExporter:
    """`openvino_model.xml` and `.bin`: the graph straight from the captured program, the weights from the checkpoint.

    Weights are stored as the recipe says: fp32, bf16, or codes of a low-bit format beside their scales. What the runtime
    computes in is decided by the recipe when the part is loaded, never by OpenVINO's default.
    """

    version: ClassVar[int] = 13
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8", "int4", "nf4", "w8a8", "w8a8-dynamic")
    reasons: ClassVar[Mapping[str, str]] = {
        "fp8": "its CPU plugin widens 8-bit floats when it compiles; they keep 32 dB of a normal distribution, int8 40 dB in as many bytes",
    }
    layer_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("bf16", "int8", "int4", "nf4", "w8a8"), ("fp32", "bf16", "int8", "int4", "nf4", "w8a8")),
        "fp16": ("fp32", "fp16"),
        "w8a8-dynamic": ("fp32", "bf16", "w8a8-dynamic"),
    }
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"timestep": ("f32",), "activations": METHODS}

    def packages(self) -> tuple[str, ...]:
        return ("torch", "openvino")

    def cost(
        self,
        checkpoint: Checkpoint,
        mixture: Mixture,
        *,
        options: Mapping[str, str],  # noqa: ARG002 - the same for all
        operations: int,
        shared: bool,  # noqa: ARG002
    ) -> Cost:
        weights = stored_bytes(checkpoint, mixture)
        return graph_cost(weights, sum(weights.values()), operations, packs=bool(mixture.formats))

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        graph = _hollow_graph(subject, self.packages())
        activations = shortened(subject.activations)
        round_activations(graph.model, graph.entries, activations)
        keep_wide(graph.model, write_layers(graph.layers, subject.checkpoint, folder), subject.mixture)
        _save(graph.model, folder)
        entries = graph.entries
        del graph
        written = write_weights(folder / FILE, entries, subject.mixture, activations)
        return Lowered("written", written.weight_bytes, written.kept, activations)


@dataclass
class _Graph:
    """A part's graph in float32, with a parameter in the place of each large weight."""

    model: Any
    entries: list[Entry]
    """What the parameters stand for, in their order."""
    layers: list[tuple[str, str]]
    """(Module path, operation) of each that came from a module."""

    def write(self, folder: Path) -> None:
        _save(self.model, folder)
        about = {"entries": [entry.name for entry in self.entries], "layers": self.layers}
        (folder / _ABOUT).write_text(json.dumps(about))

    @classmethod
    def read(cls, folder: Path, checkpoint: Checkpoint) -> _Graph:
        import openvino

        about = json.loads((folder / _ABOUT).read_text())
        entries = [checkpoint.entries[name] for name in about["entries"]]
        return cls(openvino.Core().read_model(folder / FILE), entries, [(path, name) for path, name in about["layers"]])


def _hollow_graph(subject: Subject, packages: tuple[str, ...]) -> _Graph:
    shelf = Shelf.of(subject, "openvino", packages)
    found = shelf.found()
    if found:
        return _Graph.read(found, subject.checkpoint)

    def translate(program: ExportedProgram, hollow: Hollow) -> tuple[_Graph, set[str]]:
        needed = hollow.needed(program)
        _spell_sizes(program)
        model = _convert(subject.part, program)
        layers = list(_layers(model, program))
        model, entries = _with_interface(model, program, hollow, subject.inputs, subject.outputs)
        uses = _uses(model, entries)
        return _Graph(model, entries, layers), {name for name, count in needed.items() if uses.get(name, 0) >= count}

    graph = lower_hollow(subject.part, subject.capture, translate)
    shelf.keep(graph.write)
    return graph


def _save(model: Any, folder: Path) -> None:  # noqa: ANN401 - openvino is untyped
    import openvino

    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def _spell_sizes(program: ExportedProgram) -> None:
    """Write the sizes that are known where a reshape says -1: beside a dynamic one OpenVINO would infer 1."""
    import torch

    for node in program.graph.nodes:
        if node.target in {torch.ops.aten.reshape.default, torch.ops.aten.view.default} and -1 in node.args[1]:
            known = [
                found if asked == -1 and isinstance(found, int) else asked
                for asked, found in zip(node.args[1], node.meta["val"].shape, strict=True)
            ]
            node.args = (node.args[0], known)


def _convert(part: str, program: ExportedProgram) -> Any:  # noqa: ANN401 - openvino is untyped
    import openvino

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return openvino.convert_model(program)
    except Exception as error:
        message = f"{part} couldn't be lowered to OpenVINO: {error}"
        raise LoweringError(message) from error


def _with_interface(  # openvino is untyped
    model: Any,  # noqa: ANN401
    program: ExportedProgram,
    hollow: Hollow,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
) -> tuple[Any, list[Entry]]:
    """Name inputs and outputs, give each input its port's dtype, rank and fixed dimensions, and take the weights out."""
    import openvino

    by_name = {name: parameter for parameter in model.get_parameters() for name in parameter.output(0).get_names()}
    captured = program.graph_signature.user_inputs
    parameters = [_fit(by_name[name], port) for name, port in zip(captured, inputs, strict=True)]
    for result, port in zip(model.get_results(), outputs, strict=True):
        result.output(0).get_tensor().set_names({port.name})
    weights, entries = _take_weights_out(model, hollow)
    fitted = openvino.Model(model.get_results(), [*parameters, *weights], "bakeoff")
    fitted.validate_nodes_and_infer_types()
    return fitted, entries


def _take_weights_out(model: Any, hollow: Hollow) -> tuple[list[Any], list[Entry]]:  # noqa: ANN401
    """Put a parameter in the place of each constant that is a tensor of the checkpoint; return both, in one order."""
    from openvino import opset13

    parameters: list[Any] = []
    entries: list[Entry] = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "Constant" or operation.data.nbytes < _LEAST_BYTES:
            continue
        entry = hollow.entry_of(operation.data.reshape(-1).view("uint8").data)
        if entry is not None:
            shape, dtype = operation.get_output_shape(0), operation.get_output_element_type(0)
            parameter = opset13.parameter(shape, dtype, name=f"{TENSOR}{len(entries)}")
            for target in operation.output(0).get_target_inputs():
                target.replace_source_output(parameter.output(0))
            parameters.append(parameter)
            entries.append(entry)
    return parameters, entries


def _uses(model: Any, entries: Sequence[Entry]) -> Counter[str]:  # noqa: ANN401
    """Count what takes each tensor: conversion may fold a factor into a weight in one place, and leave it in another."""
    parameters = model.get_parameters()[-len(entries) :] if entries else []
    counts: Counter[str] = Counter()
    for parameter, entry in zip(parameters, entries, strict=True):
        counts[entry.name] += len(parameter.output(0).get_target_inputs())
    return counts


def _fit(parameter: Any, port: Port) -> Any:  # noqa: ANN401
    import openvino
    from openvino import opset13

    shape = openvino.PartialShape([dim if isinstance(dim, int) else -1 for dim in port.dims])
    if parameter.get_element_type().to_string() == _ov_dtype(port.dtype) and parameter.partial_shape.rank == shape.rank:
        parameter.set_partial_shape(shape)
        parameter.set_friendly_name(port.name)
        parameter.output(0).get_tensor().set_names({port.name})
        return parameter
    wanted = opset13.parameter(shape, openvino.Type(_numpy_dtype(port.dtype)), name=port.name)
    wanted.output(0).get_tensor().set_names({port.name})
    value = opset13.convert(wanted, parameter.get_element_type().to_string())
    if port.rank == 1 and parameter.partial_shape.rank.get_length() == 0:
        value = opset13.gather(value, opset13.constant(0, dtype="int64"), opset13.constant(0, dtype="int64"))
    for target in parameter.output(0).get_target_inputs():
        target.replace_source_output(value.output(0))
    return wanted


def _ov_dtype(dtype: str) -> str:
    return next(short for short, long in _DTYPES.items() if long == dtype)


def _numpy_dtype(dtype: str) -> Any:  # noqa: ANN401
    import numpy as np

    return np.dtype(dtype)


def _layers(model: Any, program: ExportedProgram) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Yield (module path, friendly name) of each operation that came from a module.

    OpenVINO names operations after the program's nodes, once it has decomposed them: those of `_DECOMPOSED` are counted anew.
    """
    paths, counts = {}, Counter[str]()
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            continue
        path, _ = list(stack.values())[-1]
        paths[node.name] = path
        renamed = next((name for target, name in _DECOMPOSED.items() if target in str(node.target)), None)
        if renamed:
            paths[f"{renamed}_{counts[renamed]}" if counts[renamed] else renamed] = path
            counts[renamed] += 1
    for operation in model.get_ordered_ops():
        name = operation.get_friendly_name()
        if name.partition("/")[0] in paths:
            yield paths[name.partition("/")[0]], name
