"""What attention makes is rounded before its heads are put together, so that bytes are laid out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff.exporters.openvino_activations import round_activations  # noqa: E402
from bakeoff.exporters.openvino_weights import TENSOR  # noqa: E402
from bakeoff.quantize.grid import Grid  # noqa: E402
from bakeoff.weights import Entry  # noqa: E402

CHANNELS = 64
STEP = Grid((0.02,))


def attending(*, looked_at=False):
    """A model whose attention's output one layer takes, and perhaps another reader; its weight is a parameter yet."""
    given = opset13.parameter([-1, -1, CHANNELS], openvino.Type.f32)
    heads = opset13.transpose(
        opset13.reshape(given, opset13.constant([0, 0, 2, CHANNELS // 2]), special_zero=True),
        opset13.constant([0, 2, 1, 3]),
    )
    made = opset13.transpose(opset13.scaled_dot_product_attention(heads, heads, heads), opset13.constant([0, 2, 1, 3]))
    together = opset13.reshape(made, opset13.constant([0, 0, CHANNELS]), special_zero=True)
    weight = opset13.parameter([CHANNELS, CHANNELS], openvino.Type.f32, name=f"{TENSOR}0")
    result = opset13.matmul(together, weight, transpose_a=False, transpose_b=True)
    results = [result, opset13.relu(together)] if looked_at else [result]
    return openvino.Model(results, [given, weight], "attending")


def entries():
    return [Entry("out.weight", Path("a"), "F32", (CHANNELS, CHANNELS), 0, 4 * CHANNELS**2)]


def rounded(model):
    return next(each for each in model.get_ordered_ops() if each.get_type_name() == "FakeQuantize")


def outputs(model):
    generator = np.random.default_rng(0)
    given = [generator.standard_normal(shape).astype(np.float32) for shape in ((2, 7, CHANNELS), (CHANNELS, CHANNELS))]
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(given).values())


@pytest.mark.parametrize(("looked_at", "behind"), [(False, "ScaledDotProductAttention"), (True, "Reshape")])
def test_attention_is_rounded_before_heads_are_put_together(looked_at, behind):
    model = attending(looked_at=looked_at)
    wide = outputs(model)
    round_activations(model, entries(), {"out": (STEP, None)})
    assert rounded(model).input_value(0).get_node().get_type_name() == behind
    got = outputs(model)
    assert 1e-4 < np.linalg.norm(got[0] - wide[0]) / np.linalg.norm(wide[0]) < 0.1
    assert all(np.array_equal(*each) for each in zip(got[1:], wide[1:], strict=True))
