"""A part's place in an engine: its runtime while it is open, what it needs, what it told."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from .. import footprint, plugins
from ..memory import give_back
from .offload import Need, stage_of
from .opening import Baked, open_part, port_from_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from ..components.component import Port
    from ..components.family import Part
    from ..recipe import Placement
    from ..sources.lora import Delta
    from .runtime import Runtime

_FLOATS = ("fp32", "bf16", "fp16")
_BLOCKS_SHARE = 0.15
"""Of a part's weights, what lies on a device at once where they come a block at a time: some blocks, and what is in none."""


class Station:
    """A part's place in the engine: opens the runtime when it is first needed, and times it."""

    def __init__(self, baked: Baked, part: Part, placement: Placement) -> None:
        self._baked, self.part, self._placement = baked, part, placement.of(part.name)
        self._entry = baked.parts[part.name]
        self.runtime: Runtime | None = None
        self.seconds = 0.0
        self.stages = False
        self.before: Callable[[Station], None] = lambda _: None
        """Called before the runtime is opened."""
        self.mapped = False
        """Whether it is to open with its weights left in their files."""
        self.blocks = False
        """Whether its weights are to come to its device a block at a time."""
        self.unloaded = 0
        """How often it was closed to make room."""
        self.pieces: dict[str, Any] = {}
        """How the last batch was cut for it: pictures one at a time (`slicing`), tiles' side in pixels (`tiling`)."""
        self.visitor: Callable[[str, nn.Module], None] | None = None
        """Called with the part's name and its module whenever it was opened."""
        self.watcher: Callable[[str, Mapping[str, Tensor]], None] | None = None
        """Called with the part's name and what it is given, before each run."""
        self._in_batch = False
        self._told: dict[str, Any] | None = None
        self._deltas: Mapping[str, Sequence[Delta]] = {}

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The manifest's; of a folder without one those of the file, for which it may have to be opened."""
        if self.runtime is None and (self._entry.key or not plugins.runtime(self._entry.backend).reads_ports):
            return tuple(port_from_dict(port) for port in self._entry.inputs)
        return self._opened().inputs

    @property
    def configuration(self) -> dict[str, Any] | None:
        """What the runtime read back when it was last open; None if it never was."""
        told = self.runtime.configuration if self.runtime else self._told
        if told is None:
            return None
        lossy = [*told.get("lossy", ()), *(["tiling"] if self.pieces.get("tiling") else ())]
        return {**told, **self.pieces, "unloaded": self.unloaded, "lossy": lossy}

    @cached_property
    def device(self) -> str:
        """Where it runs, or would run: `cpu` where the memory is the host's."""
        runtime = plugins.runtime(self._entry.backend)
        return runtime.device_for(self._placement) if runtime.probe().ok else "cpu"

    @cached_property
    def home(self) -> str:
        """Torch's name of the device whose tensors it takes where they lie; `cpu`: the host's alone."""
        runtime = plugins.runtime(self._entry.backend)
        return runtime.home_for(self._placement) if runtime.probe().ok else "cpu"

    @property
    def _on_cpu(self) -> bool:
        return self.device == "cpu"

    @cached_property
    def _on_device(self) -> tuple[int, int | None]:
        """Predicted bytes of another device's memory, and those with its weights coming a block at a time; of weights alone."""
        held = sum((self._entry.weight_bytes or footprint.weight_bytes(self._baked.folders[self.part.name])).values())
        runtime = plugins.runtime(self._entry.backend)
        config = self._baked.config(self.part.module)
        in_blocks = (
            self._entry.precision in _FLOATS and runtime.serves("blocks", config) and stage_of(self.part) != "vae"
        )
        return held, round(held * _BLOCKS_SHARE) if in_blocks else None

    @cached_property
    def _held(self) -> tuple[int, int | None]:
        """Predicted bytes of host memory, and those with mapped weights; nothing for parts on another device."""
        if not self._on_cpu:
            return 0, None
        folder, backend = self._baked.folders[self.part.name], self._entry.backend
        predict = partial(
            footprint.running_bytes,
            backend,
            self._entry.precision,
            self._entry.weight_bytes or footprint.weight_bytes(folder),
            convolution_bytes=footprint.convolution_bytes(folder),
        )
        can_map = plugins.runtime(backend).held_mapped is not None
        return predict(), predict(mapped=True) if can_map else None

    @property
    def need(self) -> Need:
        held, mapped = self._held
        return Need(self.part.name, stage_of(self.part), held, mapped, is_open=self.runtime is not None)

    @property
    def device_need(self) -> Need:
        """What it takes of its device's memory, where that isn't the host's; `mapped_bytes` are those in blocks."""
        held, in_blocks = self._on_device
        return Need(self.part.name, stage_of(self.part), held, in_blocks, is_open=self.runtime is not None)

    def decoding_bytes(self, config: Mapping[str, Any], height: int, width: int) -> int | None:
        """Predict the activations of a picture of this size in pixels, where the component knows them."""
        found = self.part.component.activations(config, 1, height, width) if self._on_cpu else None
        if found is None:
            return None
        return footprint.activation_bytes(self._entry.backend, self._entry.precision, found, self._placement)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        runtime = self._opened()
        if self.watcher:
            self.watcher(self.part.name, inputs)
        if self.stages:
            runtime.synchronize()  # what the pipeline itself has asked its device for isn't the part's
        started = time.perf_counter()
        outputs = runtime.run(inputs)
        if self.stages:
            runtime.synchronize()
        self.seconds += time.perf_counter() - started
        return outputs

    def _opened(self) -> Runtime:
        if self.runtime is None:
            self.before(self)
            how = "mapped" if self.mapped else "blocks" if self.blocks else "none"
            placement = replace(self._placement, offload=how)
            folder = self._baked.folders[self.part.name]
            vouched = self._baked.vouched(self.part.name)
            self.runtime = open_part(folder, self.part, self._entry, placement, self._deltas, vouched)
            self.runtime.between_runs(same=self._in_batch)
            if self.visitor:
                self.visitor(self.part.name, self.runtime.module())
        return self.runtime

    def in_batch(self, *, same: bool) -> None:
        """Say that a batch begins, in which what is given again is the same, or ends."""
        self._in_batch = same
        if self.runtime is not None:
            self.runtime.between_runs(same=same)

    def adapt(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        """Go on with other LoRAs; it is opened anew where its runtime can't exchange them."""
        if (deltas or self._deltas) and not (self.runtime and self.runtime.adapt(deltas)):
            self.close()
        self._deltas = deltas

    def unload(self) -> None:
        """Close it to make room; modules refer to themselves in circles, so they go when the collector runs."""
        self.close()
        self.unloaded += 1
        give_back()

    def close(self) -> None:
        if self.runtime is not None:
            self._told = self.runtime.configuration
            self.runtime.close()
            self.runtime = None
