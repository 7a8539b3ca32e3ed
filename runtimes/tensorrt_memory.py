"""What a TensorRT engine takes of its device: plan, weights, activations; and which of its weights stay in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tensorrt_context import Contexts
    from .tensorrt_device import Device
    from .tensorrt_files import EngineFiles
    from .tensorrt_graphs import Graphs

_MARGIN_BYTES = 512 << 20
"""Device memory that is left alone when weights are placed: inputs, outputs, and what else runs there."""


class Memory:
    """An engine's, in bytes. Weights that may stream do so at first, so that a context doesn't need them all."""

    def __init__(self, trt: Any, files: EngineFiles, contexts: Contexts, graphs: Graphs, device: Device) -> None:  # noqa: ANN401 - tensorrt is untyped
        engine = contexts.engine
        self._contexts, self._graphs, self._device = contexts, graphs, device
        self.plan = files.plan_bytes
        self.weights = int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
        self.activations = 0
        """What the largest shapes that have been run take; before, the first profile's best ones."""
        self.streamable = 0
        self.streaming_budget: int | None = None
        """Of streamable weights, what stays on the device; None: none are streamable."""
        self.scratch = 0
        if files.settings["weight_streaming"]:
            self.streamable = int(engine.streamable_weights_size)
            self._set_budget(0)
        self.most_activations = int(engine.device_memory_size_v2)
        """What the largest shapes of all profiles would take beside weights; with scratch, which it has once there is a budget."""

    @property
    def streams(self) -> bool:
        """Whether weights come from host memory in each run."""
        return self.streaming_budget is not None and self.streaming_budget < self.streamable

    def as_dict(self) -> dict[str, int | None]:
        return {f"{name}_bytes": value for name, value in vars(self).items() if not name.startswith("_")}

    def make_room(self, activations: int) -> None:
        """Keep weights on the device as far as they fit beside runs that take so much; graphs and contexts go where they move."""
        self.activations = activations
        if self.streaming_budget is None:
            return
        self._device.give_back()
        room = self._device.free_bytes() + self.streaming_budget - self._device.lacking - _MARGIN_BYTES
        budget = max(0, min(self.streamable, room))
        if budget != self.streaming_budget:
            self._device.finish()
            self._graphs.clear()
            self._contexts.clear()
            self._set_budget(budget)

    def _set_budget(self, size: int) -> None:
        """Keep so many bytes of streamable weights on the device; no context may be there. Read back what came of it."""
        engine = self._contexts.engine
        engine.weight_streaming_budget_v2 = size
        self.streaming_budget = int(engine.weight_streaming_budget_v2)
        self.scratch = self._contexts.scratch = int(engine.weight_streaming_scratch_memory_size)
