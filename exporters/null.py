"""The artifact of the null runtime: no files at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .exporter import Cost, Lowered

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint
    from .exporter import Subject

_REASON = "it computes nothing: one precision is enough"


class NullExporter:
    version: ClassVar[int] = 1
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    reasons: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("bf16", "fp16", "int8", "int4", "nf4", "w8a8", "w8a8-dynamic", "fp8"), _REASON
    )
    layer_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def cost(
        self,
        checkpoint: Checkpoint,  # noqa: ARG002
        mixture: Mixture,  # noqa: ARG002
        *,
        options: Mapping[str, str],  # noqa: ARG002
        operations: int,  # noqa: ARG002
        shared: bool,  # noqa: ARG002
    ) -> Cost:
        return Cost(0, 0, 0.0, {})

    def packages(self) -> tuple[str, ...]:
        return ()

    def lower(self, subject: Subject, folder: Path) -> Lowered:  # noqa: ARG002
        return Lowered(weights="written")
