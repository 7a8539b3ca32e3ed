"""What NVML tells of NVIDIA GPUs: what they are, who uses them, memory, energy, throttling. Empty without NVML.

NVML comes with the driver; its Python binding is `nvidia-ml-py` (`pip install 'bakeoff[nvidia]'`).
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

_THROTTLING = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat",
    "HwThermalSlowdown": "heat",
    "HwPowerBrakeSlowdown": "power brake",
}


@cache
def _devices() -> tuple[Any, list[Any]]:
    """Return the binding and a handle a GPU; none where there is no binding or no driver. NVML stays open."""
    try:
        import pynvml
    except ImportError:
        return None, []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return pynvml, _visible(pynvml, handles)
    except pynvml.NVMLError:
        return None, []


def _visible(nvml: Any, handles: list[Any]) -> list[Any]:  # noqa: ANN401 - the binding has no types
    """Leave out the GPUs that CUDA_VISIBLE_DEVICES hides, whose energy and processes aren't ours.

    By UUID, or by index, which is CUDA's where CUDA_DEVICE_ORDER is PCI_BUS_ID or there is one kind of GPU.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return handles
    wanted = [each.strip() for each in named.split(",") if each.strip()]
    names = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    return [
        handle
        for index, (handle, name) in enumerate(zip(handles, names, strict=True))
        if any(each == str(index) or (not each.isdecimal() and name.startswith(each)) for each in wanted)
    ]


def _told(function: Any, *arguments: Any) -> Any:  # noqa: ANN401 - the binding has no types
    """Return what the driver tells, or None where this GPU can't, or we may not ask."""
    nvml, _ = _devices()
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def in_use() -> str | None:
    """Return the UUID, as NVML spells it, of the GPU that torch computes on in this process; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or torch.version.hip:
        return None
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _of(gpu: str | None) -> tuple[Any, dict[str, Any]]:
    """Return the binding, and name -> handle of a GPU by its UUID; of all that are visible if none has it, or for None."""
    nvml, devices = _devices()
    named = {f"gpu{index}": device for index, device in enumerate(devices)}
    chosen = {name: each for name, each in named.items() if gpu and _text(nvml.nvmlDeviceGetUUID(each)) == gpu}
    return nvml, chosen or named


def has_any() -> bool:
    """Say whether NVML tells of a GPU at all."""
    return bool(_devices()[1])


def describe() -> list[dict[str, Any]]:
    """Describe every GPU: name, compute capability, driver, its CUDA, memory in bytes, power limit in watts."""
    nvml, devices = _devices()
    return [
        {
            "name": _text(nvml.nvmlDeviceGetName(device)),
            "compute_capability": _dotted(_told(nvml.nvmlDeviceGetCudaComputeCapability, device)),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "driver_cuda": _cuda(_told(nvml.nvmlSystemGetCudaDriverVersion)),
            "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(device).total,
            "power_limit_w": _thousandth(_told(nvml.nvmlDeviceGetPowerManagementLimit, device)),
        }
        for device in devices
    ]


def _processes(gpu: str | None = None) -> list[Any]:
    """Return what computes on a GPU, or on any. A process is there once a GPU; in a container its `pid` may be the host's."""
    nvml, devices = _of(gpu)
    return [
        process
        for device in devices.values()
        for process in _told(nvml.nvmlDeviceGetComputeRunningProcesses, device) or ()
    ]


def process_bytes(pid: int) -> int | None:
    """Return the device memory that a process holds now, on all GPUs, or None where nothing tells.

    In a container that sees the host's numbers of processes, a single process there can be no other than ours.
    """
    found = _processes()
    own = [process for process in found if process.pid == pid]
    if not own and len({process.pid for process in found}) == 1 and _is_elsewhere(found[0].pid):
        own = found
    held = [process.usedGpuMemory for process in own if process.usedGpuMemory]
    return sum(held) if held else None


def foreign_processes(ours: Collection[int], gpu: str | None = None) -> int:
    """Count the processes that compute on a GPU, or on any, besides ours.

    In a container that sees the host's numbers, those of ours can't be told apart: as many as we have are left out.
    """
    pids = {process.pid for process in _processes(gpu)}
    others = pids - set(ours)
    unknown = {pid for pid in others if _is_elsewhere(pid)}
    unseen = len(set(ours) - pids) if unknown else 0
    return len(others - unknown) + max(len(unknown) - unseen, 0)


def _is_elsewhere(pid: int) -> bool:
    """Say whether a process has no number here: it is outside of this container, or only its number is."""
    return not Path(f"/proc/{pid}").exists()


def clocks(gpu: str | None = None) -> list[dict[str, int | None]]:
    """Return a GPU's clock now and at most, in MHz, and its temperature in °C; of each without a UUID."""
    nvml, devices = _of(gpu)
    return [
        {
            "sm_mhz": _told(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM),
            "most_sm_mhz": _told(nvml.nvmlDeviceGetMaxClockInfo, device, nvml.NVML_CLOCK_SM),
            "celsius": _told(nvml.nvmlDeviceGetTemperature, device, nvml.NVML_TEMPERATURE_GPU),
        }
        for device in devices.values()
    ]


def throttled(gpu: str | None = None) -> list[str]:
    """Say why a GPU, or any, runs slower than it could, now."""
    nvml, devices = _of(gpu)
    reasons = [_told(nvml.nvmlDeviceGetCurrentClocksEventReasons, device) or 0 for device in devices.values()]
    bits = (
        [(text, getattr(nvml, f"nvmlClocksEventReason{name}")) for name, text in _THROTTLING.items()] if devices else []
    )
    return sorted({text for text, bit in bits for reason in reasons if reason & bit})


def joules(gpu: str | None = None) -> dict[str, float]:
    """Return a GPU's energy counter, in joules since the driver was loaded; of each without a UUID."""
    nvml, devices = _of(gpu)
    counters = {name: _told(nvml.nvmlDeviceGetTotalEnergyConsumption, device) for name, device in devices.items()}
    return {name: value / 1000 for name, value in counters.items() if value is not None}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _dotted(value: tuple[int, int] | None) -> str | None:
    return None if value is None else f"{value[0]}.{value[1]}"


def _cuda(value: int | None) -> str | None:
    """Spell CUDA's version, which NVML tells as 13010 for 13.1."""
    return None if value is None else f"{value // 1000}.{value % 1000 // 10}"


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000
