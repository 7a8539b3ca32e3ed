"""Rounded products in an ONNX graph for TensorRT: QuantizeLinear and DequantizeLinear where its rules want them.

From TensorRT's documentation ("Explicit Quantization", "Quantization Schemes", 11.4) and its ONNX parser: symmetric alone,
so zero points are 0; int8 is signed; each input of a product is rounded, and directly before it; what products give isn't
rounded; an activation has one scale, a weight one for each output channel (axis 0) or, for int4, for each 64 inputs; scales
are constants, positive, of the dtype that is computed in; E4M3 takes opset 19, int4 opset 21.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..quantize.fp8 import activation_scale, to_fp8
from ..weights import Streamed, as_bytes, read_rows
from .onnx_editing import products_of, put_behind
from .packing import nibbles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir
    from torch import Tensor

    from ..quantize.format import Format
    from ..quantize.grid import Grids
    from ..weights import Entry

OPSET = 21
"""The first that has int4, and E4M3 with every dtype of scales."""
CODES = {"w8a8": ("I8", "INT8"), "fp8": ("F8_E4M3", "FLOAT8E4M3FN"), "int4": ("U8", "INT4")}
"""Precision -> what its codes are in safetensors and in ONNX."""
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_MOST = {8: 127.0, 4: 7.0}
"""Bits -> the largest code."""
_TORCH = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
_SHORT = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


class Quantizer:
    """Puts codes in the place of weights, and rounds what goes into their products."""

    def __init__(self, model: onnx_ir.Model, dtype: onnx_ir.DataType, activations: Mapping[str, Grids]) -> None:
        """Prepare a graph.

        Args:
            model: typed; is changed.
            dtype: what its products compute in.
            activations: layer -> what its input and its output are rounded to, if that was calibrated.
        """
        self._model, self._dtype, self._activations = model, dtype, activations
        self._rounded: dict[tuple[onnx_ir.Value, str, float], onnx_ir.Value] = {}
        self.rounded_layers: list[str] = []
        """Layers whose products are of codes."""
        model.opset_imports[""] = max(OPSET, model.opset_imports[""])

    def encode(
        self,
        value: onnx_ir.Value,
        entry: Entry,
        precision: str,
        weight_format: Format,
        importance: Tensor | None = None,
    ) -> list[Streamed] | str:
        """Give the products of a weight its codes, which are to be written; or say why they are left as they are.

        `importance` has mean squares (K,) of its inputs, for `Format.pack`.
        """
        obstacle = self._obstacle(value, entry, weight_format)
        if obstacle:
            return obstacle
        products = products_of(value, _CONVOLUTIONS) or []
        layer = entry.name.removesuffix(".weight")
        if weight_format.calibrated:
            scale = self._activations[layer][0].even
            scale = activation_scale(scale) if precision == "fp8" else scale
            for node in products:
                self._round_input(node, precision, scale)
            self.rounded_layers.append(layer)
        return self._weight(value, entry, precision, _Codes(entry, weight_format, self._dtype, importance))

    def _obstacle(self, value: onnx_ir.Value, entry: Entry, weight_format: Format) -> str | None:
        if weight_format.obstacle(entry.shape):
            return weight_format.obstacle(entry.shape)
        products = products_of(value, _CONVOLUTIONS)
        if value.shape is None or tuple(value.shape) != entry.shape:
            return "of another shape in the graph"
        if not products:
            users = {user.op_type for user, _ in value.uses()}
            return f"TensorRT rounds products alone, not {', '.join(sorted(users))}"
        if any(node.op_type == "ConvTranspose" for node in products):
            return "its output channels aren't its first axis"
        if weight_format.calibrated and entry.name.removesuffix(".weight") not in self._activations:
            return "not calibrated, and TensorRT multiplies codes by codes alone"
        return None

    def _round_input(self, node: onnx_ir.Node, name: str, scale: float) -> None:
        """Let a product take codes of what it is given: rounded once for all products that take it alike."""
        import onnx_ir

        taken = node.inputs[0]
        assert taken is not None  # noqa: S101 - a product has two factors
        key = (taken, name, scale)
        if key not in self._rounded:
            step = self._scalar(f"scale.{name}.{scale!r}", scale_up(scale, self._dtype), self._dtype)
            zero = self._scalar(f"zero.{name}", 0.0, onnx_ir.DataType[CODES[name][1]])
            quantize = onnx_ir.Node("", "QuantizeLinear", [taken, step, zero], name=f"{node.name}.rounded")
            quantize.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType[CODES[name][1]])
            back = onnx_ir.Node("", "DequantizeLinear", [quantize.outputs[0], step, zero], name=f"{node.name}.taken")
            back.outputs[0].type = onnx_ir.TensorType(self._dtype)
            for made in (quantize, back):
                made.outputs[0].name, made.outputs[0].shape = made.name, taken.shape
            put_behind(self._model.graph, taken, [quantize, back])
            self._rounded[key] = back.outputs[0]
        node.replace_input_with(0, self._rounded[key])

    def _weight(self, value: onnx_ir.Value, entry: Entry, precision: str, codes: _Codes) -> list[Streamed]:
        """Put DequantizeLinear of codes in a weight's place."""
        import onnx_ir

        stored, kind = CODES[precision]
        weight_format = codes.format
        groups = weight_format.groups(entry.shape)
        scales_shape = [entry.shape[0]] if groups == 1 else [entry.shape[0], groups]
        count = math.prod(entry.shape)
        attributes = [onnx_ir.AttrInt64("axis", 0 if groups == 1 else 1)]
        if groups > 1:
            attributes.append(onnx_ir.AttrInt64("block_size", weight_format.group or 0))
        inputs = [
            self._initializer(f"{value.name}.codes", entry.shape, onnx_ir.DataType[kind]),
            self._initializer(f"{value.name}.scales", scales_shape, self._dtype),
        ]
        wide = onnx_ir.Node("", "DequantizeLinear", inputs, attributes, name=f"{value.name}.taken")
        wide.outputs[0].name = wide.name
        wide.outputs[0].shape, wide.outputs[0].type = value.shape, onnx_ir.TensorType(self._dtype)
        onnx_ir.convenience.replace_all_uses_with(value, wide.outputs[0])
        self._model.graph.insert_before(self._model.graph[0], wide)
        length = count * weight_format.bits // 8
        width = 4 if self._dtype.name == "FLOAT" else 2
        stored_shape = entry.shape if weight_format.bits == 8 else [length]  # noqa: PLR2004 - a byte
        return [
            Streamed(f"{value.name}.codes", stored, stored_shape, length, codes.codes()),
            Streamed(
                f"{value.name}.scales",
                _SHORT[self._dtype.name],
                scales_shape,
                width * math.prod(scales_shape),
                codes.scales(),
            ),
        ]

    def _initializer(self, name: str, shape: object, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        """Add an initializer whose bytes are to come."""
        import onnx_ir

        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))  # type: ignore[arg-type]
        self._model.graph.initializers[name] = value
        return value

    def _scalar(self, name: str, number: float, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        import numpy as np
        import onnx_ir

        if name not in self._model.graph.initializers:
            tensor = onnx_ir.tensor(np.asarray(number, dtype=dtype.numpy()), name=name, dtype=dtype)
            value = onnx_ir.Value(
                name=name, shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(dtype), const_value=tensor
            )
            self._model.graph.initializers[name] = value
        return self._model.graph.initializers[name]


class _Codes:
    """A weight's codes for scales of the dtype that is computed in, made as they are written."""

    def __init__(
        self, entry: Entry, weight_format: Format, dtype: onnx_ir.DataType, importance: Tensor | None = None
    ) -> None:
        self._entry, self.format, self._dtype, self._importance = entry, weight_format, dtype, importance
        self._scales: list[Tensor] = []

    def codes(self) -> Iterator[memoryview]:
        for rows in read_rows(self._entry):
            codes, scales = rounded_rows(rows.float().flatten(1), self.format, self._dtype, self._importance)
            self._scales.append(scales)
            yield as_bytes(nibbles(codes & 15) if self.format.bits == 4 else codes)  # noqa: PLR2004 - half a byte

    def scales(self) -> Iterator[memoryview]:
        for scales in self._scales:
            yield as_bytes(scales.contiguous())


def rounded_rows(
    rows: Tensor, weight_format: Format, dtype: onnx_ir.DataType, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a weight to a format, with scales that the dtype can hold.

    Args:
        rows: (N, K) float32.
        weight_format: gives the scales.
        dtype: of the scales: each becomes the next number that isn't smaller, so that nothing is clipped by it.
        importance: mean squares (K,) of the inputs where they are known.

    Returns:
        Codes (N, K) int8 and scales (N, K / group) in the dtype.
    """
    import torch

    codes, scales = weight_format.pack(rows, importance)
    if dtype.name == "FLOAT" and bool((scales > 0).all()):
        return codes, scales
    # TensorRT's scales are positive: where int4's is negative, so that -8 is the largest value, 7 has to be it instead.
    scales = torch.where(scales < 0, scales * -8 / 7, scales)
    held = _up(scales, getattr(torch, _TORCH[dtype.name]))
    steps = held.float()
    values = rows.unflatten(1, (held.shape[1], -1)) / steps[..., None]
    if weight_format.name == "fp8":
        return to_fp8(values).view(torch.int8).flatten(1), held
    most = _MOST[weight_format.bits]
    least = -most - 1 if weight_format.bits == 4 else -most  # noqa: PLR2004 - int4 goes from -8
    return values.round().clamp(least, most).to(torch.int8).flatten(1), held


def scale_up(scale: float, dtype: onnx_ir.DataType) -> float:
    """Return the smallest number of a dtype that is no smaller than a scale."""
    import torch

    return float(_up(torch.tensor([scale]), getattr(torch, _TORCH[dtype.name])))


def _up(scales: Tensor, dtype: object) -> Tensor:
    import torch

    held = scales.to(dtype)  # type: ignore[call-overload]
    if dtype is torch.float32:
        return held
    raised = (held.view(torch.int16) + 1).view(dtype)
    return torch.where(held.float() < scales, raised, held)
