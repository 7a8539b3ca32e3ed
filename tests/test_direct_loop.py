"""The loop that the engine's cost is measured against does the engine's work."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from bakeoff.bench.adapters import bakeoff_engine

FILE = Path(__file__).parent.parent / "docs" / "benchmarks" / "direct_loop.py"
PROMPTS = [
    "a large red circle on a white background",
    "a small blue star above a large green ring on a gray background",
]


@pytest.fixture(scope="module")
def adapters(baked):
    options = {"folder": str(baked("torch:fp32")), "threads": 1}
    return bakeoff_engine.Adapter(options), runpy.run_path(FILE)["Adapter"](options)


@pytest.mark.parametrize("negative", [None, "a black background"])
def test_its_pictures_are_the_engines_bit_for_bit(adapters, negative):
    latents = np.random.default_rng(0).standard_normal((2, 4, 16, 16), dtype=np.float32)
    work = {
        "steps": 3,
        "guidance_scale": 3.0,
        "negative_prompt": negative,
        "height": None,
        "width": None,
        "scheduler": None,
    }
    engine, direct = (adapter.generate(PROMPTS, latents.copy(), work) for adapter in adapters)
    assert engine.std() > 1
    assert np.array_equal(engine, direct)


def test_its_runtimes_are_configured_as_the_engines(adapters):
    engine, direct = adapters
    direct_configuration = direct.configuration()
    assert engine.configuration() == {name: direct_configuration[name] for name in engine.configuration()}
