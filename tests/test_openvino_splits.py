"""Weights are split instead of what they make, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff.runtimes.openvino_splits import split_weights  # noqa: E402

ROWS, COLUMNS = 12, 8
VALUES = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def floats():
    return opset13.constant(VALUES)


def halves():
    return opset13.convert(opset13.constant(VALUES.astype(np.float16)), "f32")


def codes():
    scales = np.abs(VALUES).max(axis=1, keepdims=True) / 127
    stored = opset13.constant(np.round(VALUES / scales).astype(np.int8))
    return opset13.multiply(opset13.convert(stored, "f32"), opset13.constant(scales.astype(np.float32)))


def fours():
    stored = opset13.constant(np.clip(np.round(VALUES * 2), -8, 7).astype(np.int8), openvino.Type.i4)
    return opset13.multiply(opset13.convert(stored, "f32"), opset13.constant(np.float32(0.5)))


def each_of_a_batch():
    return opset13.constant(VALUES[None])


def gated(weight, *, bias=True, rank=3, transposed=True, shared=False, turned=False, positions=1, marked=False):
    """A gated linear unit, of which `shared` says whether something else takes what is split, too."""
    shape = [-1, COLUMNS, -1] if turned else [-1] * (rank - 1) + [COLUMNS]
    given = opset13.parameter(shape, openvino.Type.f32)
    biases = np.tile(np.arange(ROWS, dtype=np.float32), (positions, 1))
    made = opset13.matmul(
        given, weight if transposed else opset13.constant(VALUES.T.copy()), transpose_a=turned, transpose_b=transposed
    )
    if marked:
        made.get_rt_info()["precise_0"] = ""
    if bias:
        made = opset13.add(made, opset13.constant(biases.reshape([1] * (rank - 2) + [positions, ROWS])))
    axis, lengths = opset13.constant(-1), opset13.constant(np.array([5, ROWS - 5]))
    value, gate = opset13.variadic_split(made, axis, lengths).outputs()
    results = [opset13.gelu(gate, "ERF").output(0), value]
    return openvino.Model([*results, made.output(0)] if shared else results, [given], "gated")


def outputs(model, rank=3):
    given = np.random.default_rng(1).standard_normal([2, 3, COLUMNS][3 - rank :]).astype(np.float32)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled([given]).values())


def test_a_file_says_what_is_to_stay_in_float32(tmp_path):
    openvino.save_model(gated(floats(), marked=True), tmp_path / "model.xml", compress_to_fp16=False)
    assert split_weights(openvino.Core().read_model(tmp_path / "model.xml")) == 0


@pytest.mark.parametrize("weight", [floats, halves, codes])
@pytest.mark.parametrize("bias", [True, False])
def test_a_split_product_becomes_products(weight, bias):
    model = gated(weight(), bias=bias)
    expected = outputs(model)
    copy = model.clone()
    assert split_weights(copy) == 1
    kinds = [operation.get_type_name() for operation in copy.get_ordered_ops()]
    assert "VariadicSplit" not in kinds
    assert kinds.count("MatMul") == 2
    assert all(np.allclose(*each, atol=1e-5) for each in zip(outputs(copy), expected, strict=True))
    assert "VariadicSplit" in [operation.get_type_name() for operation in model.get_ordered_ops()]


def test_a_part_of_a_weight_is_a_view():
    whole = floats()
    model = gated(whole)
    split_weights(model)
    parts = [each for each in model.get_ordered_ops() if each.get_type_name() == "MatMul"]
    assert all(np.shares_memory(part.input_value(1).get_node().data, whole.data) for part in parts)


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (floats, {"rank": 2}),
        (floats, {"transposed": False}),
        (floats, {"shared": True}),
        (floats, {"shared": True, "bias": False}),
        (fours, {}),
        (floats, {"turned": True}),
        (each_of_a_batch, {}),
        (floats, {"positions": 3}),
        (floats, {"marked": True}),
    ],
    ids=[
        "vectors",
        "another layout",
        "taken elsewhere",
        "taken elsewhere, no bias",
        "four bits",
        "inputs turned round",
        "a batch of weights",
        "a bias for each position",
        "to stay in float32",
    ],
)
def test_other_splits_stay(weight, options):
    assert split_weights(gated(weight(), **options)) == 0


def test_a_conversion_stays_for_kernels_to_do():
    widened = halves()
    widened.get_rt_info()["decompression_0"] = ""
    model = gated(widened)
    split_weights(model)
    parts = [each for each in model.get_ordered_ops() if each.get_type_name() == "MatMul"]
    assert all("decompression_0" in part.input_value(1).get_node().get_rt_info() for part in parts)
