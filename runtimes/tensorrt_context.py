"""Execution contexts of a TensorRT engine: what a run is told, and where it is put on the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .tensorrt_device import Device

    Shape = tuple[int, ...]


class Contexts:
    """Makes an engine's contexts, and keeps one a profile. None has device memory of its own."""

    def __init__(self, part: str, trt: Any, engine: Any, device: Device, log: list[str]) -> None:  # noqa: ANN401 - tensorrt is untyped
        self._part, self._trt, self.engine, self._device, self._log = part, trt, engine, device, log
        self._kept: dict[int, Context] = {}
        self.scratch = 0
        """Device memory in bytes that a run takes beside its activations: where weights are streamed."""

    def of(self, index: int) -> Context:
        """Return the context that is kept for a profile."""
        if index not in self._kept:
            self._kept[index] = self.make(index)
        return self._kept[index]

    def make(self, index: int) -> Context:
        """Return a new context in a profile.

        Raises:
            ArtifactError: TensorRT makes none.
        """
        made = self.engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if made is None:
            message = f"{self._part}: TensorRT made no context: {' '.join(self._log) or 'nothing said why'}"
            raise ArtifactError(message, fix="free device memory, or export it again")
        if index:
            self._choose(made, index)
        self._device.finish()
        most = int(self.engine.get_device_memory_size_for_profile_v2(index))
        return Context(f"{self._part}, profile {index}", made, most, self.scratch, self._log)

    def _choose(self, made: Any, index: int) -> None:  # noqa: ANN401
        try:
            made.set_optimization_profile_async(index, self._device.stream)
        except RuntimeError as error:
            message = f"{self._part}: TensorRT can't use profile {index}: {' '.join(self._log[-3:]) or error}"
            raise ArtifactError(message, fix="export it again") from error

    def clear(self) -> None:
        self._kept.clear()

    def close(self) -> None:
        """Let go of the engine."""
        self.clear()
        self.engine = None


class Context:
    """One execution context, in one profile.

    Args:
        name: in messages.
        context: TensorRT's own.
        most: device memory in bytes that the profile's largest shapes need.
        scratch: what streamed weights need besides.
        log: what TensorRT says.
    """

    def __init__(self, name: str, context: Any, most: int, scratch: int, log: list[str]) -> None:  # noqa: ANN401 - tensorrt is untyped
        self.trt, self._name, self._most, self._scratch, self._log = context, name, most, scratch, log
        self._shapes: dict[str, Shape] | None = None
        self._outputs: dict[str, Shape] | None = None
        self.needs = 0
        """Device memory in bytes that a run of its shapes takes."""

    def set_shapes(self, given: Mapping[str, Shape]) -> None:
        """Say the inputs' shapes; nothing is done where they are the same as before.

        Raises:
            ArtifactError: the profile doesn't take them.
        """
        if self._shapes == given:
            return
        self._shapes = self._outputs = None
        for name, shape in given.items():
            if not self.trt.set_input_shape(name, shape):
                message = f"{self._name}: TensorRT doesn't take {name} of shape {shape}"
                raise ArtifactError(message, fix="export it again with other +profiles=…")
        activations = int(self.trt.update_device_memory_size_for_shapes()) or self._most  # 0: also an error
        self.needs = activations + self._scratch
        self._shapes = dict(given)

    def outputs(self, expected: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the results' shapes.

        Raises:
            ArtifactError: they aren't those that are expected.
        """
        if self._outputs is None:
            self._infer()
            self._outputs = {name: tuple(int(size) for size in self.trt.get_tensor_shape(name)) for name in expected}
        if self._outputs != dict(expected):
            message = f"{self._name} would give {self._outputs}, expected {dict(expected)}"
            raise ArtifactError(message, fix="export it again")
        return self._outputs

    def _infer(self) -> None:
        try:
            lacking = self.trt.infer_shapes()
        except RuntimeError as error:
            message = f"{self._name}: TensorRT can't tell the results' shapes: {' '.join(self._log[-3:]) or error}"
            raise ArtifactError(message, fix="export it again") from error
        if lacking:
            message = f"{self._name}: TensorRT can't tell the results' shapes without {', '.join(lacking)}"
            raise ArtifactError(message, fix="export it again")

    def place(self, block: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        """Say where things lie: address and bytes of the device memory, and all inputs and outputs."""
        self.trt.set_device_memory(*block)
        for name, tensor in tensors.items():
            if not self.trt.set_tensor_address(name, tensor.data_ptr()):
                message = f"{self._name}: TensorRT doesn't take an address for {name}"
                raise ArtifactError(message, fix="export it again")

    def enqueue(self, stream: int) -> None:
        """Put a run on a stream.

        Raises:
            ArtifactError: it can't be.
        """
        if not self.trt.execute_async_v3(stream):
            message = f"{self._name} failed in TensorRT: {' '.join(self._log[-3:]) or 'nothing said why'}"
            raise ArtifactError(message, fix="export it again; bakeoff verify says whether its files are whole")
