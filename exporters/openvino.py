"""Lower a captured part to OpenVINO IR, with the interface that Optimum Intel and OpenVINO GenAI feed."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ET
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LoweringError
from ..weights import Entry, read_chunks
from .exporter import Lowered
from .layers import write_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from ..components.component import Port
    from .exporter import Subject

FILE = "openvino_model.xml"
_WEIGHTS_FILE = "openvino_model.bin"
_COMPRESSED_BYTES = 1024
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32", "boolean": "bool"}


class OpenVINOExporter:
    """`openvino_model.xml` and `.bin`, straight from the captured program.

    Weights are stored as the recipe says (fp32, or bf16 with a conversion in the graph); what the runtime computes in
    is decided by the recipe when the part is loaded, never by OpenVINO's default.
    """

    version: ClassVar[int] = 2
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"timestep": ("f32",)}
    own_weights: ClassVar[bool] = True

    def storage(self, precision: str) -> str:  # noqa: ARG002 - bf16 weights are made from fp32 ones while writing
        return "float32"

    def packages(self) -> tuple[str, ...]:
        return ("torch", "openvino")

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        import openvino

        program = subject.program()
        _spell_sizes(program)
        model = _convert(subject.part, program)
        model = _with_interface(model, program, subject.inputs, subject.outputs)
        openvino.save_model(model, folder / FILE, compress_to_fp16=False)
        write_layers(_layers(model, program), subject.checkpoint, folder)
        del model, program
        if subject.precision == "bf16":
            _store_as_bf16(folder)
        return Lowered(weights="written", weight_bytes=_weight_bytes(folder / FILE))


def _spell_sizes(program: ExportedProgram) -> None:
    """Write the sizes that are known where a reshape says -1: beside a dynamic one OpenVINO would infer 1."""
    import torch

    for node in program.graph.nodes:
        if node.target in {torch.ops.aten.reshape.default, torch.ops.aten.view.default} and -1 in node.args[1]:
            known = [
                found if asked == -1 and isinstance(found, int) else asked
                for asked, found in zip(node.args[1], node.meta["val"].shape, strict=True)
            ]
            node.args = (node.args[0], known)


def _convert(part: str, program: ExportedProgram) -> Any:  # noqa: ANN401 - openvino is untyped
    import openvino

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return openvino.convert_model(program)
    except Exception as error:
        message = f"{part} couldn't be lowered to OpenVINO: {error}"
        raise LoweringError(message) from error


def _with_interface(  # openvino is untyped
    model: Any,  # noqa: ANN401
    program: ExportedProgram,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
) -> Any:  # noqa: ANN401
    """Name inputs and outputs, and give each input the dtype, rank and fixed dimensions of its port."""
    import openvino

    by_name = {name: parameter for parameter in model.get_parameters() for name in parameter.output(0).get_names()}
    captured = program.graph_signature.user_inputs
    parameters = [_fit(by_name[name], port) for name, port in zip(captured, inputs, strict=True)]
    for result, port in zip(model.get_results(), outputs, strict=True):
        result.output(0).get_tensor().set_names({port.name})
    fitted = openvino.Model(model.get_results(), parameters, "bakeoff")
    fitted.validate_nodes_and_infer_types()
    return fitted


def _fit(parameter: Any, port: Port) -> Any:  # noqa: ANN401
    import openvino
    from openvino import opset13

    shape = openvino.PartialShape([dim if isinstance(dim, int) else -1 for dim in port.dims])
    if parameter.get_element_type().to_string() == _ov_dtype(port.dtype) and parameter.partial_shape.rank == shape.rank:
        parameter.set_partial_shape(shape)
        parameter.set_friendly_name(port.name)
        parameter.output(0).get_tensor().set_names({port.name})
        return parameter
    wanted = opset13.parameter(shape, openvino.Type(_numpy_dtype(port.dtype)), name=port.name)
    wanted.output(0).get_tensor().set_names({port.name})
    value = opset13.convert(wanted, parameter.get_element_type().to_string())
    if port.rank == 1 and parameter.partial_shape.rank.get_length() == 0:
        value = opset13.gather(value, opset13.constant(0, dtype="int64"), opset13.constant(0, dtype="int64"))
    for target in parameter.output(0).get_target_inputs():
        target.replace_source_output(value.output(0))
    return wanted


def _ov_dtype(dtype: str) -> str:
    return next(short for short, long in _DTYPES.items() if long == dtype)


def _numpy_dtype(dtype: str) -> Any:  # noqa: ANN401
    import numpy as np

    return np.dtype(dtype)


def _layers(model: Any, program: ExportedProgram) -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Yield (module path, friendly name) of each operation that came from a module.

    OpenVINO names operations after the program's nodes, once it has decomposed them: convolutions are counted anew.
    """
    paths, convolutions = {}, 0
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            continue
        path, _ = list(stack.values())[-1]
        paths[node.name] = path
        if "conv" in str(node.target):
            paths[f"convolution_{convolutions}" if convolutions else "convolution"] = path
            convolutions += 1
    for operation in model.get_ordered_ops():
        name = operation.get_friendly_name()
        if name.partition("/")[0] in paths:
            yield paths[name.partition("/")[0]], name


def _store_as_bf16(folder: Path) -> None:
    """Rewrite the weights as bfloat16, a few MB at a time, with a conversion back to float32 behind each."""
    tree = ET.parse(folder / FILE)  # noqa: S314 - the file is our own, just written
    root = tree.getroot()
    layers, edges = root.find("layers"), root.find("edges")
    assert layers is not None and edges is not None  # noqa: S101, PT018 - an IR has both
    source, target = folder / _WEIGHTS_FILE, folder / f"{_WEIGHTS_FILE}.bf16"
    next_id = max(int(layer.attrib["id"]) for layer in layers) + 1
    written: dict[tuple[int, int, str], int] = {}
    converted: dict[str, str] = {}
    with target.open("wb") as stream:
        for layer in list(layers):
            data = layer.find("data")
            if layer.attrib["type"] != "Const" or data is None:
                continue
            offset, size = int(data.attrib["offset"]), int(data.attrib["size"])
            shrink = data.attrib["element_type"] == "f32" and data.attrib["shape"] and size >= _COMPRESSED_BYTES
            dtype = "BF16" if shrink else "as it is"
            entry = Entry(layer.attrib["name"], source, "F32", (), offset, size)
            if (offset, size, dtype) not in written:
                stream.write(b"\0" * (-stream.tell() % 64))
                written[offset, size, dtype] = stream.tell()
                for chunk in read_chunks(entry, "BF16" if shrink else "F32"):
                    stream.write(chunk)
            data.attrib["offset"] = str(written[offset, size, dtype])
            if shrink:
                data.attrib.update(element_type="bf16", size=str(size // 2))
                converted[layer.attrib["id"]] = str(next_id)
                layers.insert(list(layers).index(layer) + 1, _decompression(layer, next_id))
                next_id += 1
    _keep_angles_precise(layers, edges)
    _rewire(edges, converted)
    target.replace(source)
    tree.write(folder / FILE, encoding="utf-8", xml_declaration=True)


def _decompression(constant: ET.Element, layer_id: int) -> ET.Element:
    """Build the Convert to float32 that follows a compressed constant, as OpenVINO marks it."""
    port = constant.find("output/port")
    assert port is not None  # noqa: S101 - a constant has one output
    port.attrib["precision"] = "BF16"
    names = port.attrib.pop("names", None)
    dims = "".join(f"<dim>{dim.text}</dim>" for dim in port.findall("dim"))
    layer = ET.fromstring(  # noqa: S314 - made of our own numbers
        f'<layer id="{layer_id}" type="Convert" version="opset1"><data destination_type="f32" />'
        '<rt_info><attribute name="decompression" version="0" /></rt_info>'
        f'<input><port id="0" precision="BF16">{dims}</port></input>'
        f'<output><port id="1" precision="FP32">{dims}</port></output></layer>'
    )
    layer.attrib["name"] = f"{constant.attrib['name']}/to_f32"
    output = layer.find("output/port")
    if names is not None and output is not None:
        output.attrib["names"] = names
    return layer


def _keep_angles_precise(layers: ET.Element, edges: ET.Element) -> None:
    """Mark sines, cosines and all that their angles come from to stay in float32.

    A timestep or a position in bfloat16 has 8 bits: 981 would become 980 before its sine is taken.
    """
    by_id = {layer.attrib["id"]: layer for layer in layers}
    parents: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
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


def _rewire(edges: ET.Element, converted: dict[str, str]) -> None:
    for edge in edges:
        source = edge.attrib["from-layer"]
        if source in converted:
            edge.attrib.update({"from-layer": converted[source], "from-port": "1"})
    for constant, conversion in converted.items():
        link = {"from-layer": constant, "from-port": "0", "to-layer": conversion, "to-port": "0"}
        edges.append(ET.Element("edge", link))


def _weight_bytes(file: Path) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for data in ET.parse(file).getroot().iterfind("layers/layer[@type='Const']/data"):  # noqa: S314 - our own file
        totals[_DTYPES.get(data.attrib["element_type"], data.attrib["element_type"])] += int(data.attrib["size"])
    return dict(totals)
