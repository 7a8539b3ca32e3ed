"""What an engine really runs, from TensorRT's inspector, compared with what the recipe asked for."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_DTYPES = {
    "float": "float32", "fp32": "float32", "float32": "float32", "half": "float16", "fp16": "float16", "float16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16", "int8": "int8", "fp8": "float8", "float8": "float8", "int4": "int4",
    "fp4": "float4", "int32": "int32", "int64": "int64", "bool": "bool", "uint8": "uint8",
}  # fmt: skip
_KINDS = ("fp8", "fp4", "int4")
"""Beginnings of dtypes that come with their layout: FP8E4M3."""
_MOVES = {"Reformat", "NoOp", "Constant", "Shuffle", "Slice", "Copy", "Quantize", "Dequantize", "Cast"}
"""Layers that multiply nothing, whatever nodes they are named after."""
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

    def as_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "other_precision": self.other,
            "fusion": {"layers": self.layers, "kinds": self.kinds, "unseen_products": len(self.unseen)},
        }


def inspect(text: str, products: Mapping[str, str]) -> Inspection:
    """Read the inspector's JSON.

    Args:
        text: of `get_engine_information`, of an engine built with detailed verbosity.
        products: node -> dtype that it is to compute in.
    """
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    found = Inspection(len(layers), dict(Counter(str(layer.get("LayerType", "?")) for layer in layers)))
    owners = _owners(layers)
    for node, wanted in products.items():
        ran = _ran(owners.get(node, ()), wanted)
        if ran is None:
            found.unseen.append(node)
            continue
        found.precision[ran] = found.precision.get(ran, 0) + 1
        if ran != wanted:
            found.other[node] = f"{ran}, asked for {wanted}"
    return found


def refuse_another_precision(part: str, found: Inspection, products: Mapping[str, str]) -> None:
    """Raise if no product of a part runs in what the recipe mostly asks for, though some were seen.

    Raises:
        ArtifactError: naming both.
    """
    if not products or not found.precision:
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
            for name in {*_NAMES.findall(f"{layer.get('Metadata', '')} {layer.get('Name', '')}")}:
                found[name].append(layer)
    return found


def _ran(owners: Iterable[Mapping[str, Any]], wanted: str) -> str | None:
    """Return the dtype in which the layers of a product take what they multiply; the wanted one if any input is of it."""
    taken = [dtype_of(tensor) for layer in owners for tensor in layer.get("Inputs", ()) if isinstance(tensor, dict)]
    floats = [dtype for dtype in taken if dtype in {"float32", "float16", "bfloat16", "int8", "float8", "int4"}]
    if not floats:
        return None
    return wanted if wanted in floats else floats[0]


def dtype_of(tensor: Mapping[str, Any]) -> str:
    """Return a tensor's dtype in torch's spelling: TensorRT 11 has `DataType` or `Datatype` beside `Format`, 10 one field."""
    stated = str(tensor.get("DataType") or tensor.get("Datatype") or "").lower()
    if stated:
        kind = next((kind for kind in _KINDS if stated.startswith(kind)), stated)
        return _DTYPES.get(kind, stated)
    words = re.findall(r"[a-z]+\d*", str(tensor.get("Format/Datatype", tensor.get("Format", ""))).lower())
    return next((_DTYPES[word] for word in words if word in _DTYPES), "?")
