"""The weights of an OpenVINO IR, streamed from a checkpoint in the precision that the recipe says."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from ..weights import SAFETENSORS_DTYPES, TORCH_DTYPES, read_chunks
from .exporter import SCALES
from .packing import Packing, nibbles, storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..weights import Entry

TENSOR = "checkpoint tensor "
"""Parameters of this name, with a number, stand where the graph has tensors of the checkpoint."""
_ELEMENTS = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
_CODES = {"int8": "i8", "int4": "i4", "nf4": "nf4"}
"""Weight format -> OpenVINO's element type of its codes."""
_ALIGNMENT = 64
_SCALE = "/scale"
"""What the names of the constants end in that hold scales."""


@dataclass(frozen=True)
class Written:
    """What an IR's constants are."""

    weight_bytes: dict[str, int]
    """dtype, or weight format -> bytes."""
    kept: dict[str, str]
    """Weight that the format left as it is -> why."""


def write_weights(file: Path, entries: Sequence[Entry], mixture: Mixture, activations: Mapping[str, Grids]) -> Written:
    """Turn an IR's stand-in parameters into constants, and stream the tensors behind those that are already there.

    Args:
        file: the IR, whose parameter `TENSOR` + N stands for `entries[N]`.
        entries: of the checkpoint.
        mixture: the precision of each weight.
        activations: layer -> what its input is rounded to, whose channels' steps its weights take.
    """
    tree = ET.parse(file)  # noqa: S314 - the file is our own, just written
    graph = _Graph(tree.getroot())
    kept: dict[str, str] = {}
    places: dict[tuple[str, bool], list[tuple[int, int]]] = {}
    with file.with_suffix(".bin").open("ab") as stream:
        for layer in graph.stand_ins():
            entry = entries[int(layer.attrib["name"].removeprefix(TENSOR))]
            obstacle = _obstacle(layer, entry, mixture)
            codes = None if obstacle else mixture.format_of(entry.name)
            dtype = SAFETENSORS_DTYPES[storage(mixture.precision_of(entry.name))]
            place = (entry.name, codes is not None)
            layer.attrib["name"] = entry.name if place not in places else f"{entry.name} again {layer.attrib['id']}"
            if place not in places:
                places[place] = (
                    _write_codes(entry, mixture, stream, activations)
                    if codes
                    else [_write(read_chunks(entry, dtype), stream)]
                )
            if codes:
                groups = codes.groups(entry.shape) if codes.group else None
                graph.dequantize(layer, _CODES[codes.name], groups, *places[place])
            else:
                graph.hold(layer, dtype, *places[place])
            if obstacle and len(entry.shape) > 1:
                kept[entry.name] = obstacle
        graph.write_shapes(stream)
    if mixture.precision != "fp32":
        graph.keep_angles_precise()
    graph.rewire()
    tree.write(file, encoding="utf-8", xml_declaration=True)
    return Written(graph.constant_bytes(), kept)


def _obstacle(layer: ET.Element, entry: Entry, mixture: Mixture) -> str | None:
    if mixture.format_of(entry.name) and _dims(layer) != list(entry.shape):
        return "of another shape in the graph"
    return mixture.obstacle(entry.name, entry.shape)


def _write(chunks: Iterable[bytes | memoryview], stream: BinaryIO) -> tuple[int, int]:
    """Write at the next aligned offset; return it and the length."""
    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    start = stream.tell()
    stream.writelines(chunks)
    return start, stream.tell() - start


def _write_codes(
    entry: Entry, mixture: Mixture, stream: BinaryIO, activations: Mapping[str, Grids]
) -> list[tuple[int, int]]:
    """Write a weight's codes, and its float32 scales."""
    grid, _ = activations.get(entry.name.removesuffix(".weight"), (None, None))
    weight_format, columns = (
        mixture.formats[mixture.precision_of(entry.name)],
        grid.steps if grid and grid.by_channel else None,
    )
    packing = Packing(weight_format, entry, columns, mixture.importance(entry.name))
    encode = (lambda codes: codes) if weight_format.bits == 8 else (lambda codes: nibbles(codes & 15))  # noqa: PLR2004
    return [_write(packing.codes(encode), stream), _write(packing.scales(), stream)]


class _Graph:
    """The XML of an IR, and what of it is changed here."""

    def __init__(self, root: ET.Element) -> None:
        layers, edges = root.find("layers"), root.find("edges")
        assert layers is not None and edges is not None  # noqa: S101, PT018 - an IR has both
        self._layers, self._edges = layers, edges
        self._next_id = max(int(layer.attrib["id"]) for layer in layers) + 1
        self._added: list[ET.Element] = []
        self._links: list[tuple[str, str, str]] = []
        self._shapes: list[tuple[ET.Element, list[int]]] = []
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

    def dequantize(
        self, layer: ET.Element, element: str, groups: int | None, codes: tuple[int, int], scales: tuple[int, int]
    ) -> None:
        """Make a stand-in a constant of codes, widened and multiplied by its scales: the form that runtimes recognise.

        With groups, the inputs of an output channel are cut into so many, each with a scale of its own.
        """
        wanted = _dims(layer)
        if groups:
            _set_dims(layer, [wanted[0], groups, wanted[1] // groups])
        _become_constant(layer, element, codes)
        widened, dims = self._widening(layer), _dims(layer)
        by_channel = [dims[0], groups, 1] if groups else [dims[0], *[1] * (len(dims) - 1)]
        scale = self._add("Const", layer.attrib["name"] + _SCALE, [], by_channel)
        scale.insert(0, ET.Element("data", _constant("f32", by_channel, scales)))
        product = self._add("Multiply", f"{layer.attrib['name']}/dequantized", [dims, by_channel], dims)
        product.insert(0, ET.Element("data", {"auto_broadcast": "numpy"}))
        self._links += [
            (layer.attrib["id"], widened.attrib["id"], "0"),
            (widened.attrib["id"], product.attrib["id"], "0"),
            (scale.attrib["id"], product.attrib["id"], "1"),
        ]
        last = self._reshaped(product, wanted, layer.attrib["name"]) if groups else product
        self._successors[layer.attrib["id"]] = last.attrib["id"]

    def _reshaped(self, layer: ET.Element, dims: list[int], name: str) -> ET.Element:
        shape = self._add("Const", f"{name}/shape", [], [len(dims)])
        for port in shape.iterfind("output/port"):
            port.attrib["precision"] = "I64"
        self._shapes.append((shape, dims))
        reshaped = self._add("Reshape", f"{name}/matrix", [_dims(layer), [len(dims)]], dims)
        list(reshaped.iterfind("input/port"))[1].attrib["precision"] = "I64"
        reshaped.insert(0, ET.Element("data", {"special_zero": "false"}))
        self._links += [
            (layer.attrib["id"], reshaped.attrib["id"], "0"),
            (shape.attrib["id"], reshaped.attrib["id"], "1"),
        ]
        return reshaped

    def write_shapes(self, stream: BinaryIO) -> None:
        """Write the int64 shapes that reshapes behind grouped codes ask for."""
        for layer, dims in self._shapes:
            place = _write([struct.pack(f"<{len(dims)}q", *dims)], stream)
            layer.insert(0, ET.Element("data", _constant("i64", [len(dims)], place)))

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
            if not any(each.attrib["name"] == "precise" for each in info):
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
        names = {short: TORCH_DTYPES[long] for long, short in _ELEMENTS.items()}
        names |= {element: name for name, element in _CODES.items()}
        for layer in self._layers.iterfind("layer[@type='Const']"):
            data = layer.find("data")
            assert data is not None  # noqa: S101 - a constant has one
            element = data.attrib["element_type"]
            scales = layer.attrib["name"].endswith(_SCALE)
            totals[SCALES if scales else names.get(element, element)] += int(data.attrib["size"])
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


def _set_dims(layer: ET.Element, dims: list[int]) -> None:
    port = layer.find("output/port")
    assert port is not None  # noqa: S101 - a parameter has one
    for old in list(port):
        port.remove(old)
    for dim in dims:
        ET.SubElement(port, "dim").text = str(dim)


def _dims(layer: ET.Element) -> list[int]:
    return [int(dim.text or 0) for dim in layer.iterfind("output/port/dim")]


def _constant(element: str, dims: list[int], place: tuple[int, int]) -> dict[str, str]:
    shape = ", ".join(map(str, dims))
    return {"element_type": element, "shape": shape, "offset": str(place[0]), "size": str(place[1])}


def _precision(element: str) -> str:
    return {"f32": "FP32", "f16": "FP16"}.get(element, element.upper())


def _port(number: int, precision: str, dims: list[int]) -> ET.Element:
    port = ET.Element("port", {"id": str(number), "precision": precision})
    for dim in dims:
        ET.SubElement(port, "dim").text = str(dim)
    return port
