"""Run a part as the eager module that Diffusers or Transformers builds, from mapped safetensors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

from ..hardware import Availability, choose_device, usable_cores
from .runtime import PartFiles, Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..recipe import Placement

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_TORCH_NAMES = {"rocm": "cuda"}


class TorchRuntime(Runtime):
    """bf16 parts compute in bfloat16 and channels-last; inputs and outputs stay float32 like everywhere."""

    options: ClassVar[frozenset[str]] = frozenset({"compile"})
    devices: ClassVar[tuple[str, ...]] = ("cuda", "rocm", "xpu", "mps", "cpu")

    @classmethod
    def probe(cls) -> Availability:
        try:
            import torch
        except ImportError:
            return Availability(ok=False, reason="torch is not installed", fix="pip install torch")
        return Availability(ok=True, reason=f"torch {torch.__version__}")

    def __init__(self, part: PartFiles, placement: Placement) -> None:
        import torch

        super().__init__(part, placement)
        device, fallback = choose_device(placement.device, self.devices, "torch")
        self._threads = placement.threads or usable_cores()
        self._dtype: torch.dtype = getattr(torch, _DTYPES[part.precision])
        self._device = torch.device(_TORCH_NAMES.get(device, device))
        self._channels_last = part.precision == "bf16"
        module = part.build(_DTYPES[part.precision]).to(self._device)
        if self._channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._module: Any = torch.compile(module) if placement.compile else module
        self.configuration = {
            "device": device,
            "threads": self._threads,
            "precision": _DTYPES[part.precision],
            "compile": placement.compile,
            "fallback": fallback,
        }

    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        import torch

        assert self._module is not None, "closed"  # noqa: S101
        arguments = [self._prepare(inputs[port.name], port.exact) for port in self.inputs]
        with torch.no_grad(), _threads(self._threads):
            results = self._module(*arguments)
        return {name: result.to("cpu").contiguous() for name, result in zip(outputs, results, strict=True)}

    def _prepare(self, tensor: Tensor, exact: bool) -> Tensor:  # noqa: FBT001 - a port's own
        import torch

        tensor = tensor.to(self._device)
        if tensor.is_floating_point() and not exact:
            tensor = tensor.to(self._dtype)
        if self._channels_last and tensor.ndim == 4:  # noqa: PLR2004 - pictures and latents
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def synchronize(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self._module = None


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with so many CPU threads: torch's number is the process's, and another engine may have set its own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
