"""The weights of an ONNX graph: the checkpoint's own bytes, converted ones, or codes of a low-bit format."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..weights import Streamed, as_bytes, place, read_header, streamed, write_entries, write_streamed
from .packing import Packing, nibbles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import onnx_ir
    from torch import Tensor

    from ..quantize.format import Format
    from ..weights import Entry
    from .exporter import Subject
    from .hollow import Hollow

STORAGE = {"fp32": "float32"}
"""Precision -> torch dtype of the weights that aren't codes; bfloat16 unless said."""
FILE = "model.safetensors"
DYNAMIC = "w8a8-dynamic"
"""The precision whose products are of integers: activations are rounded as they come."""
_INLINE_BYTES = 1024
"""Smaller constants stay in the graph."""
_WIDENED = ("BF16", "F16")
_DTYPES = {
    "F32": "FLOAT",
    "F16": "FLOAT16",
    "BF16": "BFLOAT16",
    "I64": "INT64",
    "I32": "INT32",
    "U8": "UINT8",
    "I8": "INT8",
}
_CONTRIB = "com.microsoft"
_LARGEST_BLOCK, _LEAST_BLOCK = 256, 16
"""What ONNX Runtime's block-wise operators take; blocks are powers of two."""
_NF4 = 1


@dataclass(frozen=True)
class Weights:
    """A graph's large initializers, by name: tensors of the checkpoint, and what the lowering made itself."""

    found: dict[str, Entry]
    made: dict[str, Tensor]

    @classmethod
    def of(cls, model: onnx_ir.Model, hollow: Hollow) -> Weights:
        weights = cls({}, {})
        for name, value in model.graph.initializers.items():
            tensor = _torch_tensor(value)
            if tensor is None or tensor.numel() * tensor.element_size() < _INLINE_BYTES:
                continue
            entry = hollow.entry_of(as_bytes(tensor))
            if entry is None:
                weights.made[name] = tensor
            else:
                weights.found[name] = entry
        return weights


@dataclass
class Brought:
    """How weights came into the folder."""

    how: str
    kept: dict[str, str] = field(default_factory=dict)
    """Weight that the recipe's low-bit format left as it is -> why."""


def storage(precision: str) -> str:
    return STORAGE.get(precision, "bfloat16")


def bring(model: onnx_ir.Model, weights: Weights, subject: Subject, folder: Path) -> Brought:
    """Point initializers into safetensors files in the folder, the checkpoint's own where nothing changes."""
    if subject.weight_format is None:
        how, moved = _place(weights.found, subject, folder)
        brought = Brought(how)
    else:
        dynamic = subject.precision == DYNAMIC
        brought, moved = _pack(model, weights.found, subject.weight_format, folder, dynamic=dynamic)
    for name, entry in moved.items():
        value = model.graph.initializers[name]
        _point(value, entry, folder)
        if entry.dtype in _WIDENED:
            _widen(model, value)
    if weights.made:
        _write_made(model, weights.made, folder)
    return brought


def weight_bytes(model: onnx_ir.Model, weight_format: Format | None) -> dict[str, int]:
    """Sum the initializers' bytes by dtype; codes count under their format's name."""
    totals: dict[str, int] = defaultdict(int)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            codes = weight_format is not None and name.endswith(".codes")
            dtype = weight_format.name if weight_format and codes else str(value.const_value.dtype.numpy())
            totals[dtype] += value.const_value.nbytes
    return dict(totals)


def _torch_tensor(value: onnx_ir.Value) -> Tensor | None:
    import torch

    constant = value.const_value
    if constant is None:
        return None
    raw = constant.raw
    if isinstance(raw, torch.Tensor):
        return raw.detach().contiguous()
    return torch.from_numpy(constant.numpy().copy())


def _place(found: dict[str, Entry], subject: Subject, folder: Path) -> tuple[str, dict[str, Entry]]:
    """Bring the checkpoint's tensors into the folder; return how, and where each initializer's bytes lie now."""
    dtype = storage(subject.precision)
    used = {entry.name: entry for entry in found.values()}
    if not used:
        return "written", {}
    if subject.weights == "copy" or not subject.checkpoint.is_in(dtype):
        written = write_entries(used.values(), folder / FILE, dtype)
        how = "copied" if subject.checkpoint.is_in(dtype) else "written"
        return how, {name: written[entry.name] for name, entry in found.items()}
    how = min(place(file, folder / file.name, subject.weights) for file in {entry.file for entry in used.values()})
    return how, {name: replace(entry, file=folder / entry.file.name) for name, entry in found.items()}


def _point(value: onnx_ir.Value, entry: Entry, folder: Path) -> None:
    import onnx_ir

    dtype = onnx_ir.DataType[_DTYPES[entry.dtype]]
    assert value.shape is not None  # noqa: S101 - an initializer has one
    value.const_value = onnx_ir.ExternalTensor(
        location=entry.file.name,
        offset=entry.offset,
        length=entry.length,
        dtype=dtype,
        shape=value.shape,
        name=value.name or entry.name,
        base_dir=folder,
    )
    value.type = onnx_ir.TensorType(dtype)


def _widen(model: onnx_ir.Model, value: onnx_ir.Value) -> None:
    """Let an initializer's users have it in float32."""
    import onnx_ir

    wide = onnx_ir.Value(
        name=f"{value.name}.float32", shape=value.shape, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )
    onnx_ir.convenience.replace_all_uses_with(value, wide)
    to = onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT)
    model.graph.insert_before(model.graph[0], onnx_ir.Node("", "Cast", [value], [to], outputs=[wide]))


def _write_made(model: onnx_ir.Model, made: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    file = folder / "constants.safetensors"
    save_file(made, file)
    for entry in read_header(file):
        _point(model.graph.initializers[entry.name], entry, folder)


def _pack(
    model: onnx_ir.Model, found: dict[str, Entry], weight_format: Format, folder: Path, *, dynamic: bool
) -> tuple[Brought, dict[str, Entry]]:
    """Write codes for what the format and the graph allow, the rest in bfloat16; return where the rest lies."""
    model.opset_imports[_CONTRIB] = 1
    brought = Brought("written")
    packed: list[tuple[Streamed, Streamed]] = []
    plain: dict[str, Entry] = {}
    for name, entry in found.items():
        value = model.graph.initializers[name]
        use = _use(value, entry, weight_format)
        if dynamic and use is _pack_products:
            use = _pack_integer_products
        if isinstance(use, str):
            plain[name] = entry
            if len(entry.shape) > 1:
                brought.kept[entry.name] = use
        else:
            packed.append(use(model, value, entry, weight_format))
            del model.graph.initializers[name]
    rest = {entry.name: streamed(entry, "bfloat16") for entry in plain.values()}
    written = write_streamed([tensor for pair in packed for tensor in pair] + list(rest.values()), folder / FILE)
    for pair in packed:
        for tensor in pair:
            _point(model.graph.initializers[tensor.name], written[tensor.name], folder)
    return brought, {name: written[entry.name] for name, entry in plain.items()}


def _use(value: onnx_ir.Value, entry: Entry, weight_format: Format) -> Packer | str:
    """Return what packs a weight for the operators that use it, or why none does."""
    obstacle = weight_format.obstacle(entry.shape)
    if obstacle:
        return obstacle
    assert value.shape is not None  # noqa: S101 - an initializer has one
    if tuple(value.shape) != entry.shape:
        return "of another shape in the graph"
    users = {user.op_type for user, _ in value.uses()}
    if _products(value) is not None and math.gcd(entry.shape[1], _LARGEST_BLOCK) >= _LEAST_BLOCK:
        return _pack_products
    if users == {"Conv"} and weight_format.name == "int8":
        return _pack_convolutions
    if users == {"Gather"} and weight_format.name != "nf4":
        return _pack_table
    return f"ONNX Runtime has no {weight_format.name} weights for {', '.join(sorted(users))}"


def _products(value: onnx_ir.Value) -> list[onnx_ir.Node] | None:
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


def _pack_products(
    model: onnx_ir.Model, value: onnx_ir.Value, entry: Entry, weight_format: Format
) -> tuple[Streamed, Streamed]:
    """Put MatMulNBits or MatMulBnb4 in the place of the products; the biases of Gemm are added behind."""
    import onnx_ir

    outputs, inputs = entry.shape
    block = weight_format.group or math.gcd(inputs, _LARGEST_BLOCK)
    attributes = {"K": inputs, "N": outputs, "block_size": block}
    if weight_format.name == "nf4":
        kind, shape, scales_shape = "MatMulBnb4", [outputs * inputs // 2], [outputs * inputs // block]
        attributes["quant_type"] = _NF4
    else:
        bits = weight_format.bits
        kind, shape = "MatMulNBits", [outputs, inputs // block, block * bits // 8]
        scales_shape = [outputs, inputs // block]
        attributes |= {"bits": bits, "accuracy_level": 0}
    streams = _streams(entry, value, weight_format, shape, scales_shape)
    codes, scales = (_initializer(model, tensor) for tensor in streams)
    for node in _products(value) or []:
        product = onnx_ir.Node(
            _CONTRIB,
            kind,
            [node.inputs[0], codes, scales],
            [onnx_ir.AttrInt64(name, number) for name, number in attributes.items()],
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        _replace(model, node, [product, *_bias(node, product)])
    for node, _ in value.uses():
        model.graph.remove(node, safe=True)
    return streams


def _pack_integer_products(
    model: onnx_ir.Model, value: onnx_ir.Value, entry: Entry, weight_format: Format
) -> tuple[Streamed, Streamed]:
    """Put MatMulInteger in the place of the products, with one scale for all of an activation, found as it comes.

    ONNX Runtime fuses these nodes to DynamicQuantizeMatMul.
    """
    import onnx_ir

    packing = Packing(weight_format, entry)
    streams = (
        Streamed(f"{value.name}.codes", "I8", entry.shape, math.prod(entry.shape), packing.codes(lambda codes: codes)),
        Streamed(f"{value.name}.scales", "F32", [entry.shape[0]], 4 * entry.shape[0], packing.scales()),
    )
    codes, scales = (_initializer(model, tensor) for tensor in streams)
    turned = onnx_ir.Node("", "Transpose", [codes], [onnx_ir.AttrInt64s("perm", [1, 0])], name=f"{value.name}.turned")
    model.graph.insert_before(model.graph[0], turned)
    float32 = [onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT)]
    for node in _products(value) or []:
        taken = node.inputs[0]
        assert taken is not None  # noqa: S101 - a product has two factors
        rounded = _rounded(model, taken, node)
        product = onnx_ir.Node(
            "",
            "MatMulInteger",
            [rounded.outputs[0], turned.outputs[0], rounded.outputs[2]],
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        wide = onnx_ir.Node("", "Cast", [product.outputs[0]], float32, name=f"{node.name}.float32")
        scale = onnx_ir.Node("", "Mul", [rounded.outputs[1], scales], name=f"{node.name}.scale")
        scaled = onnx_ir.Node("", "Mul", [wide.outputs[0], scale.outputs[0]], name=f"{node.name}.scaled")
        _replace(model, node, [product, wide, scale, scaled, *_bias(node, scaled)])
    for node, _ in value.uses():
        model.graph.remove(node, safe=True)
    return streams


def _rounded(model: onnx_ir.Model, value: onnx_ir.Value, before: onnx_ir.Node) -> onnx_ir.Node:
    """Return the node that rounds an activation to 8 bits: one for all products that take it."""
    import onnx_ir

    found = next((user for user, _ in value.uses() if user.op_type == "DynamicQuantizeLinear"), None)
    if found is None:
        found = onnx_ir.Node("", "DynamicQuantizeLinear", [value], num_outputs=3, name=f"{value.name}.rounded")
        model.graph.insert_before(before, found)
    return found


def _bias(gemm: onnx_ir.Node, product: onnx_ir.Node) -> list[onnx_ir.Node]:
    """Return the addition of a Gemm's bias to what its product became."""
    import onnx_ir

    if gemm.op_type != "Gemm" or len(gemm.inputs) < 3:  # noqa: PLR2004 - its third is the bias
        return []
    return [onnx_ir.Node("", "Add", [product.outputs[0], gemm.inputs[2]], name=f"{gemm.name}.bias")]


def _pack_convolutions(
    model: onnx_ir.Model, value: onnx_ir.Value, entry: Entry, weight_format: Format
) -> tuple[Streamed, Streamed]:
    """Widen codes as they run: ONNX Runtime's own weight-only operators are for matrices."""
    import onnx_ir

    packing = Packing(weight_format, entry)
    count = math.prod(entry.shape)
    names = f"{value.name}.codes", f"{value.name}.scales"
    streams = (
        Streamed(names[0], "I8", entry.shape, count, packing.codes(lambda codes: codes)),
        Streamed(names[1], "F32", [entry.shape[0]], 4 * entry.shape[0], packing.scales()),
    )
    inputs = [_initializer(model, tensor) for tensor in streams]
    node = onnx_ir.Node("", "DequantizeLinear", inputs, [onnx_ir.AttrInt64("axis", 0)], name=f"{value.name}.float32")
    onnx_ir.convenience.replace_all_uses_with(value, node.outputs[0])
    model.graph.insert_before(model.graph[0], node)
    return streams


def _pack_table(
    model: onnx_ir.Model, value: onnx_ir.Value, entry: Entry, weight_format: Format
) -> tuple[Streamed, Streamed]:
    """Look rows up in codes: GatherBlockQuantized."""
    import onnx_ir

    rows, width = entry.shape
    block = weight_format.group or math.gcd(width, _LARGEST_BLOCK)
    streams = _streams(entry, value, weight_format, [rows, width * weight_format.bits // 8], [rows, width // block])
    inputs = [_initializer(model, tensor) for tensor in streams]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": weight_format.bits}
    for node, _ in list(value.uses()):
        gather = onnx_ir.Node(
            _CONTRIB,
            "GatherBlockQuantized",
            [inputs[0], node.inputs[1], inputs[1]],
            [onnx_ir.AttrInt64(name, number) for name, number in attributes.items()],
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        _replace(model, node, [gather])
    return streams


def _streams(
    entry: Entry, value: onnx_ir.Value, weight_format: Format, shape: Sequence[int], scales_shape: Sequence[int]
) -> tuple[Streamed, Streamed]:
    """Return codes as unsigned bytes in the layout of ONNX Runtime's block-wise operators, and their scales."""
    packing = Packing(weight_format, entry)
    groups = math.prod(scales_shape)
    repeats = groups // (entry.shape[0] * weight_format.groups(entry.shape))
    return (
        Streamed(f"{value.name}.codes", "U8", shape, math.prod(shape), packing.codes(_ENCODE[weight_format.name])),
        Streamed(f"{value.name}.scales", "F32", scales_shape, 4 * groups, packing.scales(repeats)),
    )


def _biased(codes: Tensor) -> Tensor:
    import torch

    return (codes.int() + 128).to(torch.uint8)


_ENCODE: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": _biased,
    "int4": lambda codes: nibbles(codes + 8),
    "nf4": lambda codes: nibbles(codes, high_first=True),
}


def _initializer(model: onnx_ir.Model, tensor: Streamed) -> onnx_ir.Value:
    import onnx_ir

    dtype = onnx_ir.DataType[_DTYPES[tensor.dtype]]
    value = onnx_ir.Value(name=tensor.name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(dtype))
    model.graph.initializers[tensor.name] = value
    return value


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, new: list[onnx_ir.Node]) -> None:
    import onnx_ir

    output = node.outputs[0]
    new[-1].outputs[0].shape, new[-1].outputs[0].type = output.shape, output.type
    onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, [output], [new[-1].outputs[0]])


if TYPE_CHECKING:
    Packer = Callable[[onnx_ir.Model, onnx_ir.Value, Entry, Format], tuple[Streamed, Streamed]]
