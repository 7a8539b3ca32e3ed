"""What an ONNX part consists of, and the tensors inside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hardware import overflows_bytes
from .layers import read_layers
from .runtime import Operation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

FILE = "model.onnx"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""A session's setting: where the weights of a model lie that is given as bytes."""
_ZERO_POINTS = {"MatMulInteger": 3, "MatMulIntegerToFloat": 5}
"""Products of integers -> the place of the weights' zero point among their inputs."""


def operations(folder: Path) -> list[Operation]:
    """Return the graph's nodes, as `Runtime.operations` does."""
    import onnx

    layers = read_layers(folder)
    graph = onnx.load(folder / FILE, load_external_data=False).graph
    return [
        Operation(
            node.name,
            node.op_type,
            tuple(name for name in node.input if name),
            tuple(name for name in node.output if name),
            layers.get(node.name) or layers.get(node.name.partition(".")[0]),
        )
        for node in graph.node
    ]


def has_graphs_inside(graph: Any) -> bool:  # noqa: ANN401 - onnx is untyped
    """Say whether a graph has branches or loops, which may take any of its values."""
    return any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute)


def tap(folder: Path, session: Any, inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:  # noqa: ANN401 - onnxruntime is untyped
    """Run the graph as far as these tensors, on the execution providers of a session.

    As it is written, not optimised: ONNX Runtime fuses nodes even across an output, and then refuses the graph.
    """
    import onnx
    import onnxruntime
    import torch

    model = onnx.load(folder / FILE, load_external_data=False)
    if overflows_bytes():
        _make_unsigned(model.graph)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = session.get_session_options().intra_op_num_threads
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
    opened = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=session.get_providers())
    taken = {item.name for item in opened.get_inputs()}
    results = opened.run(names, {name: tensor.numpy() for name, tensor in inputs.items() if name in taken})
    return {name: torch.from_numpy(array) for name, array in zip(names, results, strict=True)}


def _make_unsigned(graph: Any) -> None:  # noqa: ANN401 - onnx is untyped
    """Give products unsigned weights around 128, as a session does with `session.x64quantprecision` where it optimises."""
    import onnx

    tensor = onnx.helper.make_tensor
    graph.initializer.append(tensor("bakeoff.128", onnx.TensorProto.INT32, [], [128]))
    graph.initializer.append(tensor("bakeoff.middle", onnx.TensorProto.UINT8, [], [128]))
    made: set[str] = set()
    nodes: list[Any] = []
    for node in list(graph.node):
        place = _ZERO_POINTS.get(node.op_type)
        if place is not None:
            weight = node.input[1]
            nodes += [] if weight in made else _unsigned(weight)
            made.add(weight)
            node.input[1] = f"{weight}.unsigned"
            node.input.extend([""] * (place + 1 - len(node.input)))
            node.input[place] = "bakeoff.middle"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _unsigned(weight: str) -> Iterator[Any]:
    """Yield what adds 128 to signed bytes."""
    import onnx

    wide, moved = f"{weight}.int32", f"{weight}.moved"
    yield onnx.helper.make_node("Cast", [weight], [wide], to=onnx.TensorProto.INT32)
    yield onnx.helper.make_node("Add", [wide, "bakeoff.128"], [moved])
    yield onnx.helper.make_node("Cast", [moved], [f"{weight}.unsigned"], to=onnx.TensorProto.UINT8)
