"""Give an ONNX graph, captured in float32, the dtype that it shall compute in: TensorRT takes each operation as typed.

What torch keeps in float32 in a module of two bytes stays so here: sums and powers inside a norm, what comes from a timestep,
a position or a mask. Products take and give the narrow dtype; so do norms, unless they are asked to stay wide.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ..errors import LoweringError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_ir

    from ..components.component import Port

SCOPES = "pkg.torch.onnx.name_scopes"
DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
"""Precision -> ONNX's dtype."""
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NORMS = frozenset({"GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"})
_SUMS = frozenset(
    {
        "Cos", "CumSum", "Exp", "Log", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean",
        "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sin", "Sqrt",
    }
)  # fmt: skip
"""What loses too much in two bytes, or overflows there."""
_LAYOUT = frozenset(
    {
        "Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice", "Split",
        "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""What moves values and leaves them as they are."""
_ALWAYS_WIDE = {("Resize", 2)}
"""(operator, index) of inputs that ONNX has in float32 alone: factors of a resize."""


class Kind(enum.Enum):
    """What a floating-point tensor is stored in."""

    NARROW = "narrow"
    WIDE = "wide"
    """float32 inside a module; what leaves the module goes on in the narrow dtype."""
    EXACT = "exact"
    """float32 as far as the next product: made of timesteps, positions, masks or constants alone."""


class Typing:
    """Rewrites a graph. `kinds` tells afterwards what each value is stored in, `wide_products` which products stayed wide."""

    def __init__(
        self,
        model: onnx_ir.Model,
        precision: str,
        inputs: tuple[Port, ...],
        weights: Collection[str],
        wide_nodes: Collection[str] = (),
        *,
        wide_norms: bool = False,
    ) -> None:
        """Prepare.

        Args:
            model: float32, of one graph; is changed.
            precision: `fp16` or `bf16`.
            inputs: of the part, in the graph's order.
            weights: initializers that are tensors of the checkpoint; those that stay wide are in `wide_weights` afterwards.
            wide_nodes: names of nodes that compute in float32.
            wide_norms: norms do, too.
        """
        import onnx_ir

        self._model = model
        self._dtype = onnx_ir.DataType[DTYPES[precision]]
        self._inputs, self._weights, self._wide_nodes = inputs, frozenset(weights), frozenset(wide_nodes)
        self._wide_norms = wide_norms
        self.kinds: dict[onnx_ir.Value, Kind] = {}
        self.wide_weights: set[str] = set()
        self.wide_products: set[str] = set()
        self._scopes: dict[onnx_ir.Value, str | None] = {}
        self._casts: dict[tuple[onnx_ir.Value, Kind], onnx_ir.Value] = {}
        self._constants: dict[tuple[onnx_ir.Value, Kind], onnx_ir.Value] = {}
        self._may: dict[str, bool] = {}

    def apply(self) -> Typing:
        """Rewrite the graph; its inputs and outputs stay as they are.

        Raises:
            LoweringError: it has branches or loops.
        """
        graph = self._model.graph
        for value, port in zip(graph.inputs, self._inputs, strict=True):
            if _is_float(value):
                self.kinds[value] = Kind.EXACT if port.exact else Kind.WIDE
        for node in list(graph):
            if any(attribute.type.name in {"GRAPH", "GRAPHS"} for attribute in node.attributes.values()):
                message = f"the graph has a {node.op_type}, whose branches aren't given another dtype"
                raise LoweringError(message, fix="bake this part in fp32")
            self._retype(node)
        self._settle_weights()
        for index, value in enumerate(graph.outputs):
            if self.kinds.get(value) is Kind.NARROW:
                self._widen_output(index, value)
        return self

    def _retype(self, node: onnx_ir.Node) -> None:
        taken = [
            (index, value) for index, value in enumerate(node.inputs) if value is not None and self._is_float(value)
        ]
        made = [value for value in node.outputs if _is_float(value)]
        if not taken and not made:
            return
        kind = self._kind_of(node, [value for _, value in taken])
        for index, value in taken:
            if (node.op_type, index) not in _ALWAYS_WIDE:
                node.replace_input_with(index, self._as(value, kind, node))
        for value in made:
            self.kinds[value] = kind
            self._scopes[value] = self._scope_of(node, [value for _, value in taken])
            self._set_type(value, kind)
        if node.op_type == "Cast" and made:
            self._set_cast(node, kind)
        if node.op_type in PRODUCTS and kind is not Kind.NARROW:
            self.wide_products.add(node.name or "")

    def _kind_of(self, node: onnx_ir.Node, taken: list[onnx_ir.Value]) -> Kind:
        wide = node.name in self._wide_nodes or (self._wide_norms and node.op_type in _NORMS)
        if wide or not self._may_be_narrow(node.op_type):
            return Kind.WIDE
        if node.op_type in PRODUCTS or node.op_type in _NORMS:
            return Kind.NARROW
        kinds = [self.kinds[value] for value in taken if value in self.kinds]
        if not kinds:
            return self._of_constants(node, taken)
        if all(kind is Kind.EXACT for kind in kinds):
            return Kind.EXACT
        if node.op_type in _LAYOUT:
            return kinds[0]
        scope = _scope(node)
        inside = any(self.kinds.get(value) is Kind.WIDE and self._scopes.get(value) == scope for value in taken)
        return Kind.WIDE if node.op_type in _SUMS or inside or Kind.EXACT in kinds else Kind.NARROW

    def _of_constants(self, node: onnx_ir.Node, taken: list[onnx_ir.Value]) -> Kind:
        """Return the kind of what is made of constants and whole numbers alone: of weights what their users compute in."""
        if not any(value.name in self._weights for value in taken):
            return Kind.EXACT
        users = [use.node for value in node.outputs for use in value.uses()]
        return Kind.WIDE if users and all(user.name in self._wide_nodes for user in users) else Kind.NARROW

    def _may_be_narrow(self, operator: str) -> bool:
        """Say whether ONNX has an operator in the narrow dtype: some never got bfloat16."""
        import onnx

        if operator not in self._may:
            schema = onnx.defs.get_schema(operator, self._model.opset_imports[""])
            allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
            taken = [allowed.get(each.type_str, [each.type_str]) for each in (*schema.inputs, *schema.outputs)]
            floats = next((types for types in taken if "tensor(float)" in types), None)
            self._may[operator] = floats is None or f"tensor({self._dtype.name.lower()})" in floats
        return self._may[operator]

    def _scope_of(self, node: onnx_ir.Node, taken: list[onnx_ir.Value]) -> str | None:
        """Return the module that a value belongs to: moving one about doesn't move it into another module."""
        if node.op_type in _LAYOUT and taken:
            return self._scopes.get(taken[0])
        return _scope(node)

    def _is_float(self, value: onnx_ir.Value) -> bool:
        return value in self.kinds or _is_float(value)

    def _as(self, value: onnx_ir.Value, kind: Kind, node: onnx_ir.Node) -> onnx_ir.Value:
        """Return a value in the dtype of a kind."""
        if value.is_initializer():
            return self._constant_as(value, kind, node)
        narrow = kind is Kind.NARROW
        if (self.kinds[value] is Kind.NARROW) == narrow:
            return value
        key = (value, Kind.NARROW if narrow else Kind.WIDE)
        if key not in self._casts:
            cast = _cast(value, self._dtype if narrow else None, f"{value.name}.{'narrow' if narrow else 'wide'}")
            producer = value.producer()
            if producer is None:
                self._model.graph.insert_before(self._model.graph[0], cast)
            else:
                self._model.graph.insert_after(producer, cast)
            self._casts[key] = cast.outputs[0]
        return self._casts[key]

    def _constant_as(self, value: onnx_ir.Value, kind: Kind, node: onnx_ir.Node) -> onnx_ir.Value:
        """Return a constant for a user of a kind: a tensor of the checkpoint waits until all its users are known."""
        import onnx_ir

        wide = kind is not Kind.NARROW
        if value.name in self._weights:
            key = (value, Kind.WIDE if wide else Kind.NARROW)
            if not wide:
                self._casts[key] = value
            elif key not in self._casts:
                cast = _cast(value, None, f"{value.name}.wide")
                self._model.graph.insert_before(node, cast)
                self._casts[key] = cast.outputs[0]
            return self._casts[key]
        if wide:
            return value
        key = (value, Kind.NARROW)
        if key not in self._constants:
            array = value.const_value.numpy() if value.const_value else None
            assert array is not None, value.name  # noqa: S101 - an initializer has a value
            tensor = onnx_ir.tensor(clipped(array, self._dtype), name=f"{value.name}.narrow", dtype=self._dtype)
            made = onnx_ir.Value(
                name=tensor.name, shape=value.shape, type=onnx_ir.TensorType(self._dtype), const_value=tensor
            )
            self._model.graph.initializers[tensor.name or ""] = made
            self._constants[key] = made
        return self._constants[key]

    def _settle_weights(self) -> None:
        """Store tensors of the checkpoint that only wide operations take in float32, the others in the narrow dtype."""
        import onnx_ir

        for name in sorted(self._weights):
            value = self._model.graph.initializers[name]
            wide, narrow = self._casts.get((value, Kind.WIDE)), (value, Kind.NARROW) in self._casts
            if wide is not None and not narrow:
                cast = wide.producer()
                assert cast is not None  # noqa: S101 - made by `_constant_as`
                onnx_ir.convenience.replace_all_uses_with(wide, value)
                self._model.graph.remove(cast, safe=True)
                self.wide_weights.add(name)
            else:
                self._set_type(value, Kind.NARROW)
        for value in list(self._model.graph.initializers.values()):
            if not value.uses() and value.name not in self._weights and not value.is_graph_output():
                del self._model.graph.initializers[value.name or ""]

    def _widen_output(self, index: int, value: onnx_ir.Value) -> None:
        import onnx_ir

        cast = _cast(value, None, f"{value.name}.out")
        made, name = cast.outputs[0], value.name
        value.name, made.name = f"{name}.narrow_out", name
        made.shape, made.type = value.shape, onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        self._model.graph.append(cast)
        self._model.graph.outputs[index] = made

    def _set_type(self, value: onnx_ir.Value, kind: Kind) -> None:
        import onnx_ir

        value.type = onnx_ir.TensorType(self._dtype if kind is Kind.NARROW else onnx_ir.DataType.FLOAT)

    def _set_cast(self, node: onnx_ir.Node, kind: Kind) -> None:
        import onnx_ir

        to = self._dtype if kind is Kind.NARROW else onnx_ir.DataType.FLOAT
        node.attributes["to"] = onnx_ir.AttrInt64("to", to)


def without_doubles(model: onnx_ir.Model) -> None:
    """Give float64 tensors float32, since TensorRT has no other."""
    import numpy as np
    import onnx_ir

    double, single = onnx_ir.DataType.DOUBLE, onnx_ir.DataType.FLOAT
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == double:
            tensor = onnx_ir.tensor(value.const_value.numpy().astype(np.float32), name=name)
            value.const_value, value.type = tensor, onnx_ir.TensorType(single)
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type.name == "TENSOR" and attribute.value.dtype == double:
                made = onnx_ir.tensor(attribute.value.numpy().astype(np.float32))
                node.attributes[name] = onnx_ir.AttrTensor(name, made)
        if node.op_type == "Cast" and node.attributes["to"].value == double:
            node.attributes["to"] = onnx_ir.AttrInt64("to", single)
        for value in node.outputs:
            if value.dtype == double:
                value.type = onnx_ir.TensorType(single)


def clipped(array: Mapping[int, float] | object, dtype: onnx_ir.DataType) -> object:
    """Return a float32 array in another dtype, finite values beyond its range at the range's end."""
    import numpy as np

    values = np.asarray(array, dtype=np.float32)
    if dtype.name == "FLOAT16":
        most = float(np.finfo(np.float16).max)
        values = np.where(np.isfinite(values), np.clip(values, -most, most), values)
    return values.astype(dtype.numpy())


def _cast(value: onnx_ir.Value, dtype: onnx_ir.DataType | None, name: str) -> onnx_ir.Node:
    """Return a cast, to float32 unless said."""
    import onnx_ir

    to = onnx_ir.DataType.FLOAT if dtype is None else dtype
    made = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(to))
    return onnx_ir.Node("", "Cast", [value], [onnx_ir.AttrInt64("to", to)], outputs=[made], name=name)


def _is_float(value: onnx_ir.Value) -> bool:
    return value.dtype is not None and value.dtype.name == "FLOAT"


def _scope(node: onnx_ir.Node) -> str:
    """Return the module that a node came from, as it is written there; "" where that isn't known."""
    import ast

    names = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return str(names[-2]) if len(names) > 1 else ""
