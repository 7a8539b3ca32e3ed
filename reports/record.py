"""Records as they lie on disk: one JSON file each, of a schema with a version. Old schemas stay readable."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
FILE = "record.json"
REFERENCE = "reference"
FLOOR_FP32 = "fp32 floor"
FLOOR_BF16 = "bf16 floor"
AGAIN = "baseline again"
"""Arms that an experiment adds: eager fp32 to compare with, the same with other threads and batches, torch's own bf16,
and the baseline a second time."""
ADDED = frozenset({REFERENCE, FLOOR_FP32, FLOOR_BF16, AGAIN})


def read_record(folder: Path) -> dict[str, Any]:
    """Read a record: a folder that holds one, or the file itself.

    Raises:
        ArtifactError: there is none, it isn't JSON, or a newer bakeoff wrote it.
    """
    file = folder / FILE if folder.is_dir() else folder
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file} can't be read as a record: {error}"
        raise ArtifactError(message, fix="bakeoff bench --arms … -o DIR makes one") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA:
        message = f"{file} has the schema {version!r}, this bakeoff reads {SCHEMA}"
        raise ArtifactError(message, fix="pip install --upgrade bakeoff")
    return record


def entry_name(arm: str, point: str) -> str:
    """Return the name under which a record keeps an arm at a point."""
    return f"{arm} | {point}" if point else arm


def joules_of(counters: dict[str, float] | None, *, gpus: bool) -> float | None:
    """Return what GPUs, or else processor packages, took of the counters' joules; None if none of them was read."""
    found = [value for name, value in (counters or {}).items() if name.startswith("gpu") == gpus]
    return sum(found) if found else None
