"""The record of an experiment as it grows: written anew, whole, after every step."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..reports.record import FILE, SCHEMA, read_record

if TYPE_CHECKING:
    from pathlib import Path

    from .experiment import Experiment


def open_record(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Return the record to go on with, or a new one.

    Raises:
        UsageError: the folder holds the record of another experiment.
    """
    if not (folder / FILE).exists():
        return {
            "schema_version": SCHEMA,
            "hash": experiment.hash,
            "experiment": experiment.as_dict(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "arms": {},
            "blocks": [],
        }
    record = read_record(folder)
    if record["hash"] != experiment.hash:
        changed = [
            name for name, value in experiment.as_dict().items() if _as_json(value) != record["experiment"].get(name)
        ]
        message = f"{folder} holds the record of another experiment: {', '.join(changed)} differ"
        raise UsageError(message, fix="give another folder with -o")
    return record


def refuse_other_work(folder: Path, record: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse to go on where what the experiment names isn't any more what the record was begun with.

    Raises:
        UsageError: prompts changed in their file, or this is another machine.
    """
    begun = {name: record[name] for name in found if name in record}
    changed = [name for name in begun if _identity(begun[name]) != _identity(_as_json(found[name]))]
    if changed:
        message = f"{folder} was begun with another {' and other '.join(changed)} than what is here now"
        raise UsageError(message, fix="give another folder with -o")


def _identity(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return what must stay the same of prompts, or of a machine, whose free cores and memory may change."""
    return {name: value.get(name) for name in ("cpu", "gpus")} if isinstance(value, dict) else value


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record beside the old one, then put it in its place."""
    partial = folder / f".{FILE}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def _as_json(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    return json.loads(json.dumps(value))
