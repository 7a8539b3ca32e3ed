"""Products that widen their inputs are computed in pieces, and give what they gave."""

from __future__ import annotations

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff.runtimes.openvino_pieces import cut_in_pieces  # noqa: E402
from bakeoff.runtimes.openvino_splits import split_weights  # noqa: E402

CHANNELS, WIDTH = 16, 64
GENERATOR = np.random.default_rng(0)


def weight(rows, columns):
    values = GENERATOR.standard_normal((rows, columns)) * columns**-0.5
    scales = np.abs(values).max(axis=1, keepdims=True) / 127
    codes = opset13.convert(opset13.constant(np.round(values / scales).astype(np.int8)), "f32")
    return opset13.multiply(codes, opset13.constant(scales.astype(np.float32)))


def product(given, outputs, *, bias=True):
    made = opset13.matmul(given, weight(outputs, given.get_output_partial_shape(0)[-1].get_length()), False, True)  # noqa: FBT003
    return opset13.add(made, opset13.constant(GENERATOR.random((1, 1, outputs), np.float32))) if bias else made


def rounded(value, *, channels=1):
    ends = GENERATOR.random((1, 1, channels), np.float32) + 2
    return opset13.fake_quantize(value, *map(opset13.constant, (-ends, ends, -ends, ends)), levels=255)


def gelu(value):
    return opset13.gelu(value, "TANH")


def gated(given, *, bias=True, activation=gelu):
    return opset13.multiply(product(given, WIDTH, bias=bias), activation(product(given, WIDTH, bias=bias)))


def halved(given):
    value, gate = opset13.variadic_split(
        product(given, 2 * WIDTH), opset13.constant(-1), opset13.constant([WIDTH, WIDTH])
    ).outputs()
    return opset13.multiply(value, gelu(gate))


FORMS = {
    "a product": lambda given: product(given, WIDTH),
    "no bias": lambda given: product(given, WIDTH, bias=False),
    "an activation": lambda given: gelu(product(given, WIDTH)),
    "a gate": gated,
    "a gate without biases": lambda given: gated(given, bias=False, activation=opset13.swish),
    "a split gate": halved,
    "rounded inputs": lambda given: gated(rounded(given)),
    "rounded outputs": lambda given: rounded(gated(rounded(given))),
    "channels rounded each": lambda given: rounded(gelu(product(given, WIDTH)), channels=WIDTH),
}


def model_of(form):
    given = opset13.parameter([-1, -1, CHANNELS], openvino.Type.f32)
    wide = form(given)
    return openvino.Model([product(wide, CHANNELS), opset13.add(product(wide, CHANNELS), given)], [given], "widening")


def outputs(model):
    given = np.random.default_rng(1).standard_normal((2, 3, CHANNELS)).astype(np.float32)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled([given]).values())


def kinds(model):
    return [operation.get_type_name() for operation in model.get_ordered_ops()]


@pytest.mark.parametrize("name", FORMS)
def test_pieces_give_what_the_whole_gave(name):
    whole = model_of(FORMS[name])
    expected, model = outputs(whole), whole.clone()  # pieces are views of what the whole has stored
    split_weights(model)
    products = kinds(model).count("MatMul") - 2
    assert cut_in_pieces(model, most_bytes=CHANNELS * WIDTH // 4, multiple=8) == 1
    pieces = 4 if name in {"rounded inputs", "rounded outputs"} else 8  # whose weights take a byte, others two
    assert kinds(model).count("MatMul") == products * pieces + 2
    assert kinds(model).count("Concat") == 1
    assert all(np.allclose(*each, atol=1e-5) for each in zip(outputs(model), expected, strict=True))


def test_all_that_is_done_to_an_output_is_done_to_its_piece():
    model = model_of(FORMS["rounded outputs"])
    cut_in_pieces(model, most_bytes=CHANNELS * WIDTH // 4, multiple=8)
    joined = next(each for each in model.get_ordered_ops() if each.get_type_name() == "Concat")
    assert {value.get_node().get_type_name() for value in joined.input_values()} == {"FakeQuantize"}


def taken_twice(given):
    made = product(given, WIDTH)
    return opset13.multiply(gelu(made), product(made, WIDTH))


@pytest.mark.parametrize(("outputs_to_inputs", "cut"), [(1, 0), (1.5, 0), (2, 1), (4, 1)])
def test_products_that_hardly_widen_stay(outputs_to_inputs, cut):
    model = model_of(lambda given: product(given, int(outputs_to_inputs * CHANNELS)))
    before = kinds(model)
    assert cut_in_pieces(model, most_bytes=256, multiple=4) == cut
    assert (kinds(model) == before) == (not cut)


@pytest.mark.parametrize(("width", "cut"), [(40, 0), (48, 1)])
def test_pieces_are_of_whole_multiples(width, cut):
    model = model_of(lambda given: product(given, width))
    assert cut_in_pieces(model, most_bytes=512, multiple=16) == cut


@pytest.mark.parametrize("marked", ["MatMul", "Gelu"])
def test_what_is_to_stay_in_float32_is_whole(marked):
    model = model_of(FORMS["an activation"])
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == marked:
            operation.get_rt_info()["precise_0"] = ""
    cut_in_pieces(model, most_bytes=CHANNELS * WIDTH // 4, multiple=8)
    assert kinds(model).count("Gelu") == 1


def test_there_are_not_too_many_pieces():
    model = model_of(lambda given: product(given, 32 * CHANNELS))
    assert cut_in_pieces(model, most_bytes=2 * CHANNELS, multiple=1) == 1
    assert kinds(model).count("MatMul") == 16 + 2


def test_what_is_taken_elsewhere_is_whole():
    whole = model_of(taken_twice)
    expected, model = outputs(whole), whole.clone()
    assert cut_in_pieces(model, most_bytes=CHANNELS * WIDTH // 4, multiple=8) == 1
    assert all(np.allclose(*each, atol=1e-5) for each in zip(outputs(model), expected, strict=True))


def test_small_weights_stay():
    assert cut_in_pieces(model_of(gated)) == 0
