"""Attention that is fused while an ONNX graph is opened: alike, and only where the operator means the same."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from bakeoff.components.component import Activations
from bakeoff.errors import UsageError
from bakeoff.footprint import activation_bytes
from bakeoff.parity.distance import relative_error
from bakeoff.recipe import Placement, parse
from bakeoff.runtimes import onnx_attention
from bakeoff.runtimes.engine import load
from bakeoff.runtimes.providers import fused_dtypes

HEADS, WIDTH = 3, 20


def graph(*, keys="turned", axis=-1, mask=False, looked_at=False, heads=HEADS, batch="batch", dtype=TensorProto.FLOAT):
    """Return a model of one attention, whose keys are turned in one of the ways that exporters have."""
    node, shapes = helper.make_node, {"four": [0, 0, -1, WIDTH]}
    nodes = [node("Mul", ["q", "root"], ["qs"]), node("Identity", ["k"], ["k4"]), node("Identity", ["v"], ["v4"])]
    if keys == "turned":
        nodes += [node("Transpose", ["k4"], ["kt"], perm=[0, 1, 3, 2])]
    elif keys == "folded":
        shapes |= {"fold": [-1, 7, WIDTH], "open": [-1, HEADS, WIDTH, 7]}
        nodes += [node("Reshape", ["k4", "fold"], ["kf"]), node("Transpose", ["kf"], ["kft"], perm=[0, 2, 1])]
        nodes += [node("Reshape", ["kft", "open"], ["kt"])]
    else:
        nodes += [node("Transpose", ["k4"], ["kt"], perm=[0, 1, 3, 2]), node("Abs", ["kt"], ["ka"])]
    nodes += [
        node("Mul", ["ka" if keys == "changed" else "kt", "root"], ["ks"]),
        node("MatMul", ["qs", "ks"], ["scores"]),
    ]
    nodes += [node("Add", ["scores", "root"], ["masked"])] if mask else []
    nodes += [node("Softmax", ["masked" if mask else "scores"], ["p"], axis=axis), node("MatMul", ["p", "v4"], ["out"])]
    value = helper.make_tensor_value_info
    given = [value(name, dtype, ["batch", HEADS, "left" if name == "q" else "right", WIDTH]) for name in "qkv"]
    made = [value("out", dtype, None), *([value("p", dtype, None)] if looked_at else [])]
    known = [value(name, dtype, [batch, heads, None, WIDTH]) for name in ("k4", "v4")]
    known.append(value("q", dtype, ["batch", heads, None, WIDTH]))
    constants = [onnx.numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    constants.append(onnx.numpy_helper.from_array(np.array([WIDTH**-0.25], dtype=kind), "root"))
    whole = helper.make_graph(nodes, "attention", given, made, constants, value_info=known)
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model):
    generator = np.random.default_rng(0)
    given = {"q": (2, HEADS, 5, WIDTH), "k": (2, HEADS, 7, WIDTH), "v": (2, HEADS, 7, WIDTH)}
    feeds = {name: generator.standard_normal(shape).astype(np.float32) * 3 for name, shape in given.items()}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["out"], feeds)[0]


@pytest.mark.parametrize("keys", ["turned", "folded"])
def test_it_is_the_same(keys):
    plain, fused = graph(keys=keys), graph(keys=keys)
    assert onnx_attention.fuse(fused, ["FLOAT"]) == 1
    kinds = [node.op_type for node in fused.graph.node]
    assert kinds.count("MultiHeadAttention") == 1
    assert not {"Softmax", "MatMul", "Mul"} & set(kinds)
    np.testing.assert_allclose(run(fused), run(plain), atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"mask": True},
        {"axis": 1},
        {"looked_at": True},
        {"heads": None},
        {"batch": 1},
        {"keys": "changed"},
        {"dtype": TensorProto.FLOAT16},
    ],
)
def test_what_means_something_else_stays(other):
    model = graph(**other)
    before = model.SerializeToString()
    assert onnx_attention.fuse(model, ["FLOAT"]) == 0
    assert model.SerializeToString() == before


def latents_and_counts(folder, attention):
    seen = []
    with load(folder, attention=attention) as engine:
        engine.generate("a red circle", steps=2, seeds=1, callback=lambda *each: seen.append(each[-1].clone()))
        return seen[-1], {name: part["attention"] for name, part in engine.configuration.items()}


def test_nodes_need_no_names_and_graphs_inside_take_what_they_want():
    twice, other = graph(), onnx.compose.add_prefix(graph(), "b.").graph
    for field in ("node", "input", "output", "initializer", "value_info"):
        getattr(twice.graph, field).extend(getattr(other, field))
    for node in twice.graph.node:
        node.name = ""
    assert onnx_attention.fuse(twice, ["FLOAT"]) == 2
    onnxruntime.InferenceSession(twice.SerializeToString(), providers=["CPUExecutionProvider"])
    inner = helper.make_graph(
        [helper.make_node("Identity", ["scores"], ["same"])],
        "inner",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    outer = graph()
    outer.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((), dtype=bool), "yes"))
    outer.graph.node.append(helper.make_node("If", ["yes"], ["seen"], then_branch=inner, else_branch=inner))
    assert onnx_attention.fuse(outer, ["FLOAT"]) == 0


def test_pictures_are_alike_and_the_kernel_can_be_chosen(baked):
    fused, counts = latents_and_counts(baked("onnx:fp32"), None)
    assert counts["unet"] == {"fused": 10, "math": 0}
    assert counts["text_encoder"] == {"fused": 0, "math": 3}  # it is causal
    plain, counts = latents_and_counts(baked("onnx:fp32"), "math")
    assert counts["unet"] == {"fused": 0, "math": 10}
    assert 0 < relative_error(fused, plain) < 1e-4
    with pytest.raises(UsageError, match="no cudnn attention") as raised:
        load(baked("onnx:fp32"), attention="cudnn")
    assert raised.value.fix == "attention=flash or attention=math"


def test_other_providers_fuse_where_it_is_asked_for():
    cuda, openvino = "CUDAExecutionProvider", "OpenVINOExecutionProvider"
    assert fused_dtypes(cuda, Placement()) == ()
    assert fused_dtypes(cuda, parse("onnx:fp16+attention=flash")[1]) == ("FLOAT", "FLOAT16")
    assert fused_dtypes(openvino, Placement(attention="flash")) == ()


def test_scores_are_predicted_where_they_are_kept():
    shown = Activations(map_elements=1_000, score_elements=1_000_000)
    predicted = {
        name: activation_bytes("onnx", "fp32", shown, parse(f"onnx:fp32{name}")[1]) for name in ("", "+attention=math")
    }
    assert predicted["+attention=math"] - predicted[""] == 8_000_000
    assert activation_bytes("torch", "fp32", shown, Placement(attention="math")) > 8_000_000
