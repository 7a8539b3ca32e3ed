"""Our artifacts in other tools, each in an environment of its own (`make test-interop`)."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bakeoff.artifact import MANIFEST
from bakeoff.pictures import psnr

SCRIPTS = Path(__file__).parent / "interop"
PROMPTS = [
    "a large red circle on a white background",
    "a small blue star above a large green ring on a gray background",
]
STEPS, GUIDANCE = 8, 3.0

pytestmark = pytest.mark.interop


@pytest.fixture
def latents(tmp_path):
    noise = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    np.save(tmp_path / "latents.npy", noise.numpy())
    return noise


def ours(folder, latents, prompts):
    import bakeoff

    with bakeoff.load(folder, device="cpu") as engine:
        return engine.generate(prompts, latents=latents[: len(prompts)], steps=STEPS, guidance_scale=GUIDANCE).images


def run(python, script, *arguments):
    finished = subprocess.run(
        [os.environ[python], SCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.mark.parametrize(
    ("recipe", "class_name"),
    [("onnx:fp32", "ORTStableDiffusionPipeline"), ("openvino:fp32", "OVStableDiffusionPipeline")],
)
def test_optimum_makes_the_same_pictures(copied, latents, tmp_path, recipe, class_name):
    folder = copied(recipe)
    expected = ours(folder, latents, PROMPTS)
    (folder / MANIFEST).unlink()
    out = tmp_path / "out.npy"
    run(
        "INTEROP_PYTHON",
        "optimum_generate.py",
        class_name,
        folder,
        tmp_path / "latents.npy",
        out,
        STEPS,
        GUIDANCE,
        *PROMPTS,
    )
    got = np.load(out)
    assert min(psnr(a, b) for a, b in zip(expected, got, strict=True)) >= 45


def test_openvino_genai_makes_the_same_picture(copied, latents, tmp_path):
    folder = copied("openvino:fp32")
    expected = ours(folder, latents, PROMPTS[:1])
    out = tmp_path / "out.npy"
    np.save(tmp_path / "one.npy", latents[:1].numpy())
    run("GENAI_PYTHON", "genai_generate.py", folder, tmp_path / "one.npy", out, STEPS, GUIDANCE, PROMPTS[0])
    assert psnr(expected[0], np.load(out)[0]) >= 45


def compared(folder, adapter, python, tmp_path, **fields):
    """Run a short bench of our runtime and a peer's on one folder; return the peer's row."""
    from bakeoff.bench.experiment import Arm, Experiment
    from bakeoff.bench.runner import run
    from bakeoff.reports.summary import summarize

    peer = Arm("peer", adapter=adapter, python=os.environ[python], options={"folder": str(folder)})
    given = {"timed_prompts": 2, "quality_prompts": 2, "steps": 4, "blocks": 2, "repetitions": 2, "guidance_scale": 3.0}
    declared = Experiment(
        "shapes", (Arm("ours", folder=str(folder)), peer), "ours", reference="ours", **given, **fields
    )
    rows = {row.name: row for row in summarize(run(declared, tmp_path / "run", print)).rows}
    assert rows["ours"].failure is None
    return rows["peer"]


@pytest.mark.parametrize("recipe", ["onnx:fp32", "openvino:fp32"])
def test_optimum_is_an_arm(copied, tmp_path, recipe):
    row = compared(copied(recipe), "optimum_pipeline", "INTEROP_PYTHON", tmp_path)
    assert row.failure is None
    assert min(row.figures["psnr_db"]) >= 45
    assert row.verdict


def test_openvino_genai_is_an_arm(copied, latents, tmp_path):
    folder = copied("openvino:fp32")
    np.save(tmp_path / "one.npy", latents[:1].numpy())
    run("GENAI_PYTHON", "genai_generate.py", folder, tmp_path / "one.npy", tmp_path / "out.npy", 1, 3.0, PROMPTS[0])
    row = compared(folder, "openvino_genai_pipeline", "GENAI_PYTHON", tmp_path, height=64, width=64)
    assert row.failure is None
    assert min(row.figures["psnr_db"]) >= 45


def test_what_optimum_exports_opens_in_bakeoff(shapes, latents, tmp_path):
    """An ONNX folder that optimum-cli writes, marked unproved, gives the picture of the original."""
    import bakeoff

    folder = tmp_path / "theirs"
    command = [Path(os.environ["INTEROP_PYTHON"]).parent / "optimum-cli", "export", "onnx", "--model", shapes]
    finished = subprocess.run(
        [*command, "--task", "text-to-image", folder], capture_output=True, text=True, check=False, timeout=900
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    with bakeoff.load(folder, device="cpu") as engine:
        assert not engine.proved
        got = engine.generate(PROMPTS, latents=latents, steps=STEPS, guidance_scale=GUIDANCE).images
    expected = ours(shapes, latents, PROMPTS)
    assert min(psnr(a, b) for a, b in zip(expected, got, strict=True)) >= 45
