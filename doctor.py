"""`bakeoff doctor`: what this machine is, and which devices and backends can be used on it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from .terminal import print_json

if TYPE_CHECKING:
    import argparse

    from .hardware import Availability


def add_doctor(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser("doctor", help="show hardware, devices and backends")
    command.set_defaults(run=_doctor)
    return command


def _doctor(options: argparse.Namespace) -> None:
    from . import hardware, plugins
    from .memory import available_bytes

    machine = {**hardware.describe(), "available_bytes": available_bytes()}
    devices = hardware.devices()
    backends = {name: plugins.runtime(name).probe() for name in plugins.names("runtimes")}
    gpu = accelerators()
    if options.json:
        groups = {"devices": devices, "backends": backends, "gpu": gpu}
        told = {key: {name: found.as_dict() for name, found in group.items()} for key, group in groups.items()}
        print_json({"machine": machine, **told})
        return
    print(f"{machine['cpu']}, {machine['usable_cores']} cores to use, {', '.join(machine['instruction_sets'])}")
    print(f"{machine['memory_bytes'] / 1e9:.1f} GB of memory, {machine['available_bytes'] / 1e9:.1f} GB free")
    if not machine["exact_byte_products"]:
        print(f"{hardware.OVERFLOWS}: w8a8 runs exactly all the same, but slower than with it (docs/quantization.md)")
    for title, group in (("devices", devices), ("backends", backends), ("on a GPU (docs/gpu.md)", gpu)):
        print(f"\n{title}")
        width = max(10, *map(len, group))
        for name, found in group.items():
            print(f"  {'yes' if found.ok else 'no ':3} {name:{width}} {found.reason}")
            if found.fix and not found.ok:
                print(f"      {'':{width}} hint: {found.fix}")


def accelerators() -> dict[str, Availability]:
    """Return what there is to compute with on a GPU, and what each lacks here; nothing is opened in this process."""
    from . import cuda
    from .hardware import Availability
    from .quantize.fp8 import CAPABILITY

    device, reason = cuda.first()
    said = f"{device.name}, compute capability {device.capability}, driver {device.driver}" if device else reason
    driver = Availability(ok=device is not None, reason=said, fix=_DRIVER)
    found = {"NVIDIA GPU": driver, "torch for CUDA": _torch()}
    usable = driver.ok and found["torch for CUDA"].ok
    found["CUDA graphs, bitsandbytes"] = _needs(usable, "on CUDA in torch", "torch for CUDA, and a GPU")
    found["torch.compile"] = _needs(
        _has("triton"), "Triton is installed", "pip install triton (it comes with torch for CUDA)"
    )
    fp8 = device is not None and device.at_least(*CAPABILITY)
    found["fp8 in torch"] = _needs(usable and fp8, "torchao on this GPU", "a GPU of compute capability 8.9 or later")
    found |= {f"ONNX Runtime: {name}": each for name, each in _providers().items()}
    counters = _needs(_has("pynvml"), "nvidia-ml-py is installed", "pip install 'bakeoff[nvidia]'")
    found["energy, clocks, processes"] = counters
    return found


_DRIVER = (
    "NVIDIA's driver, https://www.nvidia.com/drivers; in a container: docker run --gpus all (NVIDIA Container Toolkit)"
)


def _torch() -> Availability:
    import torch

    from .hardware import Availability

    built = torch.version.cuda
    reason = (
        f"torch {torch.__version__} is built for CUDA {built}"
        if built
        else f"torch {torch.__version__} is built without CUDA"
    )
    fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    return Availability(ok=built is not None, reason=reason, fix=fix)


def _providers() -> dict[str, Availability]:
    """Return each execution provider that a placement may mean, and whether this ONNX Runtime was built with it."""
    from .runtimes.providers import FIXES

    built: list[str] = []
    if _has("onnxruntime"):
        import onnxruntime

        built = onnxruntime.get_available_providers()
    return {name: _needs(name in built, "built in", fix, "not built in") for name, fix in FIXES.items()}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _needs(ok: bool, reason: str, fix: str, lacking: str = "not here") -> Availability:  # noqa: FBT001 - what it is about
    from .hardware import Availability

    return Availability(ok=ok, reason=reason if ok else lacking, fix=fix)
