"""Lower a part whose biases make up for what its weights lose by rounding, where their inputs were calibrated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..quantize.inputs import corrected
from ..weights import sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.export import ExportedProgram

    from ..weights import Checkpoint
    from .exporter import Exporter, Lowered, Subject
    from .hollow import Hollow


def lower_corrected(
    exporter: Exporter,
    subject: Subject,
    recapture: Callable[[Checkpoint], Callable[[frozenset[str]], tuple[ExportedProgram, Hollow]]],
    file: Path,
    folder: Path,
) -> Lowered:
    """Write a part's files; once more where the backend has kept weights as they are whose biases were corrected.

    Args:
        exporter: of the backend.
        subject: the part; its mixture knows what layers are given, or nothing is corrected.
        recapture: returns `Subject.capture` of another checkpoint.
        file: for the corrected biases, while this runs.
        folder: an existing one, for the part's files.
    """
    kept: frozenset[str] = frozenset()
    while True:
        changed = corrected(subject.checkpoint, subject.mixture, file, kept)
        if changed is subject.checkpoint:
            return exporter.lower(subject, folder)
        origin = {**subject.origin, "biases": sha256(file)} if subject.origin is not None else None
        other = replace(subject, checkpoint=changed, capture=recapture(changed), origin=origin)
        lowered = exporter.lower(other, folder)
        late = frozenset(
            name for name in lowered.kept if name not in kept and _bias_differs(name, subject.checkpoint, changed)
        )
        if not late:
            return lowered
        kept |= late


def _bias_differs(weight: str, one: Checkpoint, other: Checkpoint) -> bool:
    bias = f"{weight.removesuffix('.weight')}.bias"
    return one.entries.get(bias) != other.entries.get(bias)
