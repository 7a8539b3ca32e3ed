"""The whole pipeline over 64 prompts, 20 steps: what the docs claim of fidelity. Slow."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import bakeoff
from bakeoff.models.prompts import prompt_set
from bakeoff.pictures import psnr

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(baked):
    prompts = [prompt.text for prompt in prompt_set("shapes-1024")[:64]]
    made = {}

    def generate(recipe):
        if recipe not in made:
            with bakeoff.load(baked(recipe), device="cpu") as engine:
                made[recipe] = engine.generate(prompts, seeds=100, steps=20, guidance_scale=3.0).images
        return made[recipe]

    return generate


def distances(pictures, recipe):
    """Root-mean-square difference from torch fp32 of each picture, in levels of 255."""
    difference = pictures(recipe).astype(float) - pictures("torch:fp32")
    return np.sqrt((difference**2).mean(axis=(1, 2, 3)))


def record(name, values):
    """Keep the figures where `RECORD` names a file, for the docs."""
    if "RECORD" in os.environ:
        file = Path(os.environ["RECORD"])
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, name: values}, indent=1) + "\n")


@pytest.mark.parametrize("recipe", ["onnx:fp32", "openvino:fp32"])
def test_fp32_is_the_same_picture_every_time(pictures, recipe):
    values = [psnr(a, b) for a, b in zip(pictures("torch:fp32"), pictures(recipe), strict=True)]
    record(recipe, {"worst_psnr_db": round(min(values), 2), "median_psnr_db": round(float(np.median(values)), 2)})
    assert min(values) >= 45


def test_bf16_is_no_farther_than_torchs_own_by_half(pictures):
    theirs, ours = distances(pictures, "torch:bf16").mean(), distances(pictures, "openvino:bf16").mean()
    record(
        "bf16",
        {
            "torch_mean_rms": round(float(theirs), 4),
            "openvino_mean_rms": round(float(ours), 4),
            "ratio": round(float(ours / theirs), 3),
        },
    )
    assert ours <= 1.5 * theirs
