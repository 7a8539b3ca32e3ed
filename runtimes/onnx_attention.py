"""Attention of an ONNX graph, fused while it is opened: ONNX Runtime's own operator keeps no matrix of scores."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .onnx_graph import has_graphs_inside

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

KERNELS = ("flash", "math")
"""Values of `Placement.attention`: fused, and as the graph has it."""
_DOMAIN = "com.microsoft"
_HEADS_LAST = (0, 2, 1, 3)
_KEYS_TURNED = (0, 1, 3, 2)


@dataclass(frozen=True)
class _Attention:
    """What one attention takes: values (batch, heads, tokens, width), and what products are multiplied by."""

    query: str
    key: str
    value: str
    scale: float
    heads: int
    product: Any
    """The node that multiplies probabilities by values."""


def fuse(model: Any, dtypes: Collection[str]) -> int:  # noqa: ANN401 - onnx is untyped
    """Put MultiHeadAttention in the place of a product, a softmax and a product; return how many times.

    ONNX Runtime's kernel goes through keys in blocks with a running softmax (FlashAttention, https://arxiv.org/abs/2205.14135).
    The file keeps ONNX's own operators, which other tools read. Attention with a mask, with unknown heads or of other
    dtypes stays as it is, and so does a graph with others inside, which may take any of its values.

    Args:
        model: is changed; its weights may be anywhere.
        dtypes: of ONNX, such as FLOAT, that the kernel is there for.
    """
    if has_graphs_inside(model.graph):
        return 0
    view = _View(model.graph)
    found = {id(each.product): each for node in model.graph.node if (each := view.attention(node, dtypes))}
    if not found:
        return 0
    nodes: list[Any] = []
    for node in model.graph.node:
        each = found.get(id(node))
        nodes += [node] if each is None else _fused(each)
    kept = _live(nodes, {output.name for output in model.graph.output})
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(_shapes({each.heads for each in found.values()}))
    if all(each.domain != _DOMAIN for each in model.opset_import):
        model.opset_import.add(domain=_DOMAIN, version=1)
    return len(found)


class _View:
    """A graph's values by name."""

    def __init__(self, graph: Any) -> None:  # noqa: ANN401 - onnx is untyped
        self._makers = {name: node for node in graph.node for name in node.output}
        self._uses = Counter(name for node in graph.node for name in node.input)
        self._uses.update(output.name for output in graph.output)
        self._takers = {node.input[0]: node for node in graph.node if node.input}
        self._types = {each.name: each.type.tensor_type for each in graph.value_info}
        self._constants = {each.name: each for each in graph.initializer}

    def attention(self, softmax: Any, dtypes: Collection[str]) -> _Attention | None:  # noqa: ANN401 - onnx is untyped
        """Return the attention around a softmax."""
        if softmax.op_type != "Softmax" or _axis(softmax) not in {-1, 3} or self._uses[softmax.output[0]] != 1:
            return None
        product = self._takers.get(softmax.output[0])
        scores, outer = self._unscaled(softmax.input[0])
        made = self._makers.get(scores)
        if product is None or product.op_type != "MatMul" or made is None or made.op_type != "MatMul":
            return None
        query, left = self._unscaled(made.input[0])
        turned, right = self._unscaled(made.input[1])
        key, value = self._unturned(turned), product.input[1]
        if key is None:
            return None
        shapes = {self._heads(name, dtypes) for name in (query, key, value)}
        if len(shapes) != 1 or None in shapes:
            return None
        [(_, heads, _)] = filter(None, shapes)
        return _Attention(query, key, value, outer * left * right, heads, product)

    def _unscaled(self, name: str) -> tuple[str, float]:
        """Return what a value is a multiple of, and by how much."""
        node = self._makers.get(name)
        if node is not None and node.op_type == "Mul":
            for one, other in (node.input, reversed(node.input)):
                number = self._number(other)
                if number is not None:
                    return one, number
        return name, 1.0

    def _number(self, name: str) -> float | None:
        import onnx

        constant = self._constants.get(name)
        if constant is None or constant.data_location == onnx.TensorProto.EXTERNAL or math.prod(constant.dims) != 1:
            return None
        return float(onnx.numpy_helper.to_array(constant).item())

    def _unturned(self, name: str) -> str | None:
        """Return the keys whose last two dimensions were swapped; torch's exporter does it with heads folded into the batch."""
        node = self._makers.get(name)
        if node is not None and _perm(node) == _KEYS_TURNED:
            return str(node.input[0])
        if node is None or node.op_type != "Reshape":
            return None
        swap = self._makers.get(node.input[0])
        fold = self._makers.get(swap.input[0]) if swap is not None and _perm(swap) == (0, 2, 1) else None
        return str(fold.input[0]) if fold is not None and fold.op_type == "Reshape" else None

    def _heads(self, name: str, dtypes: Collection[str]) -> tuple[str | int, int, int] | None:
        """Return batch, heads and width of a value (batch, heads, tokens, width); None where they aren't known."""
        import onnx

        found = self._types.get(name)
        if found is None or onnx.TensorProto.DataType.Name(found.elem_type) not in dtypes:
            return None
        dims = [dim.dim_value or dim.dim_param for dim in found.shape.dim]
        if len(dims) != len(_HEADS_LAST):
            return None
        batch, heads, _, width = dims
        return (batch, heads, width) if batch and isinstance(heads, int) and isinstance(width, int) else None


def _axis(softmax: Any) -> int:  # noqa: ANN401 - onnx is untyped
    return next((int(each.i) for each in softmax.attribute if each.name == "axis"), -1)


def _perm(node: Any) -> tuple[int, ...] | None:  # noqa: ANN401 - onnx is untyped
    if node.op_type != "Transpose":
        return None
    return next((tuple(each.ints) for each in node.attribute if each.name == "perm"), None)


def _fused(each: _Attention) -> list[Any]:
    """Return MultiHeadAttention between layouts, which ONNX Runtime cancels against those that are there."""
    from onnx import helper

    name, [output] = each.product.name, each.product.output
    nodes, given = [], []
    for kind, value in (("query", each.query), ("key", each.key), ("value", each.value)):
        rows = f"{output}.{kind}"
        nodes.append(helper.make_node("Transpose", [value], [f"{rows}.turned"], f"{rows}.turned", perm=_HEADS_LAST))
        nodes.append(helper.make_node("Reshape", [f"{rows}.turned", _shape_name(None)], [rows], rows))
        given.append(rows)
    made = f"{output}.made"
    attributes = {"num_heads": each.heads, "scale": each.scale}
    nodes.append(helper.make_node("MultiHeadAttention", given, [made], name, domain=_DOMAIN, **attributes))
    nodes.append(helper.make_node("Reshape", [made, _shape_name(each.heads)], [f"{made}.heads"], f"{made}.heads"))
    return [*nodes, helper.make_node("Transpose", [f"{made}.heads"], [output], f"{made}.turned", perm=_HEADS_LAST)]


def _shape_name(heads: int | None) -> str:
    return f"bakeoff.{heads}.heads" if heads else "bakeoff.rows"


def _shapes(heads: Collection[int]) -> list[Any]:
    """Return the shapes that values are given: 0 keeps a dimension."""
    import numpy as np
    from onnx import numpy_helper

    shapes = {_shape_name(None): [0, 0, -1]} | {_shape_name(count): [0, 0, count, -1] for count in sorted(heads)}
    return [numpy_helper.from_array(np.array(shape, dtype=np.int64), name) for name, shape in shapes.items()]


def _live(nodes: Sequence[Any], wanted: set[str]) -> list[Any]:
    """Return the nodes that something still takes."""
    kept: list[Any] = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]
