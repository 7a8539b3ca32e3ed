"""The torch artifact: a part's safetensors in the recipe's dtype; the module itself comes from Diffusers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

from ..weights import Checkpoint, convert, place
from . import bitsandbytes
from .costs import BYTES_PER_S, PACKED_TIMES, stored_bytes
from .exporter import Cost, Lowered
from .packing import storage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..quantize.format import Format
    from .exporter import Subject

_BASE_BYTES, _PACKING_BYTES = 155_000_000, 400_000_000


class TorchExporter:
    version: ClassVar[int] = 1
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", *bitsandbytes.PRECISIONS)
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def packages(self) -> tuple[str, ...]:
        return ("torch", "diffusers", "transformers")

    def cost(
        self,
        checkpoint: Checkpoint,
        precision: str,
        weight_format: Format | None,
        *,
        operations: int,  # noqa: ARG002
        shared: bool,
    ) -> Cost:
        dtype = storage(precision)
        weights = stored_bytes(checkpoint, dtype, weight_format, matrices_alone=True)
        if weight_format:
            written = sum(weights.values())
            return Cost(_PACKING_BYTES, written, written / BYTES_PER_S * PACKED_TIMES, weights)
        written = 0 if shared and checkpoint.is_in(dtype) else sum(weights.values())
        return Cost(_BASE_BYTES, written, written / BYTES_PER_S, weights)

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        kept: dict[str, str] = {}
        if subject.weight_format:
            how = "written"
            kept = bitsandbytes.write(subject.checkpoint, subject.module(), subject.weight_format, folder)
        else:
            how = _write(subject, storage(subject.precision), folder)
        totals: dict[str, int] = defaultdict(int)
        for label, entry in bitsandbytes.weights_of(Checkpoint.open(folder)):
            totals[label] += entry.length
        return Lowered(how, dict(totals), kept)


def _write(subject: Subject, dtype: str, folder: Path) -> str:
    """Bring the checkpoint into the folder as it is, or converted; return how."""
    if subject.checkpoint.is_in(dtype):
        for index in subject.source.glob("*.safetensors.index.json"):
            place(index, folder / index.name, "copy")
        return min(place(file, folder / file.name, subject.weights) for file in subject.checkpoint.files)
    convert(subject.checkpoint, folder / subject.checkpoint.single_file, dtype)
    return "written"
