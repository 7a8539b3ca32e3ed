"""Planted defects: each is caught by a gate, and the sound pipeline passes them all."""

import math

import numpy as np
import pytest
import torch

import bakeoff
from bakeoff.bench.quality import figures
from bakeoff.errors import ParityError
from bakeoff.reports.gates import gates
from bakeoff.reports.remarks import unfair

PROMPTS = [
    "a large red circle on a white background",
    "a small blue star above a large green ring on a gray background",
    "a large yellow square left of a small purple triangle on a black background",
]
NEGATIVE = "a large green square on a black background"


@pytest.fixture
def engine(shapes):
    with bakeoff.load(shapes, device="cpu", threads=1) as engine:
        yield engine


def draw(engine):
    return engine.generate(PROMPTS, negative_prompts=NEGATIVE, seeds=3, guidance_scale=3.0, steps=6).images


@pytest.fixture(scope="module")
def expected():
    from pathlib import Path

    with bakeoff.load(Path(bakeoff.__file__).parent / "models" / "shapes", device="cpu", threads=1) as engine:
        return draw(engine)


def judged(expected, got, *, precision="fp32"):
    told = figures(expected, got, PROMPTS, scorer=True)
    return gates([precision], told, figures(expected, expected, PROMPTS, scorer=True), None, [])


def fails(expected, got):
    return any(gate.holds is False for gate in judged(expected, got))


def test_the_sound_pipeline_passes(engine, expected):
    assert all(gate.holds for gate in judged(expected, draw(engine)))


def test_a_black_picture(expected):
    found = {gate.name: gate.holds for gate in judged(expected, np.zeros_like(expected))}
    assert found["pictures"] is False


def test_nan_latents(engine):
    latents = torch.full((3, 4, 16, 16), math.nan)
    with pytest.raises(ParityError):
        engine.generate(PROMPTS, latents=latents, steps=2)


def test_guidance_applied_twice(engine, expected, monkeypatch):
    monkeypatch.setattr(type(engine), "_guidance", lambda self, request: request.guidance[0] * 2)
    assert fails(expected, draw(engine))


def test_the_negative_prompt_ignored(engine, expected):
    got = engine.generate(PROMPTS, seeds=3, guidance_scale=3.0, steps=6).images
    assert fails(expected, got)


def test_the_vae_scaling_dropped(engine, expected, monkeypatch):
    vae = engine.pipeline.vae
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, *rest, **named: decode(z * vae.config.scaling_factor, *rest, **named))
    assert fails(expected, draw(engine))


def test_swapped_colour_channels(expected):
    assert fails(expected, expected[..., ::-1].copy())


def test_another_size(expected):
    found = judged(expected, expected[:, :32])
    assert [(gate.name, gate.holds) for gate in found] == [("size", False)]


def test_one_layer_zeroed(copied, expected):
    from safetensors.torch import load_file, save_file

    folder = copied("torch:fp32")
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    name = "mid_block.resnets.0.conv1.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    file.unlink()  # it may be a link to the source's own bytes
    save_file(tensors, file, metadata={"format": "pt"})
    with bakeoff.load(folder, device="cpu", threads=1) as engine:
        assert fails(expected, draw(engine))


def test_an_arm_that_runs_int8_secretly(tmp_path, copied):
    """An ONNX folder whose UNet somebody quantized, and which says it is fp32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = copied("onnx:fp32")
    (folder / "bakeoff.json").unlink()
    whole = tmp_path / "whole.onnx"
    model = onnx.load(folder / "unet" / "model.onnx")
    del model.graph.value_info[:]  # ONNX Runtime's quantizer replaces Gemm, and trips over the shapes from before
    onnx.save(model, whole)
    quantize_dynamic(whole, folder / "unet" / "model.onnx", weight_type=QuantType.QUInt8, op_types_to_quantize=["Conv"])
    with bakeoff.load(folder, device="cpu", threads=1) as engine:
        engine.generate(PROMPTS[0], seeds=3, steps=1)
        told = engine.configuration
    assert told["unet"]["precision"]["int8"] > 0
    run = {"configuration": {"adapter": told}}
    assert any("int8" in text for text in unfair([run], [], ["fp32"]))


def test_half_precision_is_judged_by_torchs_own(expected):
    near = expected.copy()
    near[:, ::7] = near[:, ::7] // 2 * 2
    floor = figures(expected, near, PROMPTS, scorer=True)
    same = gates(["bf16"], figures(expected, near, PROMPTS, scorer=True), None, floor, [])
    far = gates(["bf16"], figures(expected, 255 - expected, PROMPTS, scorer=True), None, floor, [])
    assert [gate.holds for gate in same] == [True, True]
    assert [gate.holds for gate in far] == [True, False]


def test_a_quantized_arm_is_judged_by_what_its_prompts_say():
    def told(right):
        return {"flat": [False], "right": right, "flip": [0.1], "psnr_db": [20.0]}

    rng = np.random.default_rng(0)
    reference = told([True] * 2000)
    close, lost = (told((rng.random(2000) > share).tolist()) for share in (0.005, 0.05))
    assert gates(["int8"], close, reference, None, [])[1].holds
    assert gates(["int8"], lost, reference, None, [])[1].holds is False
    few = gates(["int8"], told([True] * 64), told([True] * 64), None, [])[1]
    assert few.holds is None
    assert "1024 needed" in few.detail
    better = gates(["int8"], reference, lost, None, [])[1]
    assert better.holds is None
    assert "better than what it was made from" in better.detail


def test_every_low_bit_format_has_a_limit():
    """One without would be held to float32's."""
    from bakeoff import plugins
    from bakeoff.reports.gates import LOST_POINTS

    assert set(LOST_POINTS) == set(plugins.names("formats"))
