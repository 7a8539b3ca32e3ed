"""The loop that the engine's cost is measured against does the engine's work."""

import runpy
from pathlib import Path

import numpy as np
import torch

from bakeoff.runtimes.engine import load

FILE = Path(__file__).parent.parent / "docs" / "benchmarks" / "engine_overhead.py"
PROMPTS = [
    "a large red circle on a white background",
    "a small blue star above a large green ring on a gray background",
]


def test_its_pictures_are_the_engines_bit_for_bit(baked):
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    with load(baked("torch:fp32")) as engine:
        pictures = engine.generate(PROMPTS, steps=3, guidance_scale=3.0, latents=latents).images
        loop = runpy.run_path(FILE)["loop_of"](engine)
        direct = loop.generate(PROMPTS, latents, 3, 3.0)
    assert pictures.std() > 1
    assert np.array_equal(pictures, direct)
