"""The torch artifact: a part's safetensors in the recipe's dtype; the module itself comes from Diffusers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

from ..weights import TORCH_DTYPES, Checkpoint, convert, place
from .exporter import Cost, Lowered

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .exporter import Subject

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

_BASE_BYTES = 155_000_000
_BYTES_PER_S = 4e8


class TorchExporter:
    version: ClassVar[int] = 1
    precisions: ClassVar[tuple[str, ...]] = tuple(_DTYPES)
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def packages(self) -> tuple[str, ...]:
        return ("torch", "diffusers", "transformers")

    def cost(self, checkpoint: Checkpoint, precision: str, *, operations: int, shared: bool) -> Cost:  # noqa: ARG002
        dtype = _DTYPES[precision]
        weights = checkpoint.bytes_in(dtype)
        written = 0 if shared and checkpoint.is_in(dtype) else weights
        return Cost(_BASE_BYTES, written, written / _BYTES_PER_S, {dtype: weights})

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        dtype = _DTYPES[subject.precision]
        if subject.checkpoint.is_in(dtype):
            how = min(place(file, folder / file.name, subject.weights) for file in subject.checkpoint.files)
            for index in subject.source.glob("*.safetensors.index.json"):
                place(index, folder / index.name, "copy")
        else:
            how = "written"
            convert(subject.checkpoint, folder / subject.checkpoint.single_file, dtype)
        totals: dict[str, int] = defaultdict(int)
        for entry in Checkpoint.open(folder).entries.values():
            totals[TORCH_DTYPES.get(entry.dtype, entry.dtype.lower())] += entry.length
        return Lowered(weights=how, weight_bytes=dict(totals))
