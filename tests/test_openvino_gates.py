"""Gated layers are kept apart for one thread, and compute what they did."""

from __future__ import annotations

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff.runtimes.openvino_gates import keep_gates_apart  # noqa: E402
from bakeoff.runtimes.openvino_splits import split_weights  # noqa: E402

CHANNELS, WIDTH = 64, 128


def weight(rows, columns, seed):
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05
    widened = opset13.convert(opset13.constant(values.astype(np.float16)), "f32")
    widened.get_rt_info()["decompression_0"] = ""
    return widened


def gated(activation, *, one_input=True):
    given = opset13.parameter([-1, -1, CHANNELS], openvino.Type.f32)
    other = given if one_input else opset13.relu(given)
    gate = activation(opset13.matmul(given, weight(WIDTH, CHANNELS, 0), transpose_a=False, transpose_b=True))
    product = opset13.matmul(other, weight(WIDTH, CHANNELS, 1), transpose_a=False, transpose_b=True)
    last = opset13.matmul(
        opset13.multiply(gate, product), weight(CHANNELS, WIDTH, 2), transpose_a=False, transpose_b=True
    )
    return openvino.Model([last], [given], "gated")


def gelu(value):
    return opset13.gelu(value, "TANH")


@pytest.mark.parametrize("activation", [gelu, opset13.swish])
def test_one_thread_compiles_and_computes_gated_layers(activation):
    """With AMX and bfloat16, OpenVINO ends the process where they aren't kept apart."""
    model = gated(activation)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    given = np.random.default_rng(3).standard_normal((2, 7, CHANNELS)).astype(np.float32)
    expected = openvino.Core().compile_model(model, "CPU", settings)([given])[0]
    assert keep_gates_apart(model) == 1
    settings |= {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1}
    got = openvino.Core().compile_model(model, "CPU", settings)([given])[0]
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


def test_what_splitting_makes_is_kept_apart_too():
    """Two products of one input, that were one before: such a layer, of which OpenVINO would make one operation again."""
    given = opset13.parameter([-1, -1, CHANNELS], openvino.Type.f32)
    both = opset13.matmul(given, weight(2 * WIDTH, CHANNELS, 0), transpose_a=False, transpose_b=True)
    value, gate = opset13.split(both, opset13.constant(2), 2).outputs()
    model = openvino.Model([opset13.multiply(value, gelu(gate))], [given], "gated")
    assert keep_gates_apart(model) == 0
    assert split_weights(model) == 1
    assert keep_gates_apart(model) == 1


def test_other_layers_stay():
    assert keep_gates_apart(gated(gelu, one_input=False)) == 0


@pytest.mark.parametrize(
    ("family", "part"), [("stable-diffusion-3", "text_encoder_3"), ("z-image", "text_encoder")], ids=["T5", "Qwen"]
)
def test_text_encoders_run_on_one_thread(tiny, tmp_path, family, part):
    from bakeoff.bake import export
    from bakeoff.recipe import parse
    from bakeoff.runtimes.engine import load

    recipe, _ = parse(f"torch:bf16,{part}=openvino:bf16")
    folder = tmp_path / "artifact"
    export(str(tiny(family)), folder, recipe, prove=False)
    with load(folder, threads=1) as engine:
        assert np.isfinite(engine.generate("a circle", steps=1, size=(64, 64)).images).all()


def test_what_keeps_gates_apart_has_the_same_name_in_each_copy():
    """Copies are looked into by names that another copy gave."""
    model = gated(gelu)
    copies = [model.clone(), model.clone()]
    names = []
    for copy in copies:
        keep_gates_apart(copy)
        names.append(
            {each.get_friendly_name() for each in copy.get_ordered_ops() if each.get_type_name() != "Constant"}
        )
    assert names[0] == names[1]
