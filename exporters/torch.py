"""The torch artifact: a part's safetensors in the recipe's dtype; the module itself comes from Diffusers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, ClassVar

from ..weights import TORCH_DTYPES, place
from .exporter import Lowered

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .exporter import Subject

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class TorchExporter:
    version: ClassVar[int] = 1
    precisions: ClassVar[tuple[str, ...]] = tuple(_DTYPES)
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    own_weights: ClassVar[bool] = False

    def storage(self, precision: str) -> str:
        return _DTYPES[precision]

    def packages(self) -> tuple[str, ...]:
        return ("torch", "diffusers", "transformers")

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        how = {place(file, folder / file.name, subject.weights) for file in subject.checkpoint.files}
        for index in subject.source.glob("*.safetensors.index.json"):
            place(index, folder / index.name, "copy")
        totals: dict[str, int] = defaultdict(int)
        for entry in subject.checkpoint.entries.values():
            totals[TORCH_DTYPES.get(entry.dtype, entry.dtype.lower())] += entry.length
        return Lowered(weights=min(how), weight_bytes=dict(totals))
