"""Tensors on their way between host and device: pinned and asynchronous where there are two memories, and once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from torch import Tensor


class Same:
    """Remembers tensors by name, and what was made of them, while they stay the same.

    The same memory, unwritten since: torch counts what it writes. What others write there (NumPy, through an array that
    shares it) goes unseen, so it is for tensors of a pipeline's own, between its steps.
    """

    def __init__(self) -> None:
        self.active = False
        self._made: dict[str, tuple[tuple[Any, ...], Tensor, Any]] = {}

    def get(self, name: str, tensor: Tensor, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever is made
        """Return what was made of a tensor, or make it now."""
        if not self.active or tensor.is_inference():
            return make()
        state = (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype)  # noqa: SLF001 - torch's own count
        known = self._made.get(name)
        if known is None or known[0] != state:
            known = self._made[name] = state, tensor, make()  # the tensor is held: its memory becomes no other's
        return known[2]

    def forget(self) -> None:
        self._made.clear()


def home_of(tensors: Iterable[Tensor]) -> torch.device:
    """Return the device that some of the tensors lie on, else the host's: results belong where they are."""
    import torch

    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))


def pins(device: torch.device) -> bool:
    """Say whether copies between the host and a device are from pinned memory, and asynchronous."""
    return device.type in {"cuda", "xpu"}


class Crossing:
    """The way to a torch device and back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.same = Same()
        self._pins = pins(device)

    def to_device(self, name: str, tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a tensor on the device, after `make` has given it the dtype and layout that it needs there."""

        def crossed() -> Tensor:
            return make(self._pinned(tensor).to(self.device, non_blocking=self._pins))

        found: Tensor = self.same.get(name, tensor, crossed)
        return found

    def fill(self, own: Tensor, tensor: Tensor) -> Tensor:
        """Copy a tensor, wherever it lies, into one of the device's; return that."""
        return own.copy_(self._pinned(tensor), non_blocking=self._pins)

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Return a tensor that can cross by itself: one of the host's is copied to memory that stays in its place."""
        return tensor.pin_memory() if self._pins and tensor.device.type == "cpu" else tensor

    def bring_home(self, tensors: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return results contiguous: on the device, if that is their inputs' home, or finished in host memory."""
        if home_of(inputs.values()).type == self.device.type:
            return [tensor.contiguous() for tensor in tensors]
        return self.to_host(tensors)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors in host memory, finished and contiguous; all copies are on their way before any is waited for."""
        import torch

        if not self._pins:
            return [tensor.to("cpu").contiguous() for tensor in tensors]
        results = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for result, tensor in zip(results, tensors, strict=True):
            result.copy_(tensor, non_blocking=True)
        self.finish()
        return results

    def finish(self) -> None:
        """Wait until the device has done what torch's stream there was asked for."""
        import torch

        if self._pins:
            torch.accelerator.current_stream(self.device).synchronize()
