"""Two records of different machines or dates, side by side: the work must be the same, nothing is paired."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..pictures import decibels, psnr
from ..verdict import CONFIDENCE, FEWEST_BLOCKS
from .pairs import picture_file
from .record import REFERENCE, entry_name
from .summary import seconds, summarize

if TYPE_CHECKING:
    from pathlib import Path

    from .summary import Row

_WORK = (
    "prompts",
    "quality_prompts",
    "timed_prompts",
    "steps",
    "height",
    "width",
    "guidance_scale",
    "negative_prompt",
    "scheduler",
    "batch",
    "sweep",
)


@dataclass(frozen=True)
class Compared:
    """One arm in two records: seconds a batch in each, and their ratio with an unpaired interval."""

    name: str
    first_s: float | None
    second_s: float | None
    ratio: float | None
    low: float | None
    high: float | None
    first_psnr_db: float | None
    """Worst PSNR against the first record's reference pictures; None where the pictures aren't there."""
    second_psnr_db: float | None
    """The same of the second's pictures, against the same reference."""


def compare(first: dict[str, Any], second: dict[str, Any], folders: tuple[Path, Path] | None = None) -> list[Compared]:
    """Compare the arms that both records have; their pictures, too, where the records' `folders` are given.

    Raises:
        UsageError: their work differs: prompts, latents, steps, size, guidance, scheduler, batch, or an arm's weights.
    """
    differing = [
        f"{field}: {first['experiment'][field]} and {second['experiment'][field]}"
        for field in _WORK
        if first["experiment"][field] != second["experiment"][field]
    ]
    if _latents(first) != _latents(second):
        differing.append("latents")
    rows, others = ({row.name: row for row in summarize(record).rows} for record in (first, second))
    common = [name for name in rows if name in others]
    for name in common:
        keys = [record["arms"][rows[name].arm].get("artifact", {}).get("key") for record in (first, second)]
        if keys[0] != keys[1]:
            differing.append(f"the artifact of {name}: {keys[0]} and {keys[1]}")
    if differing:
        message = f"the records measured different work: {'; '.join(differing)}"
        raise UsageError(message, fix="run the same experiment on both")
    if not common:
        message = f"the records have no arm in common: {', '.join(rows)} and {', '.join(others)}"
        raise UsageError(message)
    worst = {name: _worst((first, second), folders, rows[name]) for name in common}
    return [
        replace(_compared(rows[name], others[name]), first_psnr_db=worst[name][0], second_psnr_db=worst[name][1])
        for name in common
    ]


def _worst(
    records: tuple[dict[str, Any], dict[str, Any]], folders: tuple[Path, Path] | None, row: Row
) -> tuple[float | None, float | None]:
    """Return the worst PSNR of both records' pictures of an arm to the first record's reference."""
    names = (entry_name(REFERENCE, row.point), row.name, row.name)
    where = zip((records[0], *records), (folders[0], *folders), names, strict=True) if folders else ()
    files = [picture_file(*each) for each in where]
    if not files or not all(files):
        return None, None
    expected, *both = (np.load(file, mmap_mode="r") for file in files if file)
    mine, theirs = (min(psnr(a, b) for a, b in zip(expected, got, strict=True)) for got in both)
    return mine, theirs


def _latents(record: dict[str, Any]) -> list[str]:
    return [each["latents_sha256"] for each in record["latents"].values()]


def _compared(first: Row, second: Row) -> Compared:
    logs = [np.log([float(np.median(block)) for block in row.blocks]) for row in (first, second)]
    if min(len(some) for some in logs) < FEWEST_BLOCKS:
        return Compared(first.name, first.median_s, second.median_s, None, None, None, None, None)
    from scipy import stats

    mean = float(logs[1].mean() - logs[0].mean())
    result = stats.ttest_ind(logs[1], logs[0], equal_var=False).confidence_interval(CONFIDENCE)
    low, high = (float(bound) if math.isfinite(bound) else mean for bound in (result.low, result.high))
    return Compared(
        first.name, first.median_s, second.median_s, math.exp(mean), math.exp(low), math.exp(high), None, None
    )


def table(compared: list[Compared], first: dict[str, Any], second: dict[str, Any]) -> str:
    """Render the comparison, and what differs between the machines, as Markdown."""
    heads = ("arm", "first", "second", "second / first, unpaired 95 %", "worst PSNR, first", "second, to the same")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for each in compared:
        ratio = "too few blocks" if each.ratio is None else f"{each.ratio:.3f} [{each.low:.3f}, {each.high:.3f}]"
        quality = ["–" if value is None else decibels(value) for value in (each.first_psnr_db, each.second_psnr_db)]
        cells = (each.name.replace("|", "·"), seconds(each.first_s), seconds(each.second_s), ratio, *quality)
        lines.append(f"| {' | '.join(cells)} |")
    machines = [
        f"- {field}: {first['machine'].get(field)} / {second['machine'].get(field)}"
        for field in first["machine"]
        if first["machine"].get(field) != second["machine"].get(field)
    ]
    machines += [
        f"- {name}: {mine} / {theirs}" for name, (mine, theirs) in _versions(first, second).items() if mine != theirs
    ]
    return "\n".join(
        [*lines, "", "Nothing is paired between records: the intervals are wider than within one.", *machines]
    )


def _versions(*records: dict[str, Any]) -> dict[str, list[str]]:
    """Return what each record's arms ran with, by arm and package."""
    told: list[dict[str, str]] = []
    for record in records:
        runs = record["blocks"][0]["runs"] if record["blocks"] else {}
        told.append(
            {
                f"{package} of {name}": version
                for name, run in runs.items()
                for package, version in run["configuration"].get("versions", {}).items()
            }
        )
    names = dict.fromkeys(name for each in told for name in each)
    return {name: [each.get(name, "none") for each in told] for name in names}
