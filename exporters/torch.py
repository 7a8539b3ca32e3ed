"""The torch artifact: a part's safetensors in the recipe's dtype; the module itself comes from Diffusers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

from ..weights import TORCH_DTYPES, Checkpoint, convert, place
from .bitsandbytes import Bitsandbytes
from .costs import BYTES_PER_S, PACKED_TIMES, stored_bytes
from .exporter import Cost, Lowered
from .packing import storage
from .torchao import TorchAO

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..quantize.format import Format
    from .codes import Layout
    from .exporter import Subject

_BASE_BYTES, _PACKING_BYTES = 155_000_000, 400_000_000
_LAYOUTS: dict[str, type[Layout]] = {
    "int8": Bitsandbytes,
    "nf4": Bitsandbytes,
    "int4": TorchAO,
    "w8a8-dynamic": TorchAO,
}


class TorchExporter:
    version: ClassVar[int] = 1
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", *_LAYOUTS)
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
        if weight_format:
            weights = _LAYOUTS[precision](weight_format).predict(checkpoint, dtype)
            written = sum(weights.values())
            return Cost(_PACKING_BYTES, written, written / BYTES_PER_S * PACKED_TIMES, weights)
        weights = stored_bytes(checkpoint, dtype, None)
        written = 0 if shared and checkpoint.is_in(dtype) else sum(weights.values())
        return Cost(_BASE_BYTES, written, written / BYTES_PER_S, weights)

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        if subject.weight_format is None:
            how = _write(subject, storage(subject.precision), folder)
            return Lowered(how, _weight_bytes(Checkpoint.open(folder)))
        layout = _LAYOUTS[subject.precision](subject.weight_format)
        kept = layout.write(subject.checkpoint, subject.module(), folder)
        return Lowered("written", _weight_bytes(Checkpoint.open(folder), layout), kept)


def _weight_bytes(checkpoint: Checkpoint, layout: Layout | None = None) -> dict[str, int]:
    """Return dtype -> bytes of a written checkpoint; codes count under their format's name."""
    totals: dict[str, int] = defaultdict(int)
    for name, entry in checkpoint.entries.items():
        label = TORCH_DTYPES.get(entry.dtype, entry.dtype.lower())
        if layout and layout.holds_codes(name, checkpoint):
            label = layout.format.name
        totals[label] += entry.length
    return dict(totals)


def _write(subject: Subject, dtype: str, folder: Path) -> str:
    """Bring the checkpoint into the folder as it is, or converted; return how."""
    if subject.checkpoint.is_in(dtype):
        for index in subject.source.glob("*.safetensors.index.json"):
            place(index, folder / index.name, "copy")
        return min(place(file, folder / file.name, subject.weights) for file in subject.checkpoint.files)
    convert(subject.checkpoint, folder / subject.checkpoint.single_file, dtype)
    return "written"
