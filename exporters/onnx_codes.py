"""Codes of a low-bit format in an ONNX graph: which operators take them, and how they are laid out for each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..weights import Streamed
from .onnx_convolutions import Convolutions
from .onnx_editing import FLOAT, Editor, make_node, products_of, put_behind
from .packing import Packing, nibbles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir
    from torch import Tensor

    from ..quantize.grid import Grid, Grids
    from ..quantize.mixture import Mixture
    from ..weights import Entry

DYNAMIC, STATIC = "w8a8-dynamic", "w8a8"
"""Precisions whose products are of integers: activations are rounded as they come, or with scales that were calibrated."""
_CONTRIB = "com.microsoft"
_LARGEST_BLOCK, _LEAST_BLOCK = 256, 16
"""What ONNX Runtime's block-wise operators take; blocks are powers of two."""
_NF4 = 1
"""ONNX Runtime's number of this kind of codes."""


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
        self._mixture, self._precision, self._activations = mixture, precision, activations
        self._format = mixture.formats[precision]
        self._edit = Editor(model.graph)
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
        if products_of(value) is not None:
            return self._products(value, entry, grids)
        if users == {"Conv"} and self._format.name == "int8":
            return self._convolutions(value, entry, *(grids if self._precision == STATIC and grids else (None, None)))
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
        codes, scales = (self._edit.initializer(tensor) for tensor in streams)
        for node in products_of(value) or []:
            product = make_node(kind, [node.inputs[0], codes, scales], attributes, like=node, domain=_CONTRIB)
            self._edit.replace(node, [product, *_bias(node, product)])
        self._drop_users(value)
        return streams

    def _integer_products(self, value: onnx_ir.Value, entry: Entry, grid: Grid | None) -> list[Streamed]:
        """Put products of integers in the place of the products; without a grid activations get a scale as they come."""
        streams = self._rows(value, entry)
        codes, scales = (self._edit.initializer(tensor) for tensor in streams)
        turned = self._turned(value, codes)
        for node in products_of(value) or []:
            taken = node.inputs[0]
            assert taken is not None  # noqa: S101 - a product has two factors
            new = (
                self._dynamic_product(node, taken, turned, scales)
                if grid is None
                else self._static_product(node, taken, turned, scales, grid)
            )
            self._edit.replace(node, [*new, *_bias(node, new[-1])])
        self._drop_users(value)
        return streams

    def _dynamic_product(
        self, node: onnx_ir.Node, taken: onnx_ir.Value, turned: onnx_ir.Value, scales: onnx_ir.Value
    ) -> list[onnx_ir.Node]:
        """Return MatMulInteger, with one scale for all of an activation: ONNX Runtime fuses it to DynamicQuantizeMatMul."""
        rounding = next((user for user, _ in taken.uses() if user.op_type == "DynamicQuantizeLinear"), None)
        if rounding is None:
            rounding = make_node("DynamicQuantizeLinear", [taken], name=f"{taken.name}.rounded", outputs=3)
            put_behind(self._edit.graph, taken, [rounding])
        values, scale, zero = rounding.outputs
        product = make_node("MatMulInteger", [values, turned, zero], like=node)
        wide = make_node("Cast", product.outputs, {"to": FLOAT}, name=f"{node.name}.float32")
        both = make_node("Mul", [scale, scales], name=f"{node.name}.scale")
        return [product, wide, both, make_node("Mul", [wide.outputs[0], both.outputs[0]], name=f"{node.name}.scaled")]

    def _static_product(
        self, node: onnx_ir.Node, taken: onnx_ir.Value, turned: onnx_ir.Value, scales: onnx_ir.Value, grid: Grid
    ) -> list[onnx_ir.Node]:
        """Return MatMulIntegerToFloat, of an activation rounded as calibrated.

        Not Q/DQ: ONNX Runtime makes a float Gemm of a product with a bias between them. Activations are of unsigned bytes
        around 128: for signed ones its kernel is slower than float32's.
        """
        step, zero = self._edit.numbers(grid.steps), self._edit.codes_of(grid.zeros)
        inputs = [self._edit.rounded(taken, grid, node), turned, step, scales, zero]
        return [make_node("MatMulIntegerToFloat", inputs, like=node, domain=_CONTRIB)]

    def _convolutions(
        self, value: onnx_ir.Value, entry: Entry, before: Grid | None, after: Grid | None
    ) -> list[Streamed]:
        columns = before.steps if before and before.by_channel else None
        over = after.steps if after and after.by_channel else ()
        streams = self._rows(value, entry, columns, over, _biased if before and not after else None)
        codes, scales = (self._edit.initializer(tensor) for tensor in streams)
        convolutions = Convolutions(self._edit, value, codes, scales)
        if before and not after:
            convolutions.with_wide_outputs(before)
        else:
            convolutions.widened(before, after)
        return streams

    def _table(self, value: onnx_ir.Value, entry: Entry) -> list[Streamed] | str:
        """Look rows up in codes: GatherBlockQuantized."""
        rows, width = entry.shape
        block = self._format.group or math.gcd(width, _LARGEST_BLOCK)
        if block < _LEAST_BLOCK:
            return f"rows of {width}, not a multiple of {_LEAST_BLOCK}"
        bits = self._format.bits
        streams = self._blocks(value, entry, [rows, width * bits // 8], [rows, width // block])
        codes, scales = (self._edit.initializer(tensor) for tensor in streams)
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
        for node, _ in list(value.uses()):
            inputs = [codes, node.inputs[1], scales]
            self._edit.replace(
                node, [make_node("GatherBlockQuantized", inputs, attributes, like=node, domain=_CONTRIB)]
            )
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
        self._edit.begin_with(turned)
        return turned.outputs[0]

    def _drop_users(self, value: onnx_ir.Value) -> None:
        """Drop the transposition that nothing takes any more."""
        for node, _ in list(value.uses()):
            self._edit.graph.remove(node, safe=True)


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
