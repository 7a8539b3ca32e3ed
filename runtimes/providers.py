"""ONNX Runtime's execution providers: which one a placement means, with what options, and what stands in its way."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

from .. import nvidia
from ..errors import UnavailableError, unknown
from ..hardware import choose_device
from ..home import home, remembered_sha256
from . import onnx_attention

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..recipe import Placement
    from .runtime import PartFiles

CPU = "CPUExecutionProvider"
_CUDA, _TENSORRT, _OPENVINO = "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
BY_DEVICE = {
    "cuda": _CUDA,
    "rocm": "MIGraphXExecutionProvider",
    "directml": "DmlExecutionProvider",
    "mps": "CoreMLExecutionProvider",
    "gpu": _OPENVINO,
    "npu": _OPENVINO,
    "cpu": CPU,
}
"""Device of a placement -> the provider that runs there, best first."""
_DEVICE_OF = {provider: device for device, provider in reversed(BY_DEVICE.items())} | {_TENSORRT: "cuda"}
NVIDIA = (_CUDA, _TENSORRT)
"""Providers whose tensors lie in a GPU's own memory, and that can record CUDA graphs."""
FIXES = {
    _CUDA: "pip install 'bakeoff[onnx-gpu]' in place of onnxruntime",
    _TENSORRT: "pip install 'bakeoff[onnx-tensorrt]' in an environment of its own",
    "MIGraphXExecutionProvider": "pip install onnxruntime-migraphx (AMD's) in place of onnxruntime",
    "DmlExecutionProvider": "on Windows: pip install onnxruntime-directml in place of onnxruntime",
    "CoreMLExecutionProvider": "on a Mac: pip install onnxruntime",
    _OPENVINO: "pip install onnxruntime-openvino in place of onnxruntime",
}
_PRECISIONS = {"fp32": "FP32", "fp16": "FP16"}
_FUSING = {CPU: ("FLOAT",), _CUDA: ("FLOAT", "FLOAT16")}
"""Providers with a kernel of fused attention -> the dtypes that it takes."""
_OTHER_TENSORRT = ("tensorrt-cu13", "tensorrt_cu13", "tensorrt-cu12", "tensorrt")
_LINKED_TENSORRT = 10


def torch_device(provider: str) -> torch.device | None:
    """Return the device of torch's on whose tensors a provider runs where they lie; None: there is none."""
    import torch

    return torch.device("cuda", 0) if provider in NVIDIA and torch.cuda.is_available() else None


def choose(placement: Placement) -> tuple[str, str, str | None]:
    """Return provider and device, and why these aren't what was asked for.

    Raises:
        UnavailableError: the provider that is named isn't in this ONNX Runtime, or can't be used here.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if placement.provider:
        return _named(placement, available)
    device, fallback = choose_device(placement.device, tuple(BY_DEVICE), "onnxruntime")
    if fallback and placement.device == "cuda" and nvidia.describe():  # torch may be one without CUDA
        device, fallback = "cuda", None
    provider = BY_DEVICE[device]
    if provider in available:
        return provider, device, fallback
    if placement.device == "auto":
        return CPU, "cpu", None
    return CPU, "cpu", f"this ONNX Runtime has no {provider}: using cpu ({FIXES[provider]})"


def _named(placement: Placement, available: list[str]) -> tuple[str, str, None]:
    provider = str(placement.provider)
    if provider not in available:
        message = unknown("execution provider", provider, available)
        raise UnavailableError(message, fix=FIXES.get(provider, "install the onnxruntime package that has it"))
    if provider == _TENSORRT:
        _refuse_other_tensorrt()
    device = _DEVICE_OF.get(provider, "other")
    if provider == _OPENVINO:
        device = placement.device if placement.device in {"gpu", "npu"} else "cpu"
    return provider, device, None


def _refuse_other_tensorrt() -> None:
    """Refuse ONNX Runtime's TensorRT beside another one: two versions of a library can't be loaded in one process."""
    for package in _OTHER_TENSORRT:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if int(version.partition(".")[0]) != _LINKED_TENSORRT:
            message = f"ONNX Runtime's {_TENSORRT} links TensorRT {_LINKED_TENSORRT}, here is {package} {version}"
            raise UnavailableError(message, fix=FIXES[_TENSORRT])


def option_obstacle(option: str, placement: Placement) -> tuple[str, str] | None:
    """Say why an option can't be had with the provider that a placement means, and the fix; None if it can."""
    provider, _, _ = choose(placement)
    if option == "cuda_graphs" and provider not in NVIDIA:
        return f"{provider} has no CUDA graphs", f"leave out cuda_graphs, or {FIXES[_CUDA]}"
    if option == "cuda_graphs" and torch_device(provider) is None:
        return (
            "their tensors lie in torch's memory, and this torch has no CUDA",
            "install torch for CUDA, or leave out cuda_graphs",
        )
    if option == "attention" and placement.attention not in onnx_attention.KERNELS:
        fix = " or ".join(f"attention={kernel}" for kernel in onnx_attention.KERNELS)
        return f"ONNX Runtime has no {placement.attention} attention", fix
    if option == "attention" and placement.attention == "flash" and not fused_dtypes(provider, placement):
        return f"{provider} has no fused attention", "leave out attention"
    return _settings_obstacle(provider, placement) if option == "provider_options" else None


def _settings_obstacle(provider: str, placement: Placement) -> tuple[str, str] | None:
    """Say why a provider's own options can't be had: a GPU other than the first, which tensors and watches are of."""
    if provider == CPU:
        return f"{CPU} has no options", "leave out provider_options, or name another provider"
    number = placement.provider_settings().get("device_id", "0")
    if provider in NVIDIA and number != "0":
        shown = filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
        name = {str(index): name for index, name in enumerate(shown)}.get(number, number)
        reason = f"device_id={number}: bakeoff uses the first GPU that it is shown"
        return reason, f"leave out device_id, and begin the command with CUDA_VISIBLE_DEVICES={name}"
    return None


def fused_dtypes(provider: str, placement: Placement) -> tuple[str, ...]:
    """Return the dtypes whose attention is to be fused: on the CPU by itself, elsewhere where it is asked for."""
    wanted = placement.attention == "flash" or (placement.attention is None and provider == CPU)
    return _FUSING.get(provider, ()) if wanted else ()


def engine_cache(provider: str, part: PartFiles) -> Path | None:
    """Return the folder for engines that a provider builds of a part; None where it builds none, or LoRAs change the part.

    TensorRT's tells engines apart by the names in a graph, not by weights: parts of other weights need other folders.
    """
    if provider != _TENSORRT or part.deltas:
        return None
    files = sorted(file for file in part.folder.iterdir() if file.is_file())
    told = "\n".join(f"{file.name} {remembered_sha256(file)}" for file in files)
    return home() / "onnxruntime-tensorrt" / hashlib.sha256(told.encode()).hexdigest()[:32]


def options_of(
    provider: str, device: str, precision: str, placement: Placement, cache: Path | None = None
) -> dict[str, str]:
    """Return a provider's options, as ONNX Runtime names them: the recipe's precision first, then what is asked for.

    float32 recipes compute in float32: no TF32, which keeps 10 bits of 23, and no half precision inside.

    Args:
        provider: as ONNX Runtime names it.
        device: that it runs on.
        precision: of the recipe.
        placement: with options of its own.
        cache: of engines, for the provider that builds some; see `engine_cache`.
    """
    plain = precision == "fp32"
    found: dict[str, str] = {}
    if provider in NVIDIA:
        found = {"device_id": "0"}
    if provider == _CUDA:
        found |= {"use_tf32": "0" if plain else "1", "arena_extend_strategy": "kSameAsRequested"}
        found |= {"cudnn_conv_algo_search": "EXHAUSTIVE", "cudnn_conv_use_max_workspace": "1"}
        found |= {"enable_cuda_graph": "1"} if placement.cuda_graphs else {}
    elif provider == _TENSORRT:
        if cache:
            found |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
            found |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)}
        found |= {"trt_fp16_enable": "1" if precision == "fp16" else "0"}
        found |= {"trt_cuda_graph_enable": "1"} if placement.cuda_graphs else {}
    elif provider == _OPENVINO:
        found = {"device_type": device.upper(), "precision": _PRECISIONS.get(precision, "ACCURACY")}
        found |= {"num_of_threads": str(placement.threads)} if placement.threads and device == "cpu" else {}
    elif provider == "CoreMLExecutionProvider":
        found = {"ModelFormat": "MLProgram", "AllowLowPrecisionAccumulationOnGPU": "0" if plain else "1"}
    elif provider == "DmlExecutionProvider":
        found = {"device_id": "0"}
    return {**found, **placement.provider_settings()}


def computes_in_half(provider: str, options: dict[str, str]) -> bool:
    """Say whether a provider computes a float32 graph's products in float16 by its options."""
    if provider == _TENSORRT:
        return options.get("trt_fp16_enable", "0").lower() in {"1", "true"}
    return provider == _OPENVINO and options.get("precision") == "FP16"


def listed(provider: str, options: dict[str, str], precision: str) -> list[Any]:
    """Return what a session is given: the provider, and behind it those that take what it can't."""
    cuda = {"device_id": "0", "use_tf32": "0" if precision == "fp32" else "1"}
    behind = [(_CUDA, cuda)] if provider == _TENSORRT else []
    return [CPU] if provider == CPU else [(provider, options), *behind, CPU]


def prepare(provider: str, precision: str, cache: Path | None) -> None:
    """Load what a provider links before its session is made: CUDA's libraries lie where torch's wheels have them.

    TensorRT's builder has no option of the provider's against TF32: NVIDIA's libraries read it from the environment.
    """
    if provider in NVIDIA:
        import onnxruntime

        onnxruntime.preload_dlls()
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
    if provider == _TENSORRT and precision == "fp32":
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
