"""The typed ONNX graph, which computes in what it says: TensorRT builds from it, and ONNX Runtime runs it on GPUs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..weights import Streamed, as_bytes, read_header, read_tensor, sha256, streamed, write_streamed
from .exporter import SCALES
from .layers import by_layer, write_layers
from .onnx import FILE, hollow_graph, layers_of, save, strip
from .onnx_editing import products_of
from .onnx_types import DTYPES, PRODUCTS, Typing, without_doubles
from .onnx_weights import point
from .tensorrt_qdq import CODES, Quantizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx_ir

    from ..weights import Entry
    from .exporter import Subject
    from .onnx_weights import Weights

WEIGHTS = "model.safetensors"
_INLINE_BYTES = 1024
"""Smaller constants stay in the graph."""
_ALIGNMENT = 8
_BF16_OPSET = 22
"""The first whose convolutions and norms may be of bfloat16."""
_ONNX = {
    "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "F8_E4M3": "FLOAT8E4M3FN", "I64": "INT64", "I32": "INT32",
    "I8": "INT8", "U8": "UINT8", "BOOL": "BOOL",
}  # fmt: skip
"""safetensors' dtype -> ONNX's."""
_STORED = {onnx: stored for stored, onnx in _ONNX.items()}
_TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CODES = {"I8": "int8", "F8_E4M3": "fp8", "U8": "int4"}
"""dtype of codes -> the format that they count as."""
_LABELS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "BOOL": "bool"}


@dataclass(frozen=True)
class Graph:
    """What was written: `model.onnx` and its weights."""

    sha256: str
    """Of both files."""
    weight_bytes: Mapping[str, int]
    """As of `Lowered`."""
    kept: Mapping[str, str]
    """As of `Lowered`."""
    products: Mapping[str, str]
    """Matrix product or convolution, by its node's name -> dtype that it is to compute in."""
    weights: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    """Initializer -> tensor of the checkpoint that it is, and whether transposed; codes apart."""


def write_graph(
    subject: Subject, compute: str, folder: Path, *, turned: bool = True, wide_norms: bool = False
) -> Graph:
    """Capture a part, type its graph, round what the recipe rounds, and write it into a folder.

    Args:
        subject: the part.
        compute: `fp32`, `fp16` or `bf16`: what operations that aren't rounded compute in.
        folder: exists.
        turned: write weights of Linear layers transposed, each under its initializer's name, as TensorRT refits them; else
            as the checkpoint has them, under its names.
        wide_norms: norms take and give float32, for a runtime whose sums are as narrow as what they are of.

    Raises:
        LoweringError: the part can't be captured, lowered or typed.
    """
    model, weights = hollow_graph(subject)
    return typed(model, weights, subject, compute, folder, turned=turned, wide_norms=wide_norms)


def typed(
    model: onnx_ir.Model,
    weights: Weights,
    subject: Subject,
    compute: str,
    folder: Path,
    *,
    turned: bool = True,
    wide_norms: bool = False,
) -> Graph:
    """Type a captured graph and write it; as `write_graph`."""
    import onnx_ir

    without_doubles(model)
    wide: set[str] = set(weights.found) if compute == "fp32" else set()
    if compute == "bf16":
        model.opset_imports[""] = max(_BF16_OPSET, model.opset_imports[""])
    if compute != "fp32":
        names = _wide_nodes(model, weights, subject)
        typing = Typing(model, compute, subject.inputs, weights.found.keys(), names, wide_norms=wide_norms).apply()
        wide |= typing.wide_weights
    quantizer = Quantizer(model, onnx_ir.DataType[DTYPES[compute]], subject.activations)
    plain, packed, kept = _pack(model, weights, subject, quantizer)
    turns = {name for name in plain if turned and _turn(model.graph.initializers[name])}
    stored = {name: name for name in plain} if turned else _own_names(plain)
    streams = [
        _streamed(plain[name], stored[name], "fp32" if name in wide else compute, turned=name in turns)
        for name in plain
    ]
    _write(model, streams, packed, stored, folder)
    strip(model)
    write_layers(layers_of(model), subject.checkpoint, folder)
    save(model, folder)
    both = json.dumps([sha256(folder / FILE), sha256(folder / WEIGHTS)]).encode()
    return Graph(
        sha256=_digest(both),
        weight_bytes=_weight_bytes(streams, packed),
        kept=kept,
        products=_products(model),
        weights={name: (entry.name, name in turns) for name, entry in plain.items()},
    )


def _own_names(plain: Mapping[str, Entry]) -> dict[str, str]:
    """Return initializer -> the checkpoint's name of its tensor; its own where another one has that already."""
    first = {plain[name].name: name for name in reversed([*plain])}
    return {name: entry.name if first[entry.name] == name else name for name, entry in plain.items()}


def _wide_nodes(model: onnx_ir.Model, weights: Weights, subject: Subject) -> set[str]:
    """Name the nodes of layers that are to be in float32: what came from them, and what takes their weights elsewhere."""
    layers = {layer for layer, precision in subject.mixture.layers.items() if precision == "fp32"}
    by_path = by_layer(layers_of(model), subject.checkpoint)
    takers = {node.name or "" for node in model.graph if not layers.isdisjoint(_layers_taken(node, weights))}
    return takers.union(*(by_path.get(layer, ()) for layer in layers))


def _layers_taken(node: onnx_ir.Node, weights: Weights) -> Iterator[str]:
    """Yield the layers whose weights a node takes, transposed or not."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        taken = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value
        entry = weights.found.get(taken.name or "") if taken is not None else None
        if entry is not None:
            yield entry.name.removesuffix(".weight")


def _pack(
    model: onnx_ir.Model, weights: Weights, subject: Subject, quantizer: Quantizer
) -> tuple[dict[str, Entry], list[Streamed], dict[str, str]]:
    """Give products codes where the recipe has such; return what stays floats, the codes, and why some stay."""
    plain: dict[str, Entry] = {}
    packed: list[Streamed] = []
    kept: dict[str, str] = {}
    for name, entry in weights.found.items():
        precision, weight_format = subject.mixture.precision_of(entry.name), subject.mixture.format_of(entry.name)
        if weight_format is None or precision not in CODES:
            reason = subject.mixture.obstacle(entry.name, entry.shape)
        else:
            encoded = quantizer.encode(
                model.graph.initializers[name], entry, precision, weight_format, subject.mixture.importance(entry.name)
            )
            if isinstance(encoded, list):
                packed += encoded
                del model.graph.initializers[name]
                continue
            reason = encoded
        plain[name] = entry
        if reason and len(entry.shape) > 1:
            kept[entry.name] = reason
    return plain, packed, kept


def _turn(value: onnx_ir.Value) -> bool:
    """Let products take a weight transposed as it is written, so that TensorRT knows it by its name; say if they do."""
    import onnx_ir

    products = products_of(value)
    transposes = [user for user, _ in value.uses() if user.op_type == "Transpose"]
    if not products or not transposes or any(node.op_type != "MatMul" for node in products):
        return False
    assert value.shape is not None  # noqa: S101 - an initializer has one
    value.shape = onnx_ir.Shape(list(value.shape)[::-1])
    for node in transposes:
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
        assert node.graph is not None  # noqa: S101 - it was found there
        node.graph.remove(node, safe=True)
    return True


def _streamed(entry: Entry, name: str, precision: str, *, turned: bool) -> Streamed:
    """Return a weight as it is written, under its initializer's name."""
    dtype = _TORCH[precision]
    plain = streamed(entry, dtype)
    if not turned:
        return Streamed(name, plain.dtype, plain.shape, plain.length, plain.chunks)
    return Streamed(name, plain.dtype, entry.shape[::-1], plain.length, _transposed(entry, dtype))


def _transposed(entry: Entry, dtype: str) -> Iterator[memoryview]:
    import torch

    yield as_bytes(read_tensor(entry).to(getattr(torch, dtype)).T.contiguous())


def _write(
    model: onnx_ir.Model, plain: list[Streamed], packed: list[Streamed], stored: Mapping[str, str], folder: Path
) -> None:
    """Write all weights and large constants into one file, each at a multiple of its width, and point to them.

    Args:
        model: whose initializers are pointed to it.
        plain: weights that are floats.
        packed: codes and what belongs to them.
        stored: initializer -> the name that its weight has among `plain`.
        folder: exists.
    """
    constants = [
        Streamed(name, _STORED[tensor.dtype.name], list(tensor.shape.numpy()), tensor.nbytes, [tensor.tobytes()])
        for name, value in model.graph.initializers.items()
        if (tensor := value.const_value) is not None and tensor.nbytes >= _INLINE_BYTES and name not in stored
    ]
    floats = sorted([*constants, *plain], key=lambda each: -_width(each))
    codes = [each for each in packed if each.name.endswith(".codes")]
    scales = [each for each in packed if not each.name.endswith(".codes")]
    split = next((index for index, each in enumerate(floats) if _width(each) < 4), len(floats))  # noqa: PLR2004 - bytes
    pad = -sum(each.length for each in codes) % _ALIGNMENT
    padding = [Streamed("padding", "U8", [pad], pad, [bytes(pad)])] if pad else []
    ordered = [*floats[:split], *codes, *padding, *scales, *floats[split:]]
    write_streamed(ordered, folder / WEIGHTS)
    entries = {entry.name: entry for entry in read_header(folder / WEIGHTS)}
    for name, value in model.graph.initializers.items():
        entry = entries.get(stored.get(name, name))
        if entry is not None:
            _point(value, entry, folder)


def _width(tensor: Streamed) -> int:
    return tensor.length // max(1, math.prod(tensor.shape))


def _point(value: onnx_ir.Value, entry: Entry, folder: Path) -> None:
    import onnx_ir

    given = value.dtype
    int4 = given is not None and given.name == "INT4"
    dtype = onnx_ir.DataType.INT4 if int4 else onnx_ir.DataType[_ONNX[entry.dtype]]
    point(value, entry, folder, dtype)


def _weight_bytes(plain: list[Streamed], packed: list[Streamed]) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for each in plain:
        totals[_LABELS.get(each.dtype, each.dtype.lower())] += each.length
    for each in packed:
        totals[_CODES[each.dtype] if each.name.endswith(".codes") else SCALES] += each.length
    return dict(totals)


def _products(model: onnx_ir.Model) -> dict[str, str]:
    """Return each product's node -> the dtype of what it multiplies."""
    found = {}
    for node in model.graph:
        if node.op_type in PRODUCTS and node.name:
            found[node.name] = _multiplied(node)
    return found


def _multiplied(node: onnx_ir.Node) -> str:
    taken = node.inputs[0]
    assert taken is not None  # noqa: S101 - a product has two factors
    producer = taken.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        taken = producer.inputs[0]
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT8": "int8", "FLOAT8E4M3FN": "float8"}
    assert taken.dtype is not None  # noqa: S101 - typed
    return names.get(taken.dtype.name, taken.dtype.name.lower())


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
