"""Queries and keys of large heads are taken as they are."""

from __future__ import annotations

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff.runtimes.openvino_heads import leave_large_heads  # noqa: E402

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
