"""What a run of an ONNX graph holds beside its weights: predicted from the graph, at given sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnx_ir


def peak_bytes(file: Path, shapes: Mapping[str, Sequence[int]]) -> int:
    """Predict the bytes of all tensors that are there at once, at most: each from the node that makes it to its last use.

    Nodes run in the graph's order, and each writes memory of its own: a backend that fuses some (attention, whose
    scores are often the most) or computes in place holds less, one that wants scratch memory more. What comes of weights
    alone, such as codes that are widened, the graph's inputs, and what branches use inside count as nothing.

    Args:
        file: the model; its external weights aren't read.
        shapes: input -> its shape; those of fixed shape may be left out.
    """
    nodes, outputs, constants = _sized(file, shapes)
    last = {id(value): number for number, node in enumerate(nodes) for value in node.inputs if value is not None}
    last |= {id(value): len(nodes) for value in outputs}
    held: dict[int, int] = {}
    now = most = 0
    for number, node in enumerate(nodes):
        taken = {id(value) for value in node.inputs if value is not None}
        if taken <= constants:
            constants |= {id(value) for value in node.outputs}
            continue
        made = {id(value): _bytes_of(value) for value in node.outputs}
        held |= made
        now += sum(made.values())
        most = max(most, now)
        now -= sum(held.pop(each, 0) for each in taken | made.keys() if last.get(each, number) <= number)
    return most


def _sized(file: Path, shapes: Mapping[str, Sequence[int]]) -> tuple[list[onnx_ir.Node], list[onnx_ir.Value], set[int]]:
    """Return a model's nodes with the shapes of all that they make, what it gives, and the ids of its weights.

    What computes shapes is folded away.
    """
    import onnx_ir
    from onnxscript import optimizer

    model = onnx_ir.load(file)
    graph = model.graph
    for value in graph.inputs:
        if value.name is not None and value.name in shapes:
            value.shape = onnx_ir.Shape(shapes[value.name])
    for node in graph:
        for value in node.outputs:
            value.shape = None  # by names, which inference keeps
    weights = set()
    for name, value in [*graph.initializers.items()]:
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
            weights.add(id(value))
    optimizer.fold_constants(model, onnx_shape_inference=True)
    return [*graph], [*graph.outputs], weights | {id(value) for value in graph.initializers.values()}


def _bytes_of(value: onnx_ir.Value) -> int:
    """Return a tensor's bytes; none where its shape or dtype isn't known."""
    if value.dtype is None or value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        return 0
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)
