"""Weights that come from host memory a block at a time: for a part that the device has no room for."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .crossing import pins

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

_AHEAD = 1
"""Blocks that may be launched before an earlier one is done: its memory is free for others only then."""


class Blocks:
    """Keeps one block of a module on the device, and the next on its way, while all others stay on the host.

    Blocks are the members of the module's outermost lists; what is in none (embeddings, the last layers) stays on the
    device. On a GPU host memory is pinned and copies run on a stream of their own beside the computation. Which block
    comes next is learnt in the first run.

    Raises:
        UsageError: the module has no lists of blocks, or its weights are codes of a few bits.
    """

    def __init__(self, part: str, module: nn.Module, device: torch.device) -> None:
        import torch

        found = blocks_of(module)
        _refuse(part, module, found)
        self._device = device
        self._pinned = pins(device)
        self._stream: Any = torch.Stream(device) if self._pinned else None
        inside = {id(tensor) for block in found for tensor in _tensors(block)}
        for layer in module.modules():
            for tensors in (layer._parameters, layer._buffers):  # noqa: SLF001 - the block's own must stay
                for tensor in tensors.values():
                    if tensor is not None and id(tensor) not in inside:
                        tensor.data = tensor.data.to(device)
        self._host = [[self._on_host(tensor) for tensor in _tensors(block)] for block in found]
        self._blocks = found
        self._arrived: dict[int, Any] = {}
        self._next: dict[int, int] = {}
        self._left: deque[Any] = deque()
        self._last: int | None = None
        self.most = 0
        """Blocks that were on the device at once, at most."""
        for number, block in enumerate(found):
            enter, leave = torch.compiler.disable(self._enter), torch.compiler.disable(self._leave)
            block.register_forward_pre_hook(lambda *_, number=number, enter=enter: enter(number))
            block.register_forward_hook(lambda *_, number=number, leave=leave: leave(number))

    @property
    def count(self) -> int:
        return len(self._blocks)

    def _on_host(self, tensor: Tensor) -> Tensor:
        held = tensor.data.to("cpu")
        held = held.pin_memory() if self._pinned else held
        tensor.data = held
        return held

    def _enter(self, number: int) -> None:
        """Wait for a block, and send for the next."""
        if self._last is not None:
            self._next[self._last] = number
        self._last = number
        self._fetch(number)
        if self._pinned:
            import torch

            torch.accelerator.current_stream(self._device).wait_event(self._arrived[number])
        coming = self._next.get(number)
        if coming is not None and coming != number:
            self._fetch(coming)

    def _fetch(self, number: int) -> None:
        if number in self._arrived:
            return
        with self._beside():
            for tensor, host in zip(_tensors(self._blocks[number]), self._host[number], strict=True):
                tensor.data = host.to(self._device, non_blocking=self._pinned, copy=True)
        self._arrived[number] = self._stream.record_event() if self._pinned else None
        self.most = max(self.most, len(self._arrived))

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Run on the stream of the copies, which waits for nothing: what it writes is new memory."""
        if not self._pinned:
            yield
            return
        with self._stream:
            yield

    def _leave(self, number: int) -> None:
        """Let go of a block's memory once what was launched with it is done."""
        import torch

        for tensor, host in zip(_tensors(self._blocks[number]), self._host[number], strict=True):
            if self._pinned:
                tensor.data.record_stream(torch.accelerator.current_stream(self._device))
            tensor.data = host
        del self._arrived[number]
        if self._pinned:
            self._left.append(torch.accelerator.current_stream(self._device).record_event())
            if len(self._left) > _AHEAD:
                self._left.popleft().synchronize()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost lists of a module, in its own order."""
    from torch import nn

    found: list[nn.Module] = []
    for child in module.children():
        found += [*child] if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def _tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _refuse(part: str, module: nn.Module, found: list[nn.Module]) -> None:
    from torch import nn

    if not found:
        message = f"offload=blocks does nothing for {part}: it has no lists of blocks"
        raise UsageError(message, fix="offload=parts")
    plain = all(type(tensor) is nn.Parameter and tensor.is_floating_point() for tensor in module.parameters())
    if not plain:
        message = f"offload=blocks moves float weights alone, {part} has codes of a few bits"
        raise UsageError(message, fix="offload=parts, or a recipe of bf16 for that part")
