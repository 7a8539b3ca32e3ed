"""The weights of an OpenVINO IR, streamed from a checkpoint in the precision that the recipe says."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections import defaultdict
from typing import TYPE_CHECKING, BinaryIO

from ..weights import SAFETENSORS_DTYPES, TORCH_DTYPES, as_bytes, read_chunks, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ..weights import Checkpoint, Entry

TENSOR = "checkpoint tensor "
"""Parameters of this name, with a number, stand where the graph has tensors of the checkpoint."""
STORAGE = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}
"""Precision -> torch dtype of the weights, but of those that are quantized."""
_ELEMENTS = {"F32": "f32", "BF16": "bf16"}
_ALIGNMENT = 64
_LEAST_QUANTIZED = 4096
"""Elements of the smallest matrix that int8 is worth its scales."""


def is_quantized(shape: Sequence[int], precision: str) -> bool:
    """Say whether a weight becomes int8: matrices and convolutions do, all but the smallest."""
    return precision == "int8" and len(shape) > 1 and shape[0] > 1 and math.prod(shape) >= _LEAST_QUANTIZED


def stored_bytes(checkpoint: Checkpoint, precision: str) -> dict[str, int]:
    """Return dtype -> bytes that a checkpoint takes in the IR's weights."""
    totals: dict[str, int] = defaultdict(int)
    for entry in checkpoint.entries.values():
        if is_quantized(entry.shape, precision):
            totals["int8"] += math.prod(entry.shape)
            totals["float32"] += 4 * entry.shape[0]
        else:
            totals[STORAGE[precision]] += entry.bytes_in(STORAGE[precision])
    return dict(totals)


def write_weights(file: Path, entries: Sequence[Entry], precision: str) -> dict[str, int]:
    """Turn an IR's stand-in parameters into constants, and stream the tensors behind those that are already there.

    Args:
        file: the IR, whose parameter `TENSOR` + N stands for `entries[N]`.
        entries: of the checkpoint.
        precision: `fp32`, `bf16` or `int8`.

    Returns:
        Bytes of all constants by torch dtype.
    """
    tree = ET.parse(file)  # noqa: S314 - the file is our own, just written
    graph = _Graph(tree.getroot())
    places: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    with file.with_suffix(".bin").open("ab") as stream:
        for layer in graph.stand_ins():
            entry = entries[int(layer.attrib["name"].removeprefix(TENSOR))]
            quantized = is_quantized(entry.shape, precision) and _dims(layer) == list(entry.shape)
            place = (entry.name, quantized)
            layer.attrib["name"] = entry.name if place not in places else f"{entry.name} again {layer.attrib['id']}"
            if place not in places:
                dtype = SAFETENSORS_DTYPES[STORAGE[precision]]
                places[place] = _write_int8(entry, stream) if quantized else [_write(read_chunks(entry, dtype), stream)]
            if quantized:
                graph.dequantize(layer, *places[place])
            else:
                graph.hold(layer, SAFETENSORS_DTYPES[STORAGE[precision]], *places[place])
    if precision != "fp32":
        graph.keep_angles_precise()
    graph.rewire()
    tree.write(file, encoding="utf-8", xml_declaration=True)
    return graph.constant_bytes()


def _write(chunks: Iterable[bytes | memoryview], stream: BinaryIO) -> tuple[int, int]:
    """Write at the next aligned offset; return it and the length."""
    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    start = stream.tell()
    stream.writelines(chunks)
    return start, stream.tell() - start


def _write_int8(entry: Entry, stream: BinaryIO) -> list[tuple[int, int]]:
    """Write a weight as int8, and a float32 scale for each output channel: its largest magnitude becomes 127."""
    import torch

    scales = []

    def quantized() -> Iterator[memoryview]:
        for rows in read_rows(entry):
            flat = rows.float().flatten(1)
            scale = flat.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            scales.append(scale)
            yield as_bytes((flat / scale[:, None]).round().to(torch.int8))

    weight = _write(quantized(), stream)
    return [weight, _write([as_bytes(torch.cat(scales))], stream)]


class _Graph:
    """The XML of an IR, and what of it is changed here."""

    def __init__(self, root: ET.Element) -> None:
        layers, edges = root.find("layers"), root.find("edges")
        assert layers is not None and edges is not None  # noqa: S101, PT018 - an IR has both
        self._layers, self._edges = layers, edges
        self._next_id = max(int(layer.attrib["id"]) for layer in layers) + 1
        self._added: list[ET.Element] = []
        self._links: list[tuple[str, str, str]] = []
        self._successors: dict[str, str] = {}

    def stand_ins(self) -> list[ET.Element]:
        return [
            layer
            for layer in self._layers
            if layer.attrib["type"] == "Parameter" and layer.attrib["name"].startswith(TENSOR)
        ]

    def hold(self, layer: ET.Element, dtype: str, place: tuple[int, int]) -> None:
        """Make a stand-in a constant, widened to float32 where it is stored in less: marked as OpenVINO marks that."""
        _become_constant(layer, _ELEMENTS[dtype], place)
        if dtype != "F32":
            widened = self._widening(layer)
            info = ET.Element("rt_info")
            ET.SubElement(info, "attribute", {"name": "decompression", "version": "0"})
            widened.insert(1, info)
            self._links.append((layer.attrib["id"], widened.attrib["id"], "0"))
            self._successors[layer.attrib["id"]] = widened.attrib["id"]

    def dequantize(self, layer: ET.Element, weight: tuple[int, int], scales: tuple[int, int]) -> None:
        """Make a stand-in an int8 constant, widened and multiplied by its scales: the form that runtimes recognise."""
        _become_constant(layer, "i8", weight)
        widened = self._widening(layer)
        dims = _dims(layer)
        by_channel = [dims[0], *[1] * (len(dims) - 1)]
        scale = self._add("Const", f"{layer.attrib['name']}/scale", [], by_channel)
        scale.insert(0, ET.Element("data", _constant("f32", by_channel, scales)))
        product = self._add("Multiply", f"{layer.attrib['name']}/dequantized", [dims, by_channel], dims)
        product.insert(0, ET.Element("data", {"auto_broadcast": "numpy"}))
        self._links += [
            (layer.attrib["id"], widened.attrib["id"], "0"),
            (widened.attrib["id"], product.attrib["id"], "0"),
            (scale.attrib["id"], product.attrib["id"], "1"),
        ]
        self._successors[layer.attrib["id"]] = product.attrib["id"]

    def _widening(self, layer: ET.Element) -> ET.Element:
        """Add the conversion to float32 behind a constant."""
        dims = _dims(layer)
        widened = self._add("Convert", f"{layer.attrib['name']}/float32", [dims], dims, layer.find("output/port"))
        widened.insert(0, ET.Element("data", {"destination_type": "f32"}))
        return widened

    def _add(
        self, kind: str, name: str, inputs: list[list[int]], output: list[int], source: ET.Element | None = None
    ) -> ET.Element:
        """Add a layer of float32; `source` is the port that its only input comes from, where that has another dtype."""
        layer = ET.Element("layer", {"id": str(self._next_id), "name": name, "type": kind, "version": "opset1"})
        self._next_id += 1
        if inputs:
            taken = ET.SubElement(layer, "input")
            for number, dims in enumerate(inputs):
                taken.append(_port(number, "FP32" if source is None else source.attrib["precision"], dims))
        ET.SubElement(layer, "output").append(_port(len(inputs), "FP32", output))
        self._added.append(layer)
        return layer

    def keep_angles_precise(self) -> None:
        """Mark sines, cosines and all that their angles come from to stay in float32.

        A timestep or a position in bfloat16 has 8 bits: 981 would become 980 before its sine is taken.
        """
        by_id = {layer.attrib["id"]: layer for layer in self._layers}
        parents: dict[str, list[str]] = defaultdict(list)
        for edge in self._edges:
            parents[edge.attrib["to-layer"]].append(edge.attrib["from-layer"])
        waiting = [layer_id for layer_id, layer in by_id.items() if layer.attrib["type"] in {"Sin", "Cos"}]
        seen: set[str] = set()
        while waiting:
            layer_id = waiting.pop()
            layer = by_id[layer_id]
            if layer_id in seen or layer.attrib["type"] in {"Const", "Parameter"}:
                continue
            seen.add(layer_id)
            info = layer.find("rt_info")
            if info is None:
                info = ET.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, info)
            info.append(ET.Element("attribute", {"name": "precise", "version": "0"}))
            waiting.extend(parents[layer_id])

    def rewire(self) -> None:
        """Bring the added layers in, and lead what came from a constant through what follows it now."""
        outputs = {layer.attrib["id"]: len(layer.findall("input/port")) for layer in self._added}
        for edge in self._edges:
            follower = self._successors.get(edge.attrib["from-layer"])
            if follower is not None:
                edge.attrib.update({"from-layer": follower, "from-port": str(outputs[follower])})
        self._layers.extend(self._added)
        for source, target, port in self._links:
            link = {"from-layer": source, "from-port": str(outputs.get(source, 0))}
            self._edges.append(ET.Element("edge", {**link, "to-layer": target, "to-port": port}))

    def constant_bytes(self) -> dict[str, int]:
        totals: dict[str, int] = defaultdict(int)
        names = {**{short: TORCH_DTYPES[long] for long, short in _ELEMENTS.items()}, "i8": "int8"}
        for data in self._layers.iterfind("layer[@type='Const']/data"):
            element = data.attrib["element_type"]
            totals[names.get(element, element)] += int(data.attrib["size"])
        return dict(totals)


def _become_constant(layer: ET.Element, element: str, place: tuple[int, int]) -> None:
    port = layer.find("output/port")
    data = layer.find("data")
    assert port is not None and data is not None  # noqa: S101, PT018 - a parameter has both
    layer.attrib["type"] = "Const"
    port.attrib["precision"] = _precision(element)
    port.attrib.pop("names", None)
    data.attrib.clear()
    data.attrib.update(_constant(element, _dims(layer), place))


def _dims(layer: ET.Element) -> list[int]:
    return [int(dim.text or 0) for dim in layer.iterfind("output/port/dim")]


def _constant(element: str, dims: list[int], place: tuple[int, int]) -> dict[str, str]:
    shape = ", ".join(map(str, dims))
    return {"element_type": element, "shape": shape, "offset": str(place[0]), "size": str(place[1])}


def _precision(element: str) -> str:
    return {"f32": "FP32", "bf16": "BF16", "i8": "I8"}[element]


def _port(number: int, precision: str, dims: list[int]) -> ET.Element:
    port = ET.Element("port", {"id": str(number), "precision": precision})
    for dim in dims:
        ET.SubElement(port, "dim").text = str(dim)
    return port
