"""What a record says: a row an arm, ratios against the baseline, and the verdict in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..verdict import FEWEST_BLOCKS, Ratio, Verdict, break_even_images, outliers, paired_ratio, percentile, verdicts
from .gates import Gate, gates
from .record import AGAIN, FLOOR, REFERENCE, entry_name


@dataclass(frozen=True)
class Row:
    """All about one arm at one point of the sweep; None where it wasn't measured."""

    name: str
    arm: str
    point: str
    failure: str | None
    gates: list[Gate]
    blocks: list[list[float]]
    """Seconds of each repetition, by block."""
    batch: int
    verdict: Verdict | None
    remarks: list[str]
    """What makes the comparison with the baseline unfair, or the figure doubtful."""
    load_s: float | None
    cold_load_s: float | None
    first_s: float | None
    export_s: float | None
    break_even: float | None
    """Images after which the arm's setup has paid for itself against the baseline's; None: never."""
    memory: dict[str, Any] | None
    stages: dict[str, float] | None
    disk_bytes: int | None
    figures: dict[str, Any] | None

    @property
    def passes(self) -> bool:
        return self.failure is None and all(gate.holds is not False for gate in self.gates)

    @property
    def samples(self) -> list[float]:
        return [second for block in self.blocks for second in block]

    @property
    def median_s(self) -> float | None:
        return float(np.median(self.samples)) if self.blocks else None

    @property
    def images_per_s(self) -> float | None:
        return self.batch / self.median_s if self.median_s else None

    @property
    def outlying(self) -> int:
        return sum(outliers(self.samples)) if self.blocks else 0

    def percentile(self, percent: int) -> float | None:
        return percentile(self.samples, percent) if self.blocks else None


@dataclass(frozen=True)
class Summary:
    """A record, read."""

    record: dict[str, Any]
    rows: list[Row]
    floors: dict[str, Ratio]
    """The baseline against itself, by point."""

    @property
    def baseline(self) -> str:
        return str(self.record["experiment"]["baseline"])

    def headline(self) -> list[str]:
        """Return the verdict in words: a sentence an arm."""
        return [_sentence(row, self.baseline) for row in self.rows if row.arm != self.baseline] or [
            _sentence(row, self.baseline) for row in self.rows
        ]


def summarize(record: dict[str, Any]) -> Summary:
    """Read a record's samples and figures; computes ratios, verdicts and gates anew."""
    arms = record["arms"]
    entries = [
        (arm, name)
        for arm, about in arms.items()
        if arm not in {REFERENCE, FLOOR, AGAIN}
        for name in (about["entries"] or {arm: None})
    ]
    points = list(dict.fromkeys(_point(arm, name) for arm, name in entries))
    floors, rows = {}, []
    for point in points:
        floor = _ratio(record, AGAIN, record["experiment"]["baseline"], point)
        if floor:
            floors[point] = floor
        here = [(arm, name) for arm, name in entries if _point(arm, name) == point]
        ratios = {
            name: ratio
            for arm, name in here
            if arm != record["experiment"]["baseline"]
            and (ratio := _ratio(record, arm, record["experiment"]["baseline"], point))
        }
        judged = verdicts(ratios, floor) if ratios else {}
        rows += [_row(record, arm, name, point, judged.get(name)) for arm, name in here]
    return Summary(record, rows, floors)


def _point(arm: str, name: str) -> str:
    return name.removeprefix(arm).removeprefix(" | ")


def _ratio(record: dict[str, Any], arm: str, baseline: str, point: str) -> Ratio | None:
    """Compare over the blocks in which both ran."""
    first, second = entry_name(baseline, point), entry_name(arm, point)
    both = [block["runs"] for block in record["blocks"] if first in block["runs"] and second in block["runs"]]
    if len(both) < FEWEST_BLOCKS:
        return None
    return paired_ratio([runs[first]["samples_s"] for runs in both], [runs[second]["samples_s"] for runs in both])


def _runs(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [block["runs"][name] for block in record["blocks"] if name in block["runs"]]


def _figures(record: dict[str, Any], arm: str, point: str) -> dict[str, Any] | None:
    about = record["arms"].get(arm, {}).get("entries", {}).get(entry_name(arm, point), {})
    found: dict[str, Any] | None = about.get("quality", {}).get("figures")
    return found


def _row(record: dict[str, Any], arm: str, name: str, point: str, verdict: Verdict | None) -> Row:
    about = record["arms"][arm]
    entry = about["entries"].get(name, {})
    artifact, memory = about.get("artifact", {}), entry.get("memory")
    failure = about.get("failure") or entry.get("failure")
    runs, figures = _runs(record, name), _figures(record, arm, point)
    baseline = record["experiment"]["baseline"]
    others = _runs(record, entry_name(baseline, point))
    precisions = artifact.get("precisions", {}).values()
    found = (
        gates(precisions, figures, _figures(record, REFERENCE, point), _figures(record, FLOOR, point), runs)
        if figures
        else [_unjudged(record, point)]
    )
    batch = _value(record, point, "batch")
    return Row(
        name=name,
        arm=arm,
        point=point,
        failure=f"{failure['during']}: {failure['reason']}" if failure else None,
        gates=found,
        blocks=[run["samples_s"] for run in runs],
        batch=batch,
        verdict=verdict,
        remarks=_remarks(runs, others if arm != baseline else []),
        load_s=_median([run["load_s"] for run in runs]),
        cold_load_s=memory and memory["cold_load_s"],
        first_s=_median([run["first_s"] for run in runs]),
        export_s=artifact.get("export_s"),
        break_even=_break_even(runs, others, batch),
        memory=memory,
        stages=(entry.get("stages") or {}).get("seconds"),
        disk_bytes=artifact.get("bytes"),
        figures=figures,
    )


def _unjudged(record: dict[str, Any], point: str) -> Gate:
    about = record["arms"].get(REFERENCE, {})
    failure = about.get("failure") or about.get("entries", {}).get(entry_name(REFERENCE, point), {}).get("failure")
    reason = f"the reference failed ({failure['reason']})" if failure else "its pictures weren't judged"
    return Gate("quality", holds=None, detail=reason)


def _value(record: dict[str, Any], point: str, field: str) -> Any:  # noqa: ANN401 - of the experiment
    swept = dict(piece.rsplit(" ", 1) for piece in point.split(", ") if piece)
    value = record["experiment"][field]
    return type(value)(swept[field]) if field in swept else value


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _break_even(runs: list[dict[str, Any]], others: list[dict[str, Any]], batch: int) -> float | None:
    if not runs or not others:
        return None
    (base_setup, base_image), (arm_setup, arm_image) = (
        (
            float(np.median([run["load_s"] + run["first_s"] for run in some])),
            float(np.median([second for run in some for second in run["samples_s"]])) / batch,
        )
        for some in (others, runs)
    )
    return break_even_images(base_setup, base_image, arm_setup, arm_image)


def _remarks(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Say what is unfair or doubtful: other threads, a fallback, a hidden precision, a disturbed block."""
    remarks = []
    tainted = [text for run in runs for text in run["guard"]["tainted"]]
    if tainted:
        count = sum(bool(run["guard"]["tainted"]) for run in runs)
        remarks.append(f"{count} of {len(runs)} blocks were disturbed ({tainted[0]})")
    if runs and others:
        for knob in ("threads", "device", "compile"):
            mine, theirs = _knob(runs[0], knob), _knob(others[0], knob)
            if mine and theirs and mine != theirs:
                remarks.append(f"{knob}: {', '.join(sorted(mine))} against the baseline's {', '.join(sorted(theirs))}")
    for run in runs[:1]:
        fallbacks = [part["fallback"] for part in run["configuration"]["adapter"].values() if part.get("fallback")]
        remarks += sorted(set(fallbacks))
        hidden = _knob(run, "precision") & {"i8", "u8", "i4", "u4", "int8", "int4"}
        if hidden:
            remarks.append(f"runs in {', '.join(sorted(hidden))}")
    return remarks


def _knob(run: dict[str, Any], name: str) -> set[str]:
    return {str(part[name]) for part in run["configuration"]["adapter"].values() if name in part}


def _sentence(row: Row, baseline: str) -> str:
    if row.failure:
        return f"{row.name} failed ({row.failure})."
    if not row.blocks:
        return f"{row.name} wasn't timed."
    failing = [f"{gate.name}: {gate.detail}" for gate in row.gates if gate.holds is False]
    doubt = f" It fails its quality gate ({'; '.join(failing)})." if failing else ""
    if row.verdict is None:
        return f"{row.name} takes {seconds(row.median_s)}.{doubt}"
    ratio = row.verdict.ratio
    between = f"ratio {ratio.ratio:.3f}, 95 % interval {ratio.low:.3f} to {ratio.high:.3f}, {ratio.blocks} blocks"
    if row.verdict.word == "no difference shown":
        word = f"shows no difference from {baseline} that {ratio.blocks} blocks could show"
        return f"{row.name} {word} ({between}; the smallest to be seen was {row.verdict.smallest_effect:.0%}).{doubt}"
    if failing:
        return f"{row.name} is no candidate, whatever its speed ({between}).{doubt}"
    faster = row.verdict.word == "faster"
    times = f"{1 / ratio.ratio:.2f} times as fast as" if faster else f"{ratio.ratio:.2f} times slower than"
    return f"{row.name} is {times} {baseline} ({between})."


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"
