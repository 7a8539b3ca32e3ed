"""A pipeline's tensors on a device: drawn as in host memory, bit for bit, and of a step no latents, embeddings or masks cross.

The device isn't there (tests/device/standin.py): it refuses what a GPU would refuse, and computes on the CPU.
"""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from bakeoff import plugins
from bakeoff.bake import export
from bakeoff.components.standin import is_there
from bakeoff.recipe import parse

SCRIPT = Path(__file__).parent / "device" / "pictures.py"
OFTEN = ("stable-diffusion", "flux")
MIXED = "torch:fp32,text_encoder=openvino:fp32,vae_decoder=onnx:fp32"
FEW = 16
"""Most elements of what may cross in a step: timesteps and scales, not latents."""


def drawn(*folders):
    """Draw each task of artifacts in a process that has the device; return what was told of them."""
    command = [sys.executable, str(SCRIPT), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def large(crossed):
    """Return what isn't a timestep or a scale of all that crossed."""
    return sorted((way, tuple(shape), count) for way, shape, count in crossed if prod(shape) > FEW)


def check(found):
    assert found["device"] == "standin"
    assert found["differs"] == 0
    assert found["told"] == ["cpu"], "callbacks get the host's latents"
    fewer, more = map(large, found["crossed"])
    assert fewer == more, "something crosses in each step"
    return more


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in plugins.names("families")],
)
def test_pictures_of_a_pipeline_on_a_device_are_the_hosts(tiny, tmp_path, family):
    source, artifacts = str(tiny(family)), [tmp_path / family]
    export(source, artifacts[0], parse("torch:fp32")[0], prove=False)
    for variant in next(each for each in plugins.families() if each.name == family).variants:
        artifacts.append(tmp_path / f"{family}-{variant}")
        beside = str(tiny(family, variant) / variant)
        export(source, artifacts[-1], parse("torch:fp32")[0], prove=False, controlnet=beside)
    lines = drawn(*artifacts)
    assert {line["artifact"] for line in lines} == {artifact.name for artifact in artifacts}
    for found in lines:
        assert [each for each in check(found) if each[0] == "out"] == [("out", (2, 3, 64, 96), 1)]


def test_a_device_has_several_names():
    first = torch.device("cuda")
    assert all(is_there(place, first) for place in ("cuda", "cuda:0", torch.device("cuda", 0)))
    assert not any(is_there(place, first) for place in ("cpu", "cuda:1", torch.float16, "fast", None, 3.0))
    assert is_there("cpu", torch.device("cpu"))


def test_parts_of_the_host_take_a_devices_tensors_and_give_them_back(tiny, tmp_path):
    artifact = tmp_path / "mixed"
    export(str(tiny("stable-diffusion")), artifact, parse(MIXED)[0], prove=False)
    for found in drawn(artifact):
        assert check(found)
