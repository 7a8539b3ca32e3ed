"""Diffusers itself as an arm of a bench: it makes our pictures, bit for bit, and is measured beside ours."""

import numpy as np
import pytest

from bakeoff.bench import runner
from bakeoff.bench.adapters import bakeoff_engine, diffusers_pipeline
from bakeoff.bench.experiment import Arm, Experiment
from bakeoff.bench.work import write_latents
from bakeoff.reports.summary import summarize

PROMPTS = ["a red circle", "a blue square on a white background"]


def drawn(adapter, folder, work, latents):
    made = adapter({"folder": str(folder), "threads": 1})
    return made.generate(PROMPTS, latents, work), np.array(made.trajectory(PROMPTS, latents, work))


@pytest.mark.parametrize(
    ("family", "scheduler", "negative"),
    [
        ("stable-diffusion", None, None),
        ("stable-diffusion", "EulerDiscreteScheduler", None),
        ("stable-diffusion", None, "noise"),
        ("stable-diffusion-xl", None, "noise"),
        ("stable-diffusion-3", None, None),
        ("flux", None, None),
        ("z-image", None, None),
    ],
)
def test_diffusers_itself_makes_the_same_pictures(tiny, tmp_path, family, scheduler, negative):
    folder, file = tiny(family), tmp_path / "latents.npy"
    write_latents(str(folder), ["a/0", "a/1"], 64, 64, str(file))
    size = {"height": 64, "width": 64, "seeds": [0, 1]}
    work = {"steps": 3, "guidance_scale": 3.0, "negative_prompt": negative, "scheduler": scheduler, **size}
    theirs, their_steps = drawn(diffusers_pipeline.Adapter, folder, work, np.load(file))
    ours, our_steps = drawn(bakeoff_engine.Adapter, folder, work, np.load(file))
    assert theirs.shape == (2, 64, 64, 3)
    assert np.array_equal(theirs, ours)
    assert np.array_equal(their_steps, our_steps)


def test_a_negative_prompt_that_diffusers_would_leave_out_is_refused(tiny):
    work = {"steps": 1, "guidance_scale": 3.0, "negative_prompt": "noise", "scheduler": None, "height": 64, "width": 64}
    adapter = diffusers_pipeline.Adapter({"folder": str(tiny("flux")), "threads": 1})
    with pytest.raises(ValueError, match="FluxPipeline has its guidance built in"):
        adapter.generate(PROMPTS, np.zeros((2, 16, 64), np.float32), work)


@pytest.mark.slow
def test_diffusers_itself_is_an_arm(shapes, tmp_path):
    theirs = Arm("Diffusers", adapter="diffusers_pipeline", options={"folder": str(shapes)}, precision="fp32")
    few = {"quality_prompts": 2, "timed_prompts": 2, "steps": 2, "blocks": 2, "repetitions": 2}
    ours = Arm("torch:fp32", recipe="torch:fp32")
    declared = Experiment(model="shapes", arms=(ours, theirs), baseline=ours.name, guidance_scale=3.0, **few)
    row = {row.name: row for row in summarize(runner.run(declared, tmp_path)).rows}["Diffusers"]
    assert row.failure is None
    assert not row.unfair
    assert all(gate.holds for gate in row.gates if gate.name != "no prompt cache")
    assert set(row.figures["psnr_db"]) == {200.0}
