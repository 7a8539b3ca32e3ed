"""A part opened for AMX is computed in pieces, and what is looked at inside of it is what its graph names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino")
from openvino import opset13  # noqa: E402

from bakeoff.components.component import Port  # noqa: E402
from bakeoff.hardware import has_instructions  # noqa: E402
from bakeoff.parity.distance import relative_error  # noqa: E402
from bakeoff.recipe import Placement  # noqa: E402
from bakeoff.runtimes.openvino import OpenVINORuntime  # noqa: E402
from bakeoff.runtimes.runtime import PartFiles  # noqa: E402

CHANNELS, WIDTH = 512, 2048
"""Whose weight of two bytes takes 2 MB: four pieces."""


@pytest.fixture
def part(tmp_path):
    generator = np.random.default_rng(0)

    def product(given, outputs, inputs):
        weight = generator.standard_normal((outputs, inputs), dtype=np.float32) * np.float32(inputs**-0.5)
        return opset13.matmul(given, opset13.constant(weight), transpose_a=False, transpose_b=True)

    given = opset13.parameter([-1, -1, CHANNELS], openvino.Type.f32, name="given")
    given.output(0).set_names({"given"})
    gate = opset13.gelu(product(given, WIDTH, CHANNELS), "TANH")
    made = product(opset13.multiply(gate, product(given, WIDTH, CHANNELS)), CHANNELS, WIDTH)
    made.output(0).set_names({"made"})
    openvino.save_model(
        openvino.Model([made], [given], "gated"), tmp_path / "openvino_model.xml", compress_to_fp16=False
    )
    (tmp_path / "layers.json").write_text("{}")
    dims = ("batch", "tokens", CHANNELS)
    ports = ((Port("given", "float32", dims),), (Port("made", "float32", dims),))
    return lambda precision: PartFiles("gated", tmp_path, precision, *ports, build=lambda _: None)


def opened(part, precision, threads=1):
    return OpenVINORuntime(part(precision), Placement(device="cpu", threads=threads))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_part_in_pieces_gives_what_it_gave(part, threads):
    given = {"given": torch.randn((2, 5, CHANNELS), generator=torch.Generator().manual_seed(1))}
    with opened(part, "fp32", threads) as runtime:
        expected = runtime.run(given)["made"]
        assert runtime.configuration["precision"] == {"f32": 3}
    with opened(part, "bf16", threads) as runtime:
        assert relative_error(runtime.run(given)["made"], expected) < 0.02
        assert runtime.configuration["precision"] == {"bf16": 2 * 4 + 1 if has_instructions("amx_bf16") else 3}


def test_tensors_inside_are_found_by_the_names_of_operations(part):
    given = {"given": torch.randn((1, 3, CHANNELS), generator=torch.Generator().manual_seed(1))}
    with opened(part, "bf16") as runtime:
        found = runtime.operations(given)
        names = [name for operation in found for name in operation.outputs]
        assert {operation.kind for operation in found} >= {"MatMul", "Gelu", "Multiply"}
        tapped = runtime.tap(given, names)
        assert relative_error(tapped[names[-1]], runtime.run(given)["made"]) < 0.02
