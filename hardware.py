"""What this machine is and which devices it can run on. Detection alone: nothing here runs a model."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import nvidia
from .errors import RecipeError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_INSTRUCTION_SETS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "sve", "bf16", "i8mm",
)  # fmt: skip

_EXACT_BYTES = {"avx_vnni", "avx512_vnni", "amx_int8"}
_X86 = {"x86_64", "amd64", "i386", "i686", "x86"}
OVERFLOWS = "this CPU's products of bytes overflow (it has no VNNI)"
"""Why products of 8-bit integers aren't what a backend takes here."""


@dataclass(frozen=True)
class Availability:
    """Whether something can be used here; if not, why, and the line to type."""

    ok: bool
    reason: str
    fix: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "reason": self.reason, "fix": self.fix}


def usable_cores() -> int:
    """Count the physical cores that this process may use: the default number of threads of every runtime."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def overflows_bytes() -> bool:
    """Whether the quick products of signed and unsigned bytes are wrong on this processor where both are large.

    x86 without VNNI has `vpmaddubsw` for them: sums of two products in 16 bits, which stop at 32,767 of up to 64,770.
    Where the instruction sets aren't known they are taken to be wanting.
    """
    if platform.machine().lower() not in _X86:
        return False
    return not has_instructions(*_EXACT_BYTES)


def has_instructions(*names: str) -> bool:
    """Whether this processor has any of some instruction sets, as Linux names them."""
    return bool({*names} & {*_cpuinfo().get("flags", "").split()})


def instruction_sets() -> list[str]:
    """Return the instruction sets of this processor that decide how it multiplies, as Linux names them."""
    flags = _cpuinfo().get("flags", "").split()
    return [name for name in _INSTRUCTION_SETS if name in flags]


def processor() -> dict[str, Any]:
    """Return this processor's name and its instruction sets."""
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return {"cpu": name, "instruction_sets": instruction_sets()}


def describe() -> dict[str, Any]:
    """Describe processor, instruction sets, caches, memory and GPUs."""
    import psutil

    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **processor(),
        "exact_byte_products": not overflows_bytes(),
        "caches_bytes": _caches(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": nvidia.describe(),
    }


def _caches() -> dict[str, int]:
    """Return the caches of the first core, in bytes, by level and kind; some of them other cores share."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            found[f"L{level} {kind.lower()}"] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    info = {key.strip(): value.strip() for key, _, value in pairs}
    info.setdefault("flags", info.get("Features", ""))
    return info


def devices() -> dict[str, Availability]:
    """Return every device that a placement may name, and whether it is here."""
    return {name: detect() for name, detect in _DETECTORS.items()}


def _cpu() -> Availability:
    return Availability(ok=True, reason="always there")


def _torch_device(name: str, there: Callable[[Any], bool], fix: str) -> Callable[[], Availability]:
    def detect() -> Availability:
        if importlib.util.find_spec("torch") is None:
            return Availability(ok=False, reason="torch is not installed", fix="pip install torch")
        import torch

        if there(torch):
            return Availability(ok=True, reason=f"torch {torch.__version__} sees one")
        return Availability(ok=False, reason=f"torch {torch.__version__} sees no {name} device", fix=fix)

    return detect


def _directml() -> Availability:
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        if "DmlExecutionProvider" in onnxruntime.get_available_providers():
            return Availability(ok=True, reason="ONNX Runtime has DmlExecutionProvider")
    return Availability(
        ok=False, reason="no ONNX Runtime with DirectML here", fix="on Windows: pip install onnxruntime-directml"
    )


def _openvino(kind: str) -> Callable[[], Availability]:
    def detect() -> Availability:
        if importlib.util.find_spec("openvino") is None:
            return Availability(ok=False, reason="openvino is not installed", fix="pip install 'bakeoff[openvino]'")
        import openvino

        found = [device for device in openvino.Core().available_devices if device.startswith(kind)]
        if found:
            return Availability(ok=True, reason=f"OpenVINO sees {', '.join(found)}")
        fix = f"install Intel's {kind} driver (https://docs.openvino.ai/install)"
        return Availability(ok=False, reason=f"OpenVINO sees no {kind} device", fix=fix)

    return detect


_DETECTORS: dict[str, Callable[[], Availability]] = {
    "cpu": _cpu,
    "cuda": _torch_device(
        "CUDA",
        lambda torch: torch.cuda.is_available() and not torch.version.hip,
        "bakeoff doctor says what a GPU lacks; torch for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu130",
    ),
    "rocm": _torch_device(
        "ROCm",
        lambda torch: torch.cuda.is_available() and bool(torch.version.hip),
        "install AMD's driver and torch for ROCm",
    ),
    "xpu": _torch_device("XPU", lambda torch: torch.xpu.is_available(), "install Intel's GPU driver and torch for XPU"),
    "mps": _torch_device("MPS", lambda torch: torch.backends.mps.is_available(), "MPS needs a Mac with Apple silicon"),
    "directml": _directml,
    "gpu": _openvino("GPU"),
    "npu": _openvino("NPU"),
}
DEVICES = tuple(_DETECTORS)


def choose_device(asked: str, supported: Sequence[str], backend: str) -> tuple[str, str | None]:
    """Choose a device that is here among those a runtime supports, best first.

    Returns:
        The device, and the reason if it isn't the one that was asked for.

    Raises:
        RecipeError: no device has that name.
    """
    if asked == "auto":
        return next((name for name in supported if _DETECTORS[name]().ok), "cpu"), None
    if asked not in _DETECTORS:
        raise RecipeError(unknown("device", asked, [*DEVICES, "auto"]))
    if asked not in supported:
        return "cpu", f"{backend} doesn't run on {asked} (it runs on {', '.join(supported)}): using cpu"
    found = _DETECTORS[asked]()
    return (asked, None) if found.ok else ("cpu", f"{asked}: {found.reason}: using cpu")
