"""Editing an ONNX graph: constants, roundings of activations, nodes in the place of others, and products of a weight."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import onnx_ir

    from ..quantize.grid import Grid
    from ..weights import Streamed

DTYPES = {
    "F32": "FLOAT",
    "F16": "FLOAT16",
    "BF16": "BFLOAT16",
    "I64": "INT64",
    "I32": "INT32",
    "U8": "UINT8",
    "I8": "INT8",
}
"""safetensors' dtype -> ONNX's."""
OWN = "bakeoff."
"""What the names of constants begin with that stand beside codes: steps and zero points."""
FLOAT = 1
"""ONNX's number of float32."""


class Editor:
    """Changes a graph; constants of the same values, and activations rounded on the same grid, are there once."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.graph = graph
        self._codes: dict[tuple[onnx_ir.Value, Grid], onnx_ir.Value] = {}

    def begin_with(self, node: onnx_ir.Node) -> None:
        """Put a node before all others: one that takes constants alone."""
        self.graph.insert_before(self.graph[0], node)

    def rounded(self, value: onnx_ir.Value, grid: Grid, taker: onnx_ir.Node) -> onnx_ir.Value:
        """Return an activation's codes: rounded once for all that take it on this grid, named after the first that is edited."""
        key = (value, grid)
        if key not in self._codes:
            zeros = grid.zeros * len(grid.steps) if len(grid.zeros) == 1 else grid.zeros
            inputs = [value, self.numbers(grid.steps), self.codes_of(zeros)]
            node = make_node(
                "QuantizeLinear", inputs, {"axis": 1} if grid.by_channel else {}, name=f"{taker.name}.taken"
            )
            put_behind(self.graph, value, [node])
            self._codes[key] = node.outputs[0]
        return self._codes[key]

    def initializer(self, tensor: Streamed) -> onnx_ir.Value:
        """Add an initializer whose bytes are to come."""
        import onnx_ir

        dtype = onnx_ir.DataType[DTYPES[tensor.dtype]]
        value = onnx_ir.Value(name=tensor.name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(dtype))
        self.graph.initializers[tensor.name] = value
        return value

    def numbers(self, numbers: Sequence[float]) -> onnx_ir.Value:
        """Return a constant of float32: a number, or one a channel."""
        import numpy as np

        return self.array(np.asarray(numbers if len(numbers) > 1 else numbers[0], dtype=np.float32))

    def codes_of(self, zeros: Sequence[int]) -> onnx_ir.Value:
        """Return a constant of codes, as unsigned bytes: larger by 128."""
        import numpy as np

        codes = np.asarray(zeros if len(zeros) > 1 else zeros[0])
        return self.array((codes + 128).astype(np.uint8))

    def array(self, array: Any, name: str | None = None) -> onnx_ir.Value:  # noqa: ANN401 - NumPy's
        """Return an initializer with these values; the same one for the same values, unless it is named."""
        import onnx_ir

        told = hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()[:16] if array.ndim else array
        name = name or f"{OWN}{array.dtype}.{told}"
        if name not in self.graph.initializers:
            tensor = onnx_ir.tensor(array, name=name)
            shape, dtype = onnx_ir.Shape(array.shape), onnx_ir.TensorType(tensor.dtype)
            self.graph.initializers[name] = onnx_ir.Value(name=name, shape=shape, type=dtype, const_value=tensor)
        return self.graph.initializers[name]

    def replace(self, node: onnx_ir.Node, new: list[onnx_ir.Node]) -> None:
        """Put nodes in the place of one: the last one's output is its output."""
        import onnx_ir

        output, made = node.outputs[0], new[-1].outputs[0]
        made.shape, made.type = output.shape, output.type
        onnx_ir.convenience.replace_nodes_and_values(self.graph, node, [node], new, [output], [made])


def make_node(
    kind: str,
    inputs: Sequence[onnx_ir.Value | None],
    attributes: Mapping[str, int] | None = None,
    *,
    name: str | None = None,
    like: onnx_ir.Node | None = None,
    domain: str = "",
    outputs: int = 1,
) -> onnx_ir.Node:
    """Make a node; `like` is the one whose name, and whose place among the modules, it takes over."""
    import onnx_ir

    return onnx_ir.Node(
        domain,
        kind,
        inputs,
        [onnx_ir.AttrInt64(key, number) for key, number in (attributes or {}).items()],
        num_outputs=outputs,
        name=like.name if like else name,
        metadata_props=dict(like.metadata_props) if like else None,
    )


def put_behind(graph: onnx_ir.Graph, value: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> None:
    """Put nodes right behind what makes a value, before all that takes it, whichever of these is edited first."""
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)


def products_of(value: onnx_ir.Value, others: Collection[str] = ()) -> list[onnx_ir.Node] | None:
    """Return the matrix products that an initializer (N, K) is the transposed second factor of; None if it does more.

    Args:
        value: the initializer.
        others: operators that count as products of their second input, too, such as Conv.
    """
    products: list[onnx_ir.Node] = []
    for user, index in value.uses():
        if index == 1 and (user.op_type in others or _is_plain_gemm(user)):
            products.append(user)
        elif user.op_type == "Transpose" and all(
            inner.op_type == "MatMul" and place == 1 for inner, place in user.outputs[0].uses()
        ):
            products.extend(inner for inner, _ in user.outputs[0].uses())
        else:
            return None
    return products


def _is_plain_gemm(node: onnx_ir.Node) -> bool:
    wanted = {"transB": 1, "transA": 0, "alpha": 1.0, "beta": 1.0}
    defaults = {**wanted, "transB": 0}
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return node.op_type == "Gemm" and {**defaults, **given} == wanted
