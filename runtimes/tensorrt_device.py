"""The device that TensorRT parts run on: tensors of torch, one stream, and one block of memory for parts that run in turn."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor

ALIGNMENT = 256
"""Bytes that addresses are multiples of, as `setTensorAddress` asks for."""


class Device:
    """One CUDA device. All parts share it: they run on one stream, one after another."""

    _shared: Device | None = None

    @classmethod
    def shared(cls) -> Device:
        """Return the process's own."""
        if Device._shared is None:
            Device._shared = cls()
        return Device._shared

    def __init__(self) -> None:
        import torch

        self.name = torch.device("cuda", torch.cuda.current_device())
        self._stream: Any = torch.cuda.Stream(self.name)
        self._block: Tensor | None = None
        self._wanted: dict[int, int] = {}

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of anything; it may be used on the stream at once."""
        import torch

        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device=self.name)

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of anything, of another one's shape and dtype."""
        return self.empty(tuple(tensor.shape), tensor.dtype)

    @contextlib.contextmanager
    def working(self, *read: Tensor) -> Iterator[None]:
        """Work on the stream, behind what the caller's stream has to do.

        Args:
            read: the caller's tensors that are read; those of the device stay until that is done.
        """
        import torch

        self._stream.wait_stream(torch.cuda.current_stream(self.name))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in read:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy on the stream."""
        import torch

        with torch.cuda.stream(self._stream):
            target.copy_(source)

    def hand_over(self, tensor: Tensor) -> Tensor:
        """Let the caller's stream use what was made on ours."""
        import torch

        current = torch.cuda.current_stream(self.name)
        current.wait_stream(self._stream)
        tensor.record_stream(current)
        return tensor

    def finish(self) -> None:
        """Wait until all that was asked for is done."""
        self._stream.synchronize()

    def free_bytes(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info(self.name)[0])

    def capture(self, work: Callable[[], None]) -> Any:  # noqa: ANN401 - a CUDA graph
        """Record what `work` puts on the stream; return the graph, which `replay` runs."""
        import torch

        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        return graph

    def replay(self, graph: Any) -> None:  # noqa: ANN401
        import torch

        with torch.cuda.stream(self._stream):
            graph.replay()

    def expect(self, owner: object, size: int) -> None:
        """Say how much of the shared block a part's runs take; it grows to that when one comes."""
        self._wanted[id(owner)] = size

    @property
    def lacking(self) -> int:
        """By how many bytes the shared block has yet to grow for what parts are expected to run."""
        return max(0, max(self._wanted.values(), default=0) - self._size)

    def release(self, owner: object) -> None:
        """Forget a part; the block goes with the last one."""
        self._wanted.pop(id(owner), None)
        if not self._wanted:
            self.finish()
            self._block = None

    def block(self, size: int) -> tuple[int, int]:
        """Return address and bytes of the block that all parts share, once it is large enough; as it grows it moves.

        Raises:
            torch.OutOfMemoryError: the device hasn't so much.
        """
        import torch

        if self._block is None or self._size < size:
            self.finish()
            self._block = None
            self.give_back()
            self._block = self.empty((max(size, ALIGNMENT),), torch.uint8)
        return self._block.data_ptr(), self._size

    @property
    def _size(self) -> int:
        return 0 if self._block is None else self._block.numel()

    def give_back(self) -> None:
        """Give the driver the memory that torch keeps for later, so that TensorRT can have it."""
        import torch

        torch.cuda.empty_cache()
