"""Where torch multiplies 8-bit floats that have a scale a row."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ..errors import UnavailableError
from ..quantize.fp8 import CAPABILITY

if TYPE_CHECKING:
    import torch

    from .runtime import PartFiles


@cache
def has_cpu() -> bool:
    """Say whether this torch multiplies them on a CPU: 2.11 does so with one scale a tensor alone, 2.13 by rows."""
    import torch

    codes, scales = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.T, scales, scales.T, out_dtype=torch.bfloat16)  # noqa: SLF001 - what torchao calls
    except RuntimeError:
        return False
    return True


def has_gpu() -> bool:
    """Say whether there is an NVIDIA GPU that multiplies them."""
    import torch

    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() >= CAPABILITY


def refuse(part: PartFiles, device: torch.device) -> None:
    """Refuse a part in fp8 on a device that doesn't multiply it; a CPU does, slowly.

    Raises:
        UnavailableError: with what the device is.
    """
    import torch

    if part.precision != "fp8" or device.type == "xpu" or (device.type == "cpu" and has_cpu()):
        return
    if device.type == "cpu":
        message = f"{part.name} is in fp8, which torch {torch.__version__} doesn't multiply on a CPU by a scale a row"
        raise UnavailableError(message, fix="pip install 'torch>=2.13'; or a GPU of compute capability 8.9 or later")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else None
    if device.type != "cuda" or (capability is not None and capability < CAPABILITY):
        here = f"compute capability {capability[0]}.{capability[1]}" if capability else device.type
        message = f"{part.name} is in fp8, which takes a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell): {here}"
        raise UnavailableError(message, fix="a recipe of torch:w8a8-dynamic or torch:bf16; or --device cpu")
