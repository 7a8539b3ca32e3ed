"""Codes of a low-bit format in an ONNX graph: which operators take them, and how they are laid out for each."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

from ..weights import Streamed
from .hollow import SOLID_BYTES
from .packing import Packing, nibbles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir
    from torch import Tensor

    from ..quantize.grid import Grid, Grids
    from ..quantize.mixture import Mixture
    from ..weights import Entry

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
DYNAMIC, STATIC = "w8a8-dynamic", "w8a8"
"""Precisions whose products are of integers: activations are rounded as they come, or with scales that were calibrated."""
OWN = "bakeoff."
"""What the names of constants begin with that stand beside codes: steps and zero points."""
_CONTRIB = "com.microsoft"
_LARGEST_BLOCK, _LEAST_BLOCK = 256, 16
"""What ONNX Runtime's block-wise operators take; blocks are powers of two."""
_NF4, _FLOAT = 1, 1
"""Numbers of ONNX Runtime's kind of codes, and of ONNX's dtype."""


class Encoder:
    """Replaces the operators that use a weight by such as take its codes."""

    def __init__(
        self,
        model: onnx_ir.Model,
        mixture: Mixture,
        precision: str,
        activations: Mapping[str, Grids],
    ) -> None:
        """Prepare a graph.

        Args:
            model: is changed.
            mixture: the precision of each weight.
            precision: of those that are encoded here: whether products are of integers.
            activations: layer -> what its input and output are rounded to, for those that were calibrated.
        """
        self._model, self._mixture, self._precision, self._activations = model, mixture, precision, activations
        self._format = mixture.formats[precision]
        self._codes: dict[tuple[onnx_ir.Value, Grid], onnx_ir.Value] = {}
        model.opset_imports[_CONTRIB] = 1

    def encode(self, value: onnx_ir.Value, entry: Entry) -> list[Streamed] | str:
        """Give a weight's users its codes, which are to be written; or say why none take them."""
        assert value.shape is not None  # noqa: S101 - an initializer has one
        same = tuple(value.shape) == entry.shape
        obstacle = self._format.obstacle(entry.shape) or (None if same else "of another shape in the graph")
        if obstacle:
            return obstacle
        users = {user.op_type for user, _ in value.uses()}
        grids = self._activations.get(entry.name.removesuffix(".weight"))
        if _products_of(value) is not None:
            return self._products(value, entry, grids)
        if users == {"Conv"} and self._format.name == "int8":
            before, after = grids if self._precision == STATIC and grids else (None, None)
            if before and not after:
                return self._integer_convolutions(value, entry, before)
            return self._convolutions(value, entry, before, after)
        if users == {"Gather"} and self._format.name != "nf4":
            return self._table(value, entry)
        return f"ONNX Runtime has no {self._format.name} weights for {', '.join(sorted(users))}"

    def _products(self, value: onnx_ir.Value, entry: Entry, grids: Grids | None) -> list[Streamed] | str:
        if self._precision == DYNAMIC:
            return self._integer_products(value, entry, None)
        if self._precision == STATIC and grids:
            return self._integer_products(value, entry, grids[0])
        if math.gcd(entry.shape[1], _LARGEST_BLOCK) < _LEAST_BLOCK:
            return f"{entry.shape[1]} inputs, not a multiple of {_LEAST_BLOCK}"
        return self._wide_products(value, entry)

    def _wide_products(self, value: onnx_ir.Value, entry: Entry) -> list[Streamed]:
        """Put MatMulNBits or MatMulBnb4 in the place of the products: both widen codes as they go."""
        outputs, inputs = entry.shape
        block = self._format.group or math.gcd(inputs, _LARGEST_BLOCK)
        attributes = {"K": inputs, "N": outputs, "block_size": block}
        if self._format.name == "nf4":
            kind, shape, scales_shape = "MatMulBnb4", [outputs * inputs // 2], [outputs * inputs // block]
            attributes["quant_type"] = _NF4
        else:
            bits = self._format.bits
            kind, shape = "MatMulNBits", [outputs, inputs // block, block * bits // 8]
            scales_shape = [outputs, inputs // block]
            attributes |= {"bits": bits, "accuracy_level": 0}
        streams = self._blocks(value, entry, shape, scales_shape)
        codes, scales = (self._initializer(tensor) for tensor in streams)
        for node in _products_of(value) or []:
            product = _node(kind, [node.inputs[0], codes, scales], attributes, like=node, domain=_CONTRIB)
            self._replace(node, [product, *_bias(node, product)])
        self._drop_users(value)
        return streams

    def _integer_products(self, value: onnx_ir.Value, entry: Entry, grid: Grid | None) -> list[Streamed]:
        """Put products of integers in the place of the products; without a grid activations get a scale as they come."""
        streams = self._rows(value, entry)
        codes, scales = (self._initializer(tensor) for tensor in streams)
        turned = self._turned(value, codes)
        for node in _products_of(value) or []:
            taken = node.inputs[0]
            assert taken is not None  # noqa: S101 - a product has two factors
            new = (
                self._dynamic_product(node, taken, turned, scales)
                if grid is None
                else self._static_product(node, taken, turned, scales, grid)
            )
            self._replace(node, [*new, *_bias(node, new[-1])])
        self._drop_users(value)
        return streams

    def _dynamic_product(
        self, node: onnx_ir.Node, taken: onnx_ir.Value, turned: onnx_ir.Value, scales: onnx_ir.Value
    ) -> list[onnx_ir.Node]:
        """Return MatMulInteger, with one scale for all of an activation: ONNX Runtime fuses it to DynamicQuantizeMatMul."""
        rounding = next((user for user, _ in taken.uses() if user.op_type == "DynamicQuantizeLinear"), None)
        if rounding is None:
            rounding = _node("DynamicQuantizeLinear", [taken], name=f"{taken.name}.rounded", outputs=3)
            self._model.graph.insert_before(node, rounding)
        values, scale, zero = rounding.outputs
        product = _node("MatMulInteger", [values, turned, zero], like=node)
        wide = _node("Cast", product.outputs, {"to": _FLOAT}, name=f"{node.name}.float32")
        both = _node("Mul", [scale, scales], name=f"{node.name}.scale")
        return [product, wide, both, _node("Mul", [wide.outputs[0], both.outputs[0]], name=f"{node.name}.scaled")]

    def _static_product(
        self, node: onnx_ir.Node, taken: onnx_ir.Value, turned: onnx_ir.Value, scales: onnx_ir.Value, grid: Grid
    ) -> list[onnx_ir.Node]:
        """Return MatMulIntegerToFloat, of an activation rounded as calibrated.

        Not Q/DQ: ONNX Runtime makes a float Gemm of a product with a bias between them. Activations are of unsigned bytes
        around 128: for signed ones its kernel is slower than float32's.
        """
        step, zero = self._numbers(grid.steps), self._codes_of(grid.zeros)
        inputs = [self._round(taken, grid, node), turned, step, scales, zero]
        return [_node("MatMulIntegerToFloat", inputs, like=node, domain=_CONTRIB)]

    def _integer_convolutions(self, value: onnx_ir.Value, entry: Entry, before: Grid) -> list[Streamed]:
        """Put ConvInteger in the place of the convolutions, and scale what it makes: that stays wide.

        Weights are of unsigned bytes around 128: for signed ones ONNX Runtime has no kernel but a slow one on x86.
        Where channels of the input have steps of their own, these are in the weights.
        """
        streams = self._rows(value, entry, before.steps if before.by_channel else None, encode=_biased)
        codes, scales = (self._initializer(tensor) for tensor in streams)
        if not before.by_channel:
            both = _node("Mul", [scales, self._numbers(before.steps)], name=f"{value.name}.scale")
            self._model.graph.insert_before(self._model.graph[0], both)
            scales = both.outputs[0]
        middle, zero = self._codes_of((0,)), self._codes_of(before.zeros)
        for node in [user for user, _ in value.uses()]:
            taken = node.inputs[0]
            assert taken is not None  # noqa: S101 - a convolution has an input
            product = _node("ConvInteger", [self._round(taken, before, node), codes, zero, middle], like=node)
            product.attributes.update(node.attributes)
            wide = _node("Cast", product.outputs, {"to": _FLOAT}, name=f"{node.name}.float32")
            new = [product, wide, *self._rowwise("Mul", wide, scales, f"{node.name}.scaled")]
            if len(node.inputs) > 2 and node.inputs[2] is not None:  # noqa: PLR2004 - its third is the bias
                new += self._rowwise("Add", new[-1], node.inputs[2], f"{node.name}.bias")
            self._replace(node, new)
        return streams

    def _rowwise(self, kind: str, node: onnx_ir.Node, numbers: onnx_ir.Value, name: str) -> list[onnx_ir.Node]:
        """Return an operation of a convolution's output with a number for each of its channels."""
        import numpy as np

        spread = _node("Unsqueeze", [numbers, self._array(np.array([1, 2]))], name=f"{name}.spread")
        return [spread, _node(kind, [node.outputs[0], spread.outputs[0]], name=name)]

    def _convolutions(
        self, value: onnx_ir.Value, entry: Entry, before: Grid | None, after: Grid | None
    ) -> list[Streamed]:
        """Widen codes as they run; between roundings of what goes in and out ONNX Runtime makes QLinearConv of it.

        Activations are of unsigned bytes: of signed ones ONNX Runtime would make these, with one zero point for all channels.
        QLinearConv takes one step for all of its input, and one for its output. So where channels have steps of their own,
        those of the input are in the weights, and those of the output in the weights' scales and in the bias.

        Each channel of the weight has a zero point of its own: where ONNX Runtime makes weights unsigned, for CPUs without
        VNNI, it would put one number where it then asks for as many as there are scales.
        """
        import numpy as np

        columns = before.steps if before and before.by_channel else None
        over = after.steps if after and after.by_channel else ()
        streams = self._rows(value, entry, columns, over)
        zeros = self._array(np.zeros(entry.shape[0], dtype=np.int8), f"{OWN}{value.name}.zeros")
        inputs = [*(self._initializer(tensor) for tensor in streams), zeros]
        wide = _node("DequantizeLinear", inputs, {"axis": 0}, name=f"{value.name}.float32")
        users = [user for user, _ in value.uses()]
        value.replace_all_uses_with(wide.outputs[0])
        self._model.graph.insert_before(self._model.graph[0], wide)
        for user in users:
            if before:
                self._take_rounded(user, before)
            if after:
                self._give_rounded(user, after)
        return streams

    def _take_rounded(self, node: onnx_ir.Node, grid: Grid) -> None:
        """Round what a convolution takes first; the steps of channels are left to its weights."""
        taken = node.inputs[0]
        assert taken is not None  # noqa: S101 - a convolution has an input
        step = self._numbers((1.0,) if grid.by_channel else grid.steps)
        zero = self._codes_of(grid.zeros)
        values = self._round(taken, grid, node)
        wide = _node("DequantizeLinear", [values, step, zero], name=f"{node.name}.given")
        self._model.graph.insert_before(node, wide)
        node.replace_input_with(0, wide.outputs[0])

    def _give_rounded(self, node: onnx_ir.Node, grid: Grid) -> None:
        """Round what a convolution gives; with steps for channels its weights make it of steps, and its bias begins at nought's code."""
        given = node.outputs[0]
        steps, zero = self._numbers(grid.steps), self._codes_of((0,) if grid.by_channel else grid.zeros)
        if grid.by_channel:
            self._give_bias(node, grid)
        step = self._numbers((1.0,)) if grid.by_channel else steps
        rounded = _node("QuantizeLinear", [given, step, zero], name=f"{node.name}.rounded")
        zeros = self._codes_of((0,) * len(grid.steps)) if grid.by_channel else zero
        behind = [rounded.outputs[0], steps, zeros]
        new = [rounded, _node("DequantizeLinear", behind, {"axis": 1}, name=f"{node.name}.made")]
        if grid.by_channel:
            new.append(_node("Add", [new[-1].outputs[0], self._noughts(grid)], name=f"{node.name}.around"))
        made = new[-1].outputs[0]
        made.shape, made.type = given.shape, given.type
        if given.is_graph_output():
            made.name, given.name = given.name, f"{node.name}.steps"
        given.replace_all_uses_with(made, replace_graph_outputs=True)
        rounded.replace_input_with(0, given)
        self._model.graph.insert_after(node, new)

    def _noughts(self, grid: Grid) -> onnx_ir.Value:
        """Return what is added to codes times steps, so that nought's code is nought.

        Not zero points: what has them for each channel ONNX Runtime fuses with what comes behind, and then refuses to run.
        """
        import numpy as np

        noughts = -np.asarray(grid.zeros, dtype=np.float32) * np.asarray(grid.steps, dtype=np.float32)
        return self._array(noughts.reshape(1, -1, 1, 1))

    def _give_bias(self, node: onnx_ir.Node, grid: Grid) -> None:
        """Let a convolution's bias be in its output's codes."""
        import numpy as np

        bias: Any = np.asarray(grid.zeros, dtype=np.float32)
        if len(node.inputs) > 2 and node.inputs[2] is not None:  # noqa: PLR2004 - its third is the bias
            old = node.inputs[2].const_value
            assert old is not None and old.nbytes < SOLID_BYTES  # noqa: S101, PT018 - larger ones are hollow
            bias = bias + old.numpy().astype(np.float32) / np.asarray(grid.steps, dtype=np.float32)
        made = self._array(bias, f"{node.name}.bias")
        node.resize_inputs(3)
        node.replace_input_with(2, made)

    def _round(self, value: onnx_ir.Value, grid: Grid, before: onnx_ir.Node) -> onnx_ir.Value:
        """Return an activation's codes: rounded once for all that take it on this grid."""
        key = (value, grid)
        if key not in self._codes:
            zeros = grid.zeros * len(grid.steps) if len(grid.zeros) == 1 else grid.zeros
            inputs = [value, self._numbers(grid.steps), self._codes_of(zeros)]
            node = _node("QuantizeLinear", inputs, {"axis": 1} if grid.by_channel else {}, name=f"{before.name}.taken")
            self._model.graph.insert_before(before, node)
            self._codes[key] = node.outputs[0]
        return self._codes[key]

    def _table(self, value: onnx_ir.Value, entry: Entry) -> list[Streamed] | str:
        """Look rows up in codes: GatherBlockQuantized."""
        rows, width = entry.shape
        block = self._format.group or math.gcd(width, _LARGEST_BLOCK)
        if block < _LEAST_BLOCK:
            return f"rows of {width}, not a multiple of {_LEAST_BLOCK}"
        bits = self._format.bits
        streams = self._blocks(value, entry, [rows, width * bits // 8], [rows, width // block])
        codes, scales = (self._initializer(tensor) for tensor in streams)
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
        for node, _ in list(value.uses()):
            inputs = [codes, node.inputs[1], scales]
            self._replace(node, [_node("GatherBlockQuantized", inputs, attributes, like=node, domain=_CONTRIB)])
        return streams

    def _rows(
        self,
        value: onnx_ir.Value,
        entry: Entry,
        columns: Sequence[float] | None = None,
        over: Sequence[float] = (),
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Streamed]:
        """Return codes as bytes in the weight's shape, signed unless `encode` changes them, and a scale for each output channel.

        Args:
            value: the weight.
            entry: the same in the checkpoint.
            columns: factors of the inputs' weights.
            over: what the output channels' scales are divided by.
            encode: signed codes to unsigned ones.
        """
        packing = Packing(self._format, entry, columns, self._mixture.importance(entry.name))
        count = math.prod(entry.shape)
        return [
            Streamed(
                f"{value.name}.codes", "U8" if encode else "I8", entry.shape, count, packing.codes(encode or _as_it_is)
            ),
            Streamed(f"{value.name}.scales", "F32", [entry.shape[0]], 4 * entry.shape[0], packing.scales(over=over)),
        ]

    def _blocks(
        self, value: onnx_ir.Value, entry: Entry, shape: Sequence[int], scales_shape: Sequence[int]
    ) -> list[Streamed]:
        """Return codes as unsigned bytes in the layout of ONNX Runtime's block-wise operators, and their scales."""
        packing = Packing(self._format, entry, importance=self._mixture.importance(entry.name))
        groups = math.prod(scales_shape)
        repeats = groups // (entry.shape[0] * self._format.groups(entry.shape))
        encode = _ENCODE[self._format.name]
        return [
            Streamed(f"{value.name}.codes", "U8", shape, math.prod(shape), packing.codes(encode)),
            Streamed(f"{value.name}.scales", "F32", scales_shape, 4 * groups, packing.scales(repeats)),
        ]

    def _turned(self, value: onnx_ir.Value, codes: onnx_ir.Value) -> onnx_ir.Value:
        """Return codes (N, K) as (K, N): ONNX Runtime does it once, when it loads."""
        import onnx_ir

        perm = [onnx_ir.AttrInt64s("perm", [1, 0])]
        turned = onnx_ir.Node("", "Transpose", [codes], perm, name=f"{value.name}.turned")
        self._model.graph.insert_before(self._model.graph[0], turned)
        return turned.outputs[0]

    def _initializer(self, tensor: Streamed) -> onnx_ir.Value:
        """Add an initializer whose bytes are to come."""
        import onnx_ir

        dtype = onnx_ir.DataType[DTYPES[tensor.dtype]]
        value = onnx_ir.Value(name=tensor.name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(dtype))
        self._model.graph.initializers[tensor.name] = value
        return value

    def _numbers(self, numbers: Sequence[float]) -> onnx_ir.Value:
        """Return a constant of float32: a number, or one a channel."""
        import numpy as np

        return self._array(np.asarray(numbers if len(numbers) > 1 else numbers[0], dtype=np.float32))

    def _codes_of(self, zeros: Sequence[int]) -> onnx_ir.Value:
        """Return a constant of codes, as unsigned bytes: larger by 128."""
        import numpy as np

        codes = np.asarray(zeros if len(zeros) > 1 else zeros[0])
        return self._array((codes + 128).astype(np.uint8))

    def _array(self, array: Any, name: str | None = None) -> onnx_ir.Value:  # noqa: ANN401 - NumPy's
        """Return an initializer with these values; the same one for the same values, unless it is named."""
        import onnx_ir

        name = name or f"{OWN}{array.dtype}.{hashlib.sha256(array.tobytes()).hexdigest()[:16] if array.ndim else array}"
        if name not in self._model.graph.initializers:
            tensor = onnx_ir.tensor(array, name=name)
            shape, dtype = onnx_ir.Shape(array.shape), onnx_ir.TensorType(tensor.dtype)
            self._model.graph.initializers[name] = onnx_ir.Value(name=name, shape=shape, type=dtype, const_value=tensor)
        return self._model.graph.initializers[name]

    def _replace(self, node: onnx_ir.Node, new: list[onnx_ir.Node]) -> None:
        import onnx_ir

        output, made = node.outputs[0], new[-1].outputs[0]
        made.shape, made.type = output.shape, output.type
        onnx_ir.convenience.replace_nodes_and_values(self._model.graph, node, [node], new, [output], [made])

    def _drop_users(self, value: onnx_ir.Value) -> None:
        """Drop the transposition that nothing takes any more."""
        for node, _ in list(value.uses()):
            self._model.graph.remove(node, safe=True)


def _node(
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


def _products_of(value: onnx_ir.Value) -> list[onnx_ir.Node] | None:
    """Return the matrix products that an initializer (N, K) is the transposed second factor of; None if it does more."""
    products: list[onnx_ir.Node] = []
    for user, index in value.uses():
        if user.op_type == "Gemm" and index == 1 and _is_plain_gemm(user):
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
    defaults = {"transB": 0, "transA": 0, "alpha": 1.0, "beta": 1.0}
    return {**defaults, **{name: attribute.value for name, attribute in node.attributes.items()}} == wanted


def _bias(gemm: onnx_ir.Node, product: onnx_ir.Node) -> list[onnx_ir.Node]:
    """Return the addition of a Gemm's bias to what its product became."""
    import onnx_ir

    if gemm.op_type != "Gemm" or len(gemm.inputs) < 3:  # noqa: PLR2004 - its third is the bias
        return []
    return [onnx_ir.Node("", "Add", [product.outputs[0], gemm.inputs[2]], name=f"{gemm.name}.bias")]


def _as_it_is(codes: Tensor) -> Tensor:
    return codes


def _biased(codes: Tensor) -> Tensor:
    import torch

    return (codes.int() + 128).to(torch.uint8)


_ENCODE: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": _biased,
    "int4": lambda codes: nibbles(codes + 8),
    "nf4": lambda codes: nibbles(codes, high_first=True),
}
