"""Layers of float32 among others in less: OpenVINO computes them in float32, and computes what it did."""

from __future__ import annotations

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff import plugins  # noqa: E402
from bakeoff.exporters.openvino_wide import keep_wide  # noqa: E402
from bakeoff.hardware import has_instructions  # noqa: E402

CHANNELS, WIDTH = 64, 96
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((WIDTH, CHANNELS)).astype(np.float32)
BIAS, SCALE = (RANDOM.standard_normal(count).astype(np.float32) for count in (WIDTH, CHANNELS))


def named(operation, name):
    operation.set_friendly_name(name)
    return operation


def linear(rank):
    given = opset13.parameter([-1] * (rank - 1) + [CHANNELS], openvino.Type.f32)
    product = opset13.matmul(opset13.relu(given), opset13.constant(WEIGHT), transpose_a=False, transpose_b=True)
    product = named(product, "linear/MatMul")
    added = named(opset13.add(product, opset13.constant(BIAS)), "linear/Add")
    return openvino.Model([opset13.gelu(added, "ERF")], [given], "linear")


def group_norm(rank):
    given = opset13.parameter([-1, CHANNELS] + [-1] * (rank - 2), openvino.Type.f32)
    scale, shift = opset13.constant(SCALE), opset13.constant(SCALE[::-1].copy())
    normal = named(opset13.group_normalization(convolution(given), scale, shift, 8, 1e-5), "norm")
    return openvino.Model([convolution(normal)], [given], "norm")


def convolution(value):
    weight = opset13.constant(WEIGHT[:CHANNELS].reshape(CHANNELS, CHANNELS, 1, 1))
    return opset13.convolution(value, weight, strides=[1, 1], pads_begin=[0, 0], pads_end=[0, 0], dilations=[1, 1])


def residual(rank):
    """What a convolution makes, with its bias, added to what it was given: the plugin makes one operation of all three."""
    given = opset13.parameter([-1, CHANNELS, -1, -1], openvino.Type.f32)
    first = convolution(given)
    made = named(convolution(opset13.swish(first)), "conv/Convolution")
    made = named(opset13.add(made, opset13.constant(SCALE.reshape(1, CHANNELS, 1, 1))), "conv/Add")
    return openvino.Model([convolution(opset13.swish(opset13.add(first, made)))], [given], "residual")


def outputs(model, given, hint):
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return compiled, compiled([given])[0]


def wide(make, rank, tmp_path, *, static):
    """Return the model as it was and with its layer in float32, as it is read from a file, and an input."""
    model, layers = make(rank), {"layer": ["linear/MatMul", "linear/Add", "norm", "conv/Convolution", "conv/Add"]}
    plain = model.clone()
    keep_wide(model, layers, plugins.mixture("bf16", {"layer": "fp32"}))
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    model = openvino.Core().read_model(tmp_path / "model.xml")
    shape = {2: [5, CHANNELS], 3: [2, 5, CHANNELS], 4: [2, CHANNELS, 6, 5]}[rank]
    if static:
        model.reshape(shape)
    return plain, model, RANDOM.standard_normal(shape).astype(np.float32)


CASES = pytest.mark.parametrize(
    ("make", "rank", "products"),
    [
        (linear, 2, {"FullyConnected", "MatMul"}),
        (linear, 3, {"FullyConnected", "MatMul"}),
        (group_norm, 4, {"MVN"}),
        (residual, 4, {"Convolution"}),
    ],
)


@CASES
@pytest.mark.parametrize("static", [False, True])
def test_they_compute_the_same(tmp_path, make, rank, products, static):
    plain, model, given = wide(make, rank, tmp_path, static=static)
    (_, expected), (_, got) = outputs(plain, given, "f32"), outputs(model, given, "f32")
    assert np.allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@CASES
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.skipif(not has_instructions("amx_bf16", "avx512_bf16"), reason="this CPU computes all in float32")
def test_the_plugin_computes_them_in_float32(tmp_path, make, rank, products, static):
    plain, model, given = wide(make, rank, tmp_path, static=static)
    (narrow, _), (compiled, got) = outputs(plain, given, "bf16"), outputs(model, given, "bf16")
    (_, expected) = outputs(plain, given, "f32")
    assert ran(narrow, products) == {"bf16"}
    assert "f32" in ran(compiled, products)
    assert make is residual or ran(compiled, products) == {"f32"}
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


def test_an_output_keeps_its_names():
    given = opset13.parameter([-1, CHANNELS, -1, -1], openvino.Type.f32)
    normal = opset13.group_normalization(given, opset13.constant(SCALE), opset13.constant(SCALE), 8, 1e-5)
    named(normal, "norm").output(0).get_tensor().set_names({"made"})
    model = openvino.Model([normal], [given], "norm")
    keep_wide(model, {"layer": ["norm"]}, plugins.mixture("bf16", {"layer": "fp32"}))
    model.validate_nodes_and_infer_types()
    assert model.output(0).get_names() == {"made"}
    assert model.output(0).get_node().input_value(0).get_node().get_friendly_name() == "norm"


def ran(compiled, kinds):
    """Return the precisions in which operations of these kinds run."""
    told = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ordered_ops()]
    return {str(info["runtimePrecision"].astype(str)) for info in told if str(info["layerType"].astype(str)) in kinds}
