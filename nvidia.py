"""What NVML tells of NVIDIA GPUs: what they are, who uses them, memory, energy, throttling. Empty without NVML.

NVML comes with the driver; its Python binding is `nvidia-ml-py` (`pip install 'bakeoff[nvidia]'`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

_THROTTLING = {"SwPowerCap": "power cap", "HwSlowdown": "hardware slowdown", "SwThermalSlowdown": "heat"}


@cache
def _devices() -> tuple[Any, list[Any]]:
    """Return the binding and a handle a GPU; none where there is no binding or no driver. NVML stays open."""
    try:
        import pynvml
    except ImportError:
        return None, []
    try:
        pynvml.nvmlInit()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None, []


def _told(function: Any, *arguments: Any) -> Any:  # noqa: ANN401 - the binding has no types
    """Return what the driver tells, or None where this GPU can't, or we may not ask."""
    nvml, _ = _devices()
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def describe() -> list[dict[str, Any]]:
    """Describe every GPU: name, driver, memory in bytes, power limit in watts."""
    nvml, devices = _devices()
    return [
        {
            "name": _text(nvml.nvmlDeviceGetName(device)),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(device).total,
            "power_limit_w": _thousandth(_told(nvml.nvmlDeviceGetPowerManagementLimit, device)),
        }
        for device in devices
    ]


def process_bytes(pid: int) -> int | None:
    """Return the device memory that a process holds now, on all GPUs, or None where nothing tells."""
    nvml, devices = _devices()
    held = [
        process.usedGpuMemory
        for device in devices
        for process in _told(nvml.nvmlDeviceGetComputeRunningProcesses, device) or ()
        if process.pid == pid and process.usedGpuMemory
    ]
    return sum(held) if held else None


def foreign_processes(pid: int) -> int:
    """Count the compute processes on all GPUs besides one."""
    nvml, devices = _devices()
    return sum(
        process.pid != pid
        for device in devices
        for process in _told(nvml.nvmlDeviceGetComputeRunningProcesses, device) or ()
    )


def throttled() -> list[str]:
    """Say why GPUs run slower than they could, now."""
    nvml, devices = _devices()
    reasons = [_told(nvml.nvmlDeviceGetCurrentClocksEventReasons, device) or 0 for device in devices]
    bits = (
        {text: getattr(nvml, f"nvmlClocksEventReason{name}", 0) for name, text in _THROTTLING.items()} if nvml else {}
    )
    return sorted({text for text, bit in bits.items() for reason in reasons if reason & bit})


def joules() -> dict[str, float]:
    """Return each GPU's energy counter, in joules since the driver was loaded."""
    nvml, devices = _devices()
    counters = {f"gpu{i}": _told(nvml.nvmlDeviceGetTotalEnergyConsumption, device) for i, device in enumerate(devices)}
    return {name: value / 1000 for name, value in counters.items() if value is not None}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000
