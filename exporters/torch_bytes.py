"""w8a8 in torch, and int8 where it is asked for: int8 weights, and steps of activations where those are rounded.

`bakeoff.components.byte_layers` multiplies them.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, ClassVar

from ..components.low_bit import OWN, SCALE, STEP
from ..weights import Streamed
from .codes import Layout
from .packing import Packing

if TYPE_CHECKING:
    from ..weights import Entry


class Bytes(Layout):
    """No library that Diffusers and Transformers know keeps scales of activations: these files are for bakeoff alone."""

    library: ClassVar[str] = OWN
    convolutions: ClassVar[bool] = True

    def encode(self, entry: Entry) -> list[Streamed]:
        packing = Packing(self.format, entry)
        layer = entry.name.removesuffix(".weight")
        codes, channels = math.prod(entry.shape), entry.shape[0]
        streams = [
            Streamed(entry.name, "I8", [*entry.shape, 1], codes, packing.codes(lambda rows: rows)),
            Streamed(layer + SCALE, "F32", [channels], 4 * channels, packing.scales()),
        ]
        if layer in self._activations:
            step = struct.pack("<f", self._activations[layer][0].even)
            streams.append(Streamed(layer + STEP, "F32", [], len(step), [step]))
        return streams

    def settings(self, skipped: list[str]) -> dict[str, Any]:  # noqa: ARG002 - known by their names
        """Return what makes Diffusers refuse the folder; Transformers goes by the codes' shape, which has one more axis."""
        return {"quant_method": OWN}

    def stored_name(self, name: str) -> str | None:
        for ending in (SCALE, STEP):
            if name.endswith(ending):
                return name.removesuffix(ending) + ".weight"
        return None
