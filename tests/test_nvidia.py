"""What is asked of NVML, against the names and arguments of the real binding, by a stand-in for the driver."""

import os
import time
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

from bakeoff import nvidia
from bakeoff.bench import energy, guard
from bakeoff.reports.record import joules_of

pynvml = pytest.importorskip("pynvml", reason="pip install 'bakeoff[nvidia]'")
ELSEWHERE = 2**22 + 7
"""No process here has this number."""


@pytest.fixture
def driver(monkeypatch):
    """Stand in for a driver with two GPUs: functions that the binding doesn't have, or other arguments, raise."""
    made = create_autospec(pynvml)
    made.NVMLError = pynvml.NVMLError
    for name in dir(pynvml):
        if name.isupper() or name.startswith(("nvmlClocksEventReason", "NVML_")):
            setattr(made, name, getattr(pynvml, name))
    made.nvmlDeviceGetCount.return_value = 2
    made.nvmlDeviceGetHandleByIndex.side_effect = lambda index: f"gpu {index}"
    made.nvmlDeviceGetUUID.side_effect = lambda handle: f"GPU-{handle[-1]}abc"
    made.nvmlDeviceGetName.return_value = "NVIDIA H100"
    made.nvmlDeviceGetCudaComputeCapability.return_value = (9, 0)
    made.nvmlSystemGetDriverVersion.return_value = b"580.1"
    made.nvmlSystemGetCudaDriverVersion.return_value = 13010
    made.nvmlDeviceGetMemoryInfo.return_value = SimpleNamespace(total=80 * 2**30)
    made.nvmlDeviceGetPowerManagementLimit.return_value = 700_000
    made.nvmlDeviceGetComputeRunningProcesses.return_value = []
    made.nvmlDeviceGetCurrentClocksEventReasons.return_value = 0
    made.nvmlDeviceGetTotalEnergyConsumption.side_effect = lambda handle: 5000 + int(handle[-1])
    made.nvmlDeviceGetClockInfo.return_value = 1755
    made.nvmlDeviceGetMaxClockInfo.return_value = 1980
    made.nvmlDeviceGetTemperature.return_value = 61
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", made)
    nvidia._devices.cache_clear()
    yield made
    nvidia._devices.cache_clear()


def computing(*pids, size=2**30):
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid in pids]


def test_the_stand_in_refuses_what_the_binding_has_not(driver):
    with pytest.raises(AttributeError):
        driver.nvmlDeviceGetJoules("gpu 0")
    with pytest.raises(TypeError):
        driver.nvmlDeviceGetClockInfo("gpu 0")


def test_gpus_are_described(driver):
    first, _ = nvidia.describe()
    assert first == {
        "name": "NVIDIA H100",
        "compute_capability": "9.0",
        "driver": "580.1",
        "driver_cuda": "13.1",
        "memory_bytes": 80 * 2**30,
        "power_limit_w": 700.0,
    }


@pytest.mark.parametrize(("visible", "count"), [("1", 1), ("GPU-0abc", 1), ("0,1", 2), ("", 0), (None, 2)])
def test_hidden_gpus_are_none_of_ours(driver, monkeypatch, visible, count):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(nvidia.describe()) == len(nvidia.joules()) == count


def test_memory_is_a_processs_own(driver):
    driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(os.getpid(), 1)
    assert nvidia.process_bytes(os.getpid()) == 2 * 2**30  # on two GPUs
    assert nvidia.process_bytes(ELSEWHERE) is None
    driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(ELSEWHERE)
    assert nvidia.process_bytes(os.getpid()) == 2 * 2**30  # in a container, the only one there is
    driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(ELSEWHERE, ELSEWHERE + 1)
    assert nvidia.process_bytes(os.getpid()) is None


def test_foreign_processes_taint_a_run_and_ones_own_do_not(driver):
    driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(os.getpid())
    before = guard.read(os.getpid())
    assert before.gpus.foreign == 0
    driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(os.getpid(), 1)
    after = guard.read(os.getpid())
    assert any("1 other processes used a GPU" in text for text in guard.between(before, after)["tainted"])


def test_resident_arms_are_not_foreign(driver):
    import subprocess
    import sys

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(os.getpid(), child.pid)
        assert guard.read(os.getpid()).gpus.foreign == 0
        child.stdin.close()


def test_in_a_container_as_many_as_ours_are_left_out(driver):
    driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(ELSEWHERE, ELSEWHERE + 1)
    assert nvidia.foreign_processes({os.getpid()}) == 1
    assert nvidia.foreign_processes({os.getpid(), 1}) == 0


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("SwPowerCap", ["power cap"]),
        ("HwThermalSlowdown", ["heat"]),
        ("HwPowerBrakeSlowdown", ["power brake"]),
        ("GpuIdle", []),
    ],
)
def test_throttling_is_said(driver, reason, said):
    driver.nvmlDeviceGetCurrentClocksEventReasons.return_value = getattr(pynvml, f"nvmlClocksEventReason{reason}")
    assert nvidia.throttled() == said
    told = guard.between(guard.read(os.getpid()), guard.read(os.getpid()))
    assert any("held back" in text for text in told["tainted"]) == bool(said)
    assert told["gpu_clocks"][0] == {
        "lowest_sm_mhz": 1755, "median_sm_mhz": 1755, "most_sm_mhz": 1980, "celsius": 61
    }  # fmt: skip


def test_gpus_are_watched_while_a_run_is_timed_not_only_after_it(driver, monkeypatch):
    monkeypatch.setattr(guard, "SAMPLE_EVERY_S", 0.001)
    clocks, seen = [1980, 1200, 1755], []

    def while_it_runs(_):
        seen.append(True)
        return pynvml.nvmlClocksEventReasonSwPowerCap if len(seen) == 3 else 0

    with guard.Watch(os.getpid(), "GPU-1abc") as watch:
        driver.nvmlDeviceGetCurrentClocksEventReasons.side_effect = while_it_runs
        driver.nvmlDeviceGetComputeRunningProcesses.return_value = computing(1)
        driver.nvmlDeviceGetClockInfo.side_effect = lambda *_: clocks[len(seen) % 3]
        until = time.monotonic() + 20
        while len(seen) < 7 and time.monotonic() < until:
            time.sleep(0.001)
        driver.nvmlDeviceGetComputeRunningProcesses.return_value = []
        driver.nvmlDeviceGetClockInfo.side_effect = lambda *_: 300  # idle
        driver.nvmlDeviceGetCurrentClocksEventReasons.side_effect = lambda _: 0
    told = watch.told()
    assert told["gpu_samples"] >= 7
    assert "1 other processes used a GPU" in told["tainted"]
    assert "a GPU was held back by power cap" in told["tainted"]
    (of_one,) = told["gpu_clocks"]
    assert of_one["lowest_sm_mhz"] in {300, 1200}  # a last sample may be an idle one
    assert of_one["median_sm_mhz"] > 300


def test_the_gpu_in_use_alone_is_asked(driver, tmp_path):
    assert set(nvidia.joules("GPU-1abc")) == {"gpu1"}
    assert set(nvidia.joules("GPU-nowhere")) == set(nvidia.joules(None)) == {"gpu0", "gpu1"}
    busy = {"gpu 0": computing(1), "gpu 1": computing(os.getpid())}
    driver.nvmlDeviceGetComputeRunningProcesses.side_effect = busy.get
    driver.nvmlDeviceGetCurrentClocksEventReasons.side_effect = lambda handle: (
        pynvml.nvmlClocksEventReasonSwPowerCap if handle == "gpu 0" else 0
    )
    assert guard.read(os.getpid(), "GPU-1abc").gpus.foreign == 0
    assert guard.read(os.getpid(), "GPU-0abc").gpus.foreign == 1
    assert nvidia.throttled("GPU-1abc") == []
    assert nvidia.throttled("GPU-0abc") == ["power cap"]
    assert len(nvidia.clocks("GPU-1abc")) == 1
    spent = {"gpu1": 5.0, "package-0 (intel-rapl:0)": 3.0}
    assert (joules_of(spent, gpus=True), joules_of(spent, gpus=False)) == (5.0, 3.0)
    assert joules_of(None, gpus=True) is joules_of({"gpu0": 1.0}, gpus=False) is None


def test_torch_says_which_gpu_is_in_use(monkeypatch):
    import torch

    assert nvidia.in_use() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"{index}abc"))
    assert nvidia.in_use() == "GPU-1abc"


def test_energy_is_counted_in_joules(driver, tmp_path):
    before = energy.read(rapl=tmp_path)
    driver.nvmlDeviceGetTotalEnergyConsumption.side_effect = lambda handle: 5000 + 250_000
    spent = energy.between(before, energy.read(rapl=tmp_path))
    assert spent["gpu0"] == pytest.approx(250.0)
    assert set(spent) == {"gpu0", "gpu1"}
    assert energy.between(after := energy.read(rapl=tmp_path), after) is None, "counters that stood still say nothing"


def test_what_a_gpu_cannot_tell_is_absent(driver):
    error = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    for name in ("TotalEnergyConsumption", "CurrentClocksEventReasons", "ComputeRunningProcesses", "ClockInfo"):
        getattr(driver, f"nvmlDeviceGet{name}").side_effect = error
    assert nvidia.joules() == {}
    assert nvidia.throttled() == []
    assert nvidia.process_bytes(os.getpid()) is None
    assert nvidia.clocks()[0]["sm_mhz"] is None


def test_without_a_driver_nothing_is_told(driver):
    driver.nvmlInit.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert nvidia.describe() == nvidia.clocks() == nvidia.throttled() == []
    assert nvidia.joules() == {}
    assert nvidia.foreign_processes({1}) == 0
