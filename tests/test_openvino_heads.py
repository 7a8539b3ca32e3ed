"""Queries and keys of large heads are taken as they are; what attention makes is rounded before heads are put together."""

from __future__ import annotations

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff.runtimes.openvino_heads import leave_large_heads, round_within_attention  # noqa: E402

TOKENS = 5


def attending(channels, *, rounded):
    def heads(value):
        split = opset13.reshape(value, opset13.constant([0, 0, 2, channels]), special_zero=True)
        return opset13.transpose(split, opset13.constant([0, 2, 1, 3]))

    def coarse(value):
        ends = [opset13.constant(np.float32(end)) for end in (-2, 2, -2, 2)]
        return opset13.fake_quantize(value, *ends, levels=5) if rounded else value

    given = [opset13.parameter([-1, -1, 2 * channels], openvino.Type.f32) for _ in range(3)]
    queries, keys, values = (opset13.multiply(each, opset13.constant(np.float32(0.5))) for each in given)
    made = opset13.scaled_dot_product_attention(heads(coarse(queries)), heads(coarse(keys)), heads(values))
    return openvino.Model([made], given, "attending")


def output(model, channels):
    generator = np.random.default_rng(0)
    given = [generator.standard_normal((1, TOKENS, 2 * channels)).astype(np.float32) for _ in range(3)]
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(given)[0]


@pytest.mark.parametrize(("channels", "taken"), [(64, 2), (80, 2), (40, 0)])
def test_large_heads_are_left_as_they_are(channels, taken):
    model = attending(channels, rounded=True)
    rounded, exact = output(model, channels), output(attending(channels, rounded=False), channels)
    assert leave_large_heads(model) == taken
    assert np.allclose(output(model, channels), exact if taken else rounded, atol=1e-5)
    assert not np.allclose(rounded, exact, atol=1e-3)


def test_what_is_not_rounded_stays():
    assert leave_large_heads(attending(64, rounded=False)) == 0


def test_what_others_take_stays_rounded():
    """A layout that keys and another reader share."""
    given = opset13.parameter([1, 2, TOKENS, 64], openvino.Type.f32)
    ends = [opset13.constant(np.float32(end)) for end in (-2, 2, -2, 2)]
    shared = opset13.transpose(opset13.fake_quantize(given, *ends, levels=5), opset13.constant([0, 1, 2, 3]))
    made = opset13.scaled_dot_product_attention(given, shared, given)
    assert leave_large_heads(openvino.Model([made, opset13.relu(shared)], [given], "shared")) == 0


def test_a_rounding_that_scales_stays():
    given = opset13.parameter([1, 2, TOKENS, 64], openvino.Type.f32)
    ends = [opset13.constant(np.float32(end)) for end in (-2, 2, -128, 127)]
    codes = opset13.fake_quantize(given, *ends, levels=256)
    made = opset13.scaled_dot_product_attention(codes, given, given)
    assert leave_large_heads(openvino.Model([made], [given], "codes")) == 0


def put_together(*, looked_at=False, by_channel=False):
    """Attention whose heads are put together, rounded, and read; `looked_at` before it is rounded, too."""
    heads = [opset13.parameter([-1, 2, -1, 32], openvino.Type.f32) for _ in range(3)]
    made = opset13.transpose(opset13.scaled_dot_product_attention(*heads), opset13.constant([0, 2, 1, 3]))
    together = opset13.reshape(made, opset13.constant([0, 0, 64]), special_zero=True)
    size = (1, 1, 64) if by_channel else ()
    ends = [opset13.constant(np.full(size, end, np.float32)) for end in (-0.5, 0.5, -0.5, 0.5)]
    result = opset13.relu(opset13.fake_quantize(together, *ends, levels=9))
    return openvino.Model([result, opset13.relu(together)] if looked_at else [result], heads, "together")


@pytest.mark.parametrize("looked_at", [False, True])
def test_attention_is_rounded_before_heads_are_put_together(looked_at):
    generator = np.random.default_rng(0)
    given = [generator.standard_normal((2, 2, TOKENS, 32)).astype(np.float32) for _ in range(3)]

    def outputs(model):
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return list(compiled(given).values())

    model = put_together(looked_at=looked_at)
    before = outputs(model)
    assert round_within_attention(model) == (not looked_at)
    rounding = next(each for each in model.get_ordered_ops() if each.get_type_name() == "FakeQuantize")
    assert (rounding.input_value(0).get_node().get_type_name() == "Reshape") == looked_at
    assert all(np.allclose(*each, atol=1e-6) for each in zip(outputs(model), before, strict=True))


def test_steps_of_channels_stay_behind_the_layout():
    assert round_within_attention(put_together(by_channel=True)) == 0
