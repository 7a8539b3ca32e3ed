"""Two records of different machines or dates, side by side: the work must be the same, nothing is paired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..verdict import CONFIDENCE, FEWEST_BLOCKS
from .summary import seconds, summarize

if TYPE_CHECKING:
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


def compare(first: dict[str, Any], second: dict[str, Any]) -> list[Compared]:
    """Compare the arms that both records have.

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
    return [_compared(rows[name], others[name]) for name in common]


def _latents(record: dict[str, Any]) -> list[str]:
    return [each["latents_sha256"] for each in record["latents"].values()]


def _compared(first: Row, second: Row) -> Compared:
    logs = [np.log([float(np.median(block)) for block in row.blocks]) for row in (first, second)]
    if min(len(some) for some in logs) < FEWEST_BLOCKS:
        return Compared(first.name, first.median_s, second.median_s, None, None, None)
    from scipy import stats

    mean = float(logs[1].mean() - logs[0].mean())
    result = stats.ttest_ind(logs[1], logs[0], equal_var=False).confidence_interval(CONFIDENCE)
    low, high = (float(bound) if math.isfinite(bound) else mean for bound in (result.low, result.high))
    return Compared(first.name, first.median_s, second.median_s, math.exp(mean), math.exp(low), math.exp(high))


def table(compared: list[Compared], first: dict[str, Any], second: dict[str, Any]) -> str:
    """Render the comparison, and what differs between the machines, as Markdown."""
    lines = ["| arm | first | second | second / first, unpaired 95 % |", "| --- | --- | --- | --- |"]
    for each in compared:
        ratio = "too few blocks" if each.ratio is None else f"{each.ratio:.3f} [{each.low:.3f}, {each.high:.3f}]"
        lines.append(f"| {each.name} | {seconds(each.first_s)} | {seconds(each.second_s)} | {ratio} |")
    machines = [
        f"- {field}: {first['machine'].get(field)} / {second['machine'].get(field)}"
        for field in first["machine"]
        if first["machine"].get(field) != second["machine"].get(field)
    ]
    return "\n".join(
        [*lines, "", "Nothing is paired between records: the intervals are wider than within one.", *machines]
    )
