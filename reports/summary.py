"""What a record says: a row an arm, ratios against the baseline, and the verdict in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..pictures import decibels
from ..verdict import FEWEST_BLOCKS, Ratio, Verdict, break_even_images, outliers, paired_ratio, percentile, verdicts
from .budgets import Budget
from .gates import Gate, gates
from .record import ADDED, AGAIN, FLOOR_BF16, FLOOR_FP32, REFERENCE, entry_name, joules_of
from .remarks import doubts, unfair


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
    unfair: list[str]
    """In what it differs from the baseline, or does otherwise than its recipe says."""
    doubts: list[str]
    """What disturbed its runs."""
    load_s: float | None
    cold_load_s: float | None
    first_s: float | None
    export_s: float | None
    break_even: float | None
    """Images after which the arm's setup has paid for itself against the baseline's; None: never."""
    memory: dict[str, Any] | None
    stages: dict[str, float] | None
    disk_bytes: int | None
    gpu_j: float | None
    """Joules a picture that GPUs took."""
    processor_j: float | None
    """Joules a picture that processor packages took."""
    proof: dict[str, float]
    """Each part's worst SQNR in dB against eager fp32, as its artifact says."""
    figures: dict[str, Any] | None
    floor_flip: float | None
    """Mean ꟻLIP of torch's own bf16: the unit of an arm's."""

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
    def flip(self) -> float | None:
        return float(np.mean(self.figures["flip"])) if self.figures and "flip" in self.figures else None

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

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return what the record knows of each metric that takes weights, by name."""
        found: dict[str, dict[str, Any]] = self.record.get("metrics", {})
        return found

    def noise(self) -> list[str]:
        """Say how large the noise is: of the baseline's time, of fp32, of torch's bf16."""
        told = [
            f"{self.baseline} against itself{_at(point)}: ratio {ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            for point, ratio in self.floors.items()
        ]
        for point in dict.fromkeys(row.point for row in self.rows):
            fp32, bf16 = (_figures(self.record, floor, point) for floor in (FLOOR_FP32, FLOOR_BF16))
            if fp32 and "psnr_db" in fp32:
                worst = decibels(min(fp32["psnr_db"]))
                told.append(f"eager fp32 with other threads and batches{_at(point)}: worst PSNR {worst}")
            if bf16 and "flip" in bf16:
                worst = decibels(min(bf16["psnr_db"]))
                told.append(f"torch's own bf16{_at(point)}: mean ꟻLIP {np.mean(bf16['flip']):.4f}, worst PSNR {worst}")
        return told

    def unmeasured(self) -> list[str]:
        """Return the titles of the metrics for which no weights were named."""
        return [about["title"] for about in self.metrics.values() if not about["weights"]]

    def headline(self) -> list[str]:
        """Return the verdict in words: a sentence an arm."""
        return [_sentence(row, self.baseline) for row in self.rows if row.arm != self.baseline] or [
            _sentence(row, self.baseline) for row in self.rows
        ]


def summarize(record: dict[str, Any]) -> Summary:
    """Read a record's samples and figures; computes ratios, verdicts and gates anew."""
    arms = record["arms"]
    entries = [
        (arm, name) for arm, about in arms.items() if arm not in ADDED for name in (about["entries"] or {arm: None})
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
    return Summary(record, [_within_budget(row, record["experiment"]) for row in rows], floors)


def _within_budget(row: Row, experiment: dict[str, Any]) -> Row:
    limits = experiment.get("budgets", {}).get(row.arm)
    return replace(row, gates=row.gates + Budget.read(limits).gates(row, experiment["baseline"])) if limits else row


def _at(point: str) -> str:
    return f" ({point})" if point else ""


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
    artifact, memory, stages = about.get("artifact", {}), entry.get("memory"), entry.get("stages") or {}
    failure = about.get("failure") or entry.get("failure")
    runs, figures = _runs(record, name), _figures(record, arm, point)
    baseline = record["experiment"]["baseline"]
    others = _runs(record, entry_name(baseline, point))
    precisions = about.get("precisions", [])
    floor = _figures(record, FLOOR_BF16, point)
    found = (
        gates(precisions, figures, _figures(record, REFERENCE, point), floor, runs, _semantic(record))
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
        unfair=unfair(runs, others if arm != baseline else [], precisions),
        doubts=doubts(runs, stages.get("overhead")),
        load_s=_median([run["load_s"] for run in runs]),
        cold_load_s=memory and memory["cold_load_s"],
        first_s=_median([run["first_s"] for run in runs]),
        export_s=artifact.get("export_s"),
        break_even=_break_even(_Timed(runs, memory), _Timed(others, _memory(record, baseline, point)), batch),
        memory=memory,
        stages=stages.get("seconds"),
        disk_bytes=artifact.get("bytes"),
        gpu_j=_joules(runs, batch, gpus=True),
        processor_j=_joules(runs, batch, gpus=False),
        proof=artifact.get("proof", {}),
        figures=figures,
        floor_flip=float(np.mean(floor["flip"])) if floor and "flip" in floor else None,
    )


def _memory(record: dict[str, Any], arm: str, point: str) -> dict[str, Any] | None:
    memory: dict[str, Any] | None = record["arms"][arm]["entries"].get(entry_name(arm, point), {}).get("memory")
    return memory


def _joules(runs: list[dict[str, Any]], batch: int, *, gpus: bool) -> float | None:
    """Return the median of what runs took a picture, by the counters of GPUs, or of processors."""
    spent = [(joules_of(run.get("energy_j"), gpus=gpus), len(run["samples_s"]) * batch) for run in runs]
    return _median([joules / pictures for joules, pictures in spent if joules is not None])


def _semantic(record: dict[str, Any]) -> tuple[str, float] | None:
    """Return the first semantic metric that was measured, and the factor that makes its values points."""
    for name, about in record.get("metrics", {}).items():
        if about["kind"] == "semantic" and about["weights"]:
            return name, about["points"]
    return None


def _unjudged(record: dict[str, Any], point: str) -> Gate:
    about = record["arms"].get(REFERENCE, {})
    failure = about.get("failure") or about.get("entries", {}).get(entry_name(REFERENCE, point), {}).get("failure")
    reason = f"the reference failed ({failure['reason']})" if failure else "its pictures weren't judged"
    return Gate("quality", holds=None, detail=reason)


def _value(record: dict[str, Any], point: str, field: str) -> Any:  # noqa: ANN401 - of the experiment
    swept = dict(piece.rsplit(" ", 1) for piece in point.split(", ") if piece)
    value = record["experiment"][field]
    return type(value)(swept[field]) if field in swept else value


def _median(values: list[float | None]) -> float | None:
    """Return the median of those that were measured: a resident worker is opened in its first block alone."""
    measured = [value for value in values if value is not None]
    return float(np.median(measured)) if measured else None


def _break_even(arm: _Timed, baseline: _Timed, batch: int) -> float | None:
    """Return after how many pictures an arm is ahead, by setups measured alike: by runs if those of both tell of opening."""
    if not arm.runs or not baseline.runs:
        return None
    setups = [each.warm_s for each in (baseline, arm)]
    if None in setups:
        setups = [each.cold_s for each in (baseline, arm)]
    if setups[0] is None or setups[1] is None:
        return None
    return break_even_images(setups[0], baseline.batch_s / batch, setups[1], arm.batch_s / batch)


@dataclass(frozen=True)
class _Timed:
    """An entry's timed runs, and its memory run."""

    runs: list[dict[str, Any]]
    memory: dict[str, Any] | None

    @property
    def warm_s(self) -> float | None:
        """Seconds to a first picture, of runs that told of opening."""
        return _median([run["load_s"] + run["first_s"] for run in self.runs if run["load_s"] is not None])

    @property
    def cold_s(self) -> float | None:
        """Seconds to a first picture, of the memory run."""
        return self.memory["cold_load_s"] + self.memory["first_image_s"] if self.memory else None

    @property
    def batch_s(self) -> float:
        return float(np.median([second for run in self.runs for second in run["samples_s"]]))


def _sentence(row: Row, baseline: str) -> str:
    if row.failure:
        return f"{row.name} failed ({row.failure})."
    if not row.blocks:
        return f"{row.name} wasn't timed."
    failing = [f"{gate.name}: {gate.detail}" for gate in row.gates if gate.holds is False]
    doubt = f" It fails ({'; '.join(failing)})." if failing else ""
    doubt += f" Not a fair comparison: {'; '.join(row.unfair)}." if row.unfair else ""
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
    return f"{row.name} is {times} {baseline} ({between}).{doubt}"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"
