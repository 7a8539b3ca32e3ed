"""CUDA devices, looked for in a child process: a driver or a library that isn't right ends a process, not always with an error."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import BakeoffError
from .memory import in_child

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76
"""CUDA's numbers of the attributes that are a device's compute capability."""
_NAME_BYTES = 256


@dataclass(frozen=True)
class Device:
    """A GPU on which a CUDA context could be made."""

    name: str
    capability: str
    """Such as `9.0`."""
    memory_bytes: int
    free_bytes: int
    """When it was looked for."""
    driver: str | None
    """Its version; None where nothing tells."""
    cuda: str
    """The newest CUDA that the driver has, such as `13.0`."""

    def at_least(self, major: int, minor: int = 0) -> bool:
        """Say whether its compute capability is that, or later."""
        return tuple(map(int, self.capability.split("."))) >= (major, minor)


@cache
def first() -> tuple[Device | None, str]:
    """Return the device that CUDA counts first, and why there is none."""
    try:
        found, _ = in_child("bakeoff.cuda:look", {})
    except BakeoffError as error:
        return None, f"looking for a CUDA device failed: {error.message}"
    return (Device(**found["device"]), "") if found["device"] else (None, found["reason"])


def free_bytes() -> int:
    """Ask the first device anew how much of its memory is free; 0 where there is none any more."""
    found, _ = in_child("bakeoff.cuda:look", {})
    return int(found["device"]["free_bytes"]) if found["device"] else 0


def look() -> dict[str, Any]:
    """Look for a device; runs in the child of `first` and `free_bytes`. Loads the driver, and makes and drops a context."""
    driver = _driver()
    if driver is None:
        return {"device": None, "reason": "there is no NVIDIA driver (libcuda.so.1)"}
    error = driver.cuInit(0)
    if error:
        return {"device": None, "reason": f"the NVIDIA driver finds no usable GPU (cuInit gave {error})"}
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if count.value < 1:
        return {"device": None, "reason": "the NVIDIA driver counts no GPU"}
    try:
        return {"device": asdict(_describe(driver)), "reason": ""}
    except OSError as problem:
        return {"device": None, "reason": str(problem)}


def _driver() -> Any:  # noqa: ANN401 - a library of C
    for name in _DRIVERS:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _describe(driver: Any) -> Device:  # noqa: ANN401
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _check(driver.cuDeviceGetName(name, _NAME_BYTES, device), "cuDeviceGetName")
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        _check(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "cuDeviceGetAttribute")
        numbers.append(number.value)
    version = ctypes.c_int()
    _check(driver.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "making a CUDA context")
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _check(driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
    return Device(
        name=name.value.decode(),
        capability=f"{numbers[0]}.{numbers[1]}",
        memory_bytes=total.value,
        free_bytes=free.value,
        driver=_driver_version(),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _check(error: int, what: str) -> None:
    if error:
        message = f"{what} failed with CUDA error {error}"
        raise OSError(message)


def _driver_version() -> str | None:
    """Read the driver's own version, such as `580.65.06`."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)
