"""An ONNX graph of float16, imitated in float32 for ONNX Runtime's CPU provider.

That provider computes float16 operations in float32 and drops the roundings between them, so that it neither loses what
float16 loses nor overflows where that does. Here each operation's result is rounded to float16's 11 bits, by products and
differences that nothing simplifies (T. J. Dekker, "A floating-point technique for extending the available precision", 1971),
and infinite beyond its largest number: what a GPU would make, but for numbers below 6e-5, which keep more bits here.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from .onnx_graph import has_graphs_inside

if TYPE_CHECKING:
    from collections.abc import Collection

_LARGEST = 65519.996
"""What lies beyond is nearer to the next number after 65504, which float16 doesn't have."""
_SPLITTER = 2.0**13 + 1
"""Times a float32 of 24 bits: what is left of it after Dekker's differences has 11."""
_LAYOUT = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Pad", "Reshape", "Slice", "Split",
        "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""What moves rounded values and leaves them as they are."""


def rounds(graph: Any, products: Collection[str]) -> set[str]:  # noqa: ANN401 - onnx is untyped
    """Return the values that a graph has in float16, if it multiplies in it and can be imitated.

    It can't where it takes or gives float16, as other tools' graphs do, or has others inside.

    Args:
        graph: of a model.
        products: operators that multiply.
    """
    import onnx

    half = onnx.TensorProto.FLOAT16
    found = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == half}
    found |= {node.output[0] for node in graph.node if node.op_type == "Cast" and _target(node).i == half}
    ends = (*graph.input, *graph.output)
    if any(value.type.tensor_type.elem_type == half for value in ends) or has_graphs_inside(graph):
        return set()
    return found if any(node.op_type in products and node.output[0] in found for node in graph.node) else set()


def imitate(model: Any, halves: set[str]) -> None:  # noqa: ANN401 - onnx is untyped
    """Rewrite a graph in place; its inputs and outputs are float32 already.

    `x * sigmoid(x)` is rounded once: ONNX Runtime makes one operation of it on a GPU.

    Args:
        model: weights may be anywhere.
        halves: the values that it has in float16.
    """
    import onnx

    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    graph = model.graph
    wide = {tensor.name: f"{tensor.name}.wide" for tensor in graph.initializer if tensor.data_type == half}
    nodes = [_cast(name, made, single) for name, made in wide.items()]
    rounded = halves - _inside(graph)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = wide.get(name, name)
        nodes += _imitated(node, rounded)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    graph.initializer.extend(
        onnx.helper.make_tensor(f"bakeoff.{name}", single, [], [value])
        for name, value in (("splitter", _SPLITTER), ("largest", _LARGEST), ("infinity", float("inf")))
    )


def _inside(graph: Any) -> set[str]:  # noqa: ANN401 - onnx is untyped
    """Return the sigmoids that are multiplied by what they are of, and go nowhere else."""
    users: dict[str, list[tuple[str, set[str]]]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append((node.op_type, set(node.input)))
    return {
        node.output[0]
        for node in graph.node
        if node.op_type == "Sigmoid" and users[node.output[0]] == [("Mul", {node.input[0], node.output[0]})]
    }


def _imitated(node: Any, halves: set[str]) -> list[Any]:  # noqa: ANN401 - onnx is untyped
    """Return the node in float32, and what rounds its results."""
    import onnx

    made = [name for name in node.output if name in halves]
    if not made:
        return [node]
    after: list[Any] = []
    for name in made:
        place = list(node.output).index(name)
        if node.op_type == "Constant":
            node.output[place] = f"{name}.stored"
            after.append(_cast(f"{name}.stored", name, onnx.TensorProto.FLOAT))
        elif node.op_type not in _LAYOUT:
            node.output[place] = f"{name}.exact"
            after += _rounding(f"{name}.exact", name)
    if node.op_type == "Cast":
        _target(node).i = onnx.TensorProto.FLOAT
    return [node, *after]


def _rounding(exact: str, name: str) -> list[Any]:
    from onnx.helper import make_node

    bits = f"{name}.bits"
    return [
        make_node("Mul", [exact, "bakeoff.splitter"], [f"{name}.split"]),
        make_node("Sub", [f"{name}.split", exact], [f"{name}.rest"]),
        make_node("Sub", [f"{name}.split", f"{name}.rest"], [bits]),
        make_node("Abs", [exact], [f"{name}.size"]),
        make_node("Greater", [f"{name}.size", "bakeoff.largest"], [f"{name}.over"]),
        make_node("Mul", [exact, "bakeoff.infinity"], [f"{name}.infinite"]),
        make_node("Where", [f"{name}.over", f"{name}.infinite", bits], [name]),
    ]


def _target(cast: Any) -> Any:  # noqa: ANN401 - onnx is untyped
    """Return the attribute that says what a cast is to."""
    return next(attribute for attribute in cast.attribute if attribute.name == "to")


def _cast(name: str, made: str, dtype: int) -> Any:  # noqa: ANN401 - onnx is untyped
    from onnx.helper import make_node

    return make_node("Cast", [name], [made], to=dtype)
