"""What an engine really runs, from TensorRT's inspector, compared with what the recipe asked for."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_DTYPES = {
    "float": "float32", "fp32": "float32", "float32": "float32", "half": "float16", "fp16": "float16", "float16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16", "int8": "int8", "fp8": "float8", "float8": "float8", "int4": "int4",
    "fp4": "float4", "int32": "int32", "int64": "int64", "bool": "bool", "uint8": "uint8",
}  # fmt: skip
_KINDS = ("fp8", "fp4", "int4")
"""Beginnings of dtypes that come with their layout: FP8E4M3."""
_MOVES = {"Reformat", "NoOp", "Constant", "Shuffle", "Slice", "Copy", "Quantize", "Dequantize", "Cast"}
"""Layers that multiply nothing, whatever nodes they are named after."""
_PRODUCTS = re.compile("gemm|conv(?!ert)|matmul|matrix|fc|mha|attention|einsum", re.IGNORECASE)
"""In the types of layers that multiply; others may name a product, too, whose bias they add."""
_FACTORS = {"float32", "float16", "bfloat16", "int8", "float8", "int4"}
_NARROW = {"int8", "float8"}
"""dtypes that weights may have, and what they are multiplied by not."""
_ROUNDED = "{}.rounded"
"""Name of the node that rounds what a product is given."""
_UNDECIDED = "undecided"
_NAMES = re.compile(r"[\w.]+")
"""Names of nodes, in a text of several."""


@dataclass
class Inspection:
    """What was read back."""

    layers: int = 0
    """Of the engine: as many as are left of the graph's nodes once they are fused."""
    kinds: dict[str, int] = field(default_factory=dict)
    """The engine's own types of layers -> how many."""
    precision: dict[str, int] = field(default_factory=dict)
    """dtype -> how many of the recipe's products run in it."""
    other: dict[str, str] = field(default_factory=dict)
    """Product that runs in another dtype than the recipe says -> which, and which was asked for."""
    unseen: list[str] = field(default_factory=list)
    """Products that no layer of the engine names: fused away under another name, or folded."""
    undecided: list[str] = field(default_factory=list)
    """Products whose layer takes narrow and wide numbers, and doesn't tell which of them it multiplies."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "other_precision": self.other,
            "fusion": {
                "layers": self.layers,
                "kinds": self.kinds,
                "unseen_products": len(self.unseen),
                "undecided_products": len(self.undecided),
            },
        }


def inspect(texts: Sequence[str], products: Mapping[str, str]) -> Inspection:
    """Read the inspector's JSON.

    Args:
        texts: of `get_engine_information`, of an engine built with detailed verbosity, with a context in each profile.
        products: node -> dtype that it is to compute in.
    """
    read = [[layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)] for text in texts]
    found = Inspection(len(read[0]), dict(Counter(str(layer.get("LayerType", "?")) for layer in read[0])))
    owners = [_owners(layers) for layers in read]
    for node, wanted in products.items():
        ran = _least_wanted({_ran(node, each.get(node, ()), products) for each in owners}, wanted)
        if ran is None:
            found.unseen.append(node)
        elif ran == _UNDECIDED:
            found.undecided.append(node)
        else:
            found.precision[ran] = found.precision.get(ran, 0) + 1
            if ran != wanted:
                found.other[node] = f"{ran}, asked for {wanted}"
    return found


def refuse_another_precision(part: str, found: Inspection, products: Mapping[str, str]) -> None:
    """Raise if no product of a part runs in what the recipe mostly asks for, though it is known what most run in.

    Raises:
        ArtifactError: naming both.
    """
    if not products or sum(found.precision.values()) <= len(found.undecided):
        return
    asked = Counter(products.values()).most_common(1)[0][0]
    if asked not in found.precision:
        ran = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(found.precision.items()))
        message = f"{part} was to compute in {asked}, but its engine has its products {ran}"
        raise ArtifactError(
            message, fix="export it again; if it stays so, this GPU has no such kernels: another precision"
        )


def _owners(layers: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return node -> the layers that it went into, which name it in their name or metadata."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        if layer.get("LayerType") not in _MOVES:
            for name in _named(layer):
                found[name].append(layer)
    return found


def _ran(node: str, owners: Sequence[Mapping[str, Any]], products: Mapping[str, str]) -> str | None:
    """Return the dtype that a product's layers multiply in, as far as they tell; None where none does."""
    multiply = [layer for layer in owners if _PRODUCTS.search(str(layer.get("LayerType", "")))] or owners
    found = {_multiplied(node, layer, products) for layer in multiply} - {None}
    return _least_wanted(found or {None}, products[node])


def _least_wanted(found: set[str | None], wanted: str) -> str | None:
    """Return, of what layers or profiles run in, another dtype than the wanted one; else what isn't decided, or isn't seen."""
    others = sorted(dtype for dtype in found if dtype not in {wanted, _UNDECIDED, None})
    return next((each for each in (*others, _UNDECIDED, None) if each in found), wanted)


def _multiplied(node: str, layer: Mapping[str, Any], products: Mapping[str, str]) -> str | None:
    """Return the dtype in which a layer takes what it multiplies; None where it says nothing of floats and codes.

    A layer of codes may take wide numbers that it adds or scales by, one of wide numbers weights that are codes: it has to
    take more codes than it has products, or to round what it is given itself.
    """
    wanted = products[node]
    inputs = [(tensor, dtype_of(tensor)) for tensor in layer.get("Inputs", ()) if isinstance(tensor, dict)]
    inputs = [(tensor, dtype) for tensor, dtype in inputs if dtype in _FACTORS]
    codes = sum(dtype == wanted for _, dtype in inputs)
    if not codes:
        return inputs[0][1] if inputs else None
    if wanted not in _NARROW or all(dtype == wanted or _is_scale(tensor) for tensor, dtype in inputs):
        return wanted
    named = _named(layer)
    return wanted if codes > len(named & products.keys()) or _ROUNDED.format(node) in named else _UNDECIDED


def _is_scale(tensor: Mapping[str, Any]) -> bool:
    """Say whether an input is one number, or one a channel; one whose dimensions aren't told may be anything."""
    sizes = tensor.get("Dimensions")
    return isinstance(sizes, list) and (len(sizes) <= 1 or (sizes[-1] == 1 and sum(size != 1 for size in sizes) <= 1))


def _named(layer: Mapping[str, Any]) -> set[str]:
    """Return all names in a layer's own and its metadata."""
    return {*_NAMES.findall(f"{layer.get('Metadata', '')} {layer.get('Name', '')}")}


def dtype_of(tensor: Mapping[str, Any]) -> str:
    """Return a tensor's dtype in torch's spelling: TensorRT 11 has `DataType` or `Datatype` beside `Format`, 10 one field."""
    stated = str(tensor.get("DataType") or tensor.get("Datatype") or "").lower()
    if stated:
        kind = next((kind for kind in _KINDS if stated.startswith(kind)), stated)
        return _DTYPES.get(kind, stated)
    words = re.findall(r"[a-z]+\d*", str(tensor.get("Format/Datatype", tensor.get("Format", ""))).lower())
    return next((_DTYPES[word] for word in words if word in _DTYPES), "?")
