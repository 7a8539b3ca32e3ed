"""`bakeoff doctor` where there is no GPU: what is missing, and how to get it; nothing crashes."""

import subprocess
import sys

import pytest

from bakeoff import cuda
from bakeoff.doctor import accelerators
from bakeoff.runtimes.providers import BY_DEVICE, CPU


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "first", lambda: (None, "there is no NVIDIA driver (libcuda.so.1)"))


def test_what_a_gpu_would_take_is_said_with_the_line_to_type(without_gpu):
    found = accelerators()
    assert found["NVIDIA GPU"].reason == "there is no NVIDIA driver (libcuda.so.1)"
    assert not found["fp8 in torch"].ok
    assert all(each.ok or (each.reason and each.fix) for each in found.values())
    assert {f"ONNX Runtime: {name}" for name in BY_DEVICE.values() if name != CPU} <= set(found)
    assert "onnx-gpu" in found["ONNX Runtime: CUDAExecutionProvider"].fix


@pytest.mark.parametrize(("capability", "ok"), [("8.6", False), ("8.9", True), ("9.0", True), ("12.0", True)])
def test_fp8_is_of_gpus_that_have_it(monkeypatch, capability, ok):
    import torch

    device = cuda.Device("a GPU", capability, 1, 1, "580.1", "13.0")
    monkeypatch.setattr(cuda, "first", lambda: (device, ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = accelerators()
    assert found["NVIDIA GPU"].ok
    assert found["fp8 in torch"].ok == ok


def test_the_command_says_it_in_lines():
    command = [sys.executable, "-P", "-m", "bakeoff", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "on a GPU (docs/gpu.md)" in done.stdout
    assert "TensorrtExecutionProvider" in done.stdout
    if cuda.first()[0] is None:
        assert "hint: NVIDIA's driver" in done.stdout
