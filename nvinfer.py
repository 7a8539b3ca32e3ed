"""The way to TensorRT's Python module, which is handed out only where a usable CUDA device was found first.

Making any TensorRT object without a driver ends the process. So nothing else imports the module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from . import cuda
from .errors import UnavailableError
from .hardware import Availability

if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = "tensorrt-cu13"
MAJOR = 11
_KEPT = {"INTERNAL_ERROR", "ERROR", "WARNING"}
_FIX = "on a machine with an NVIDIA GPU and driver: pip install 'bakeoff[tensorrt]', and torch for CUDA"


def available() -> Availability:
    """Say whether engines can be built here; without making any TensorRT object."""
    version, device, reason = _installed(), *cuda.first()
    missing = []
    if version is None:
        missing.append(f"{PACKAGE} is not installed")
    elif int(version.partition(".")[0]) != MAJOR:
        missing.append(f"{PACKAGE} {version} is not TensorRT {MAJOR}")
    if device is None:
        missing.append(reason)
    if missing:
        return Availability(ok=False, reason="; ".join(missing), fix=_FIX)
    assert device is not None  # noqa: S101 - or it would be missing
    return Availability(ok=True, reason=f"TensorRT {version}, {device.name} (compute capability {device.capability})")


def runnable() -> Availability:
    """Say whether engines can run here: torch has to see the GPU as well, since its tensors are what they read and write."""
    found = available()
    obstacle = _torch_obstacle()
    if obstacle is None:
        return found
    reason = obstacle if found.ok else f"{found.reason}; {obstacle}"
    return Availability(ok=False, reason=reason, fix=_FIX)


def library() -> ModuleType:
    """Return the `tensorrt` module.

    Raises:
        UnavailableError: it isn't installed, isn't of the version that this code is for, or there is no usable GPU.
    """
    found = available()
    if not found.ok:
        message = f"TensorRT can't be used: {found.reason}"
        raise UnavailableError(message, fix=found.fix)
    return importlib.import_module("tensorrt")


def device() -> cuda.Device:
    """Return the GPU that engines are built for.

    Raises:
        UnavailableError: there is none.
    """
    found, reason = cuda.first()
    if found is None:
        message = f"TensorRT can't be used: {reason}"
        raise UnavailableError(message, fix=_FIX)
    return found


def free_bytes() -> int:
    """Return how much of that GPU's memory is free now."""
    return cuda.free_bytes()


def binding() -> dict[str, Any]:
    """Return what a plan is bound to.

    Raises:
        UnavailableError: as `library`.
    """
    trt, gpu = library(), device()
    return {
        "tensorrt": str(trt.__version__),
        "onnx_parser": str(trt.get_nv_onnx_parser_version()),
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "driver": gpu.driver,
        "cuda": gpu.cuda,
    }


def logger(trt: ModuleType, lines: list[str]) -> Any:  # noqa: ANN401 - tensorrt is untyped
    """Return the process's logger; warnings and errors go into `lines` from here on: severity, colon, message.

    TensorRT keeps the first logger that it is given for all that comes, and doesn't keep it alive: so there is one.
    """
    made = _logger(trt)
    made.lines = lines
    return made


@functools.cache
def _logger(trt: ModuleType) -> Any:  # noqa: ANN401
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:  # noqa: ANN401
            if severity.name in _KEPT:
                self.lines.append(f"{severity.name}: {msg}")

    return Log()


def _installed() -> str | None:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_obstacle() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"
