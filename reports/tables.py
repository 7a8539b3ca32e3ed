"""Summaries as Markdown, CSV, JSON, a model card's section, and what pytest-benchmark reads."""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .summary import seconds

if TYPE_CHECKING:
    from .summary import Row, Summary

_MB = 1e6


def cells(row: Row) -> dict[str, str]:
    """Return a row as people read it: latency, ratio, quality and memory side by side."""
    memory, figures, ratio = row.memory, row.figures, row.verdict and row.verdict.ratio
    told = {
        "arm": row.name,
        "median": seconds(row.median_s),
        "min – max": f"{seconds(min(row.samples))} – {seconds(max(row.samples))}" if row.blocks else "–",
        "blocks × reps": f"{len(row.blocks)} × {len(row.blocks[0])}" if row.blocks else "–",
        "ratio [95 %]": f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else "–",
        "verdict": row.verdict.word if row.verdict else "–",
        "images/s": f"{row.images_per_s:.3g}" if row.images_per_s else "–",
        "load": seconds(row.load_s),
        "cold load": seconds(row.cold_load_s),
        "first image": seconds(row.first_s),
        "break-even": _images(row),
        "peak RSS": f"{max(memory['peak_bytes'].values()) / _MB:.0f} MB" if memory else "–",
        "peak anon": f"{memory['peak_anon_bytes'] / _MB:.0f} MB" if memory else "–",
        "disk": f"{row.disk_bytes / _MB:.1f} MB" if row.disk_bytes else "–",
        "worst PSNR": _worst_psnr(figures),
        "mean ꟻLIP": f"{statistics.fmean(figures['flip']):.4f}" if figures and "flip" in figures else "–",
        "right": f"{statistics.fmean(figures['right']):.1%}" if figures and "right" in figures else "–",
        "gate": _gate(row),
    }
    return {key: value.replace("|", "·") for key, value in told.items()}


def _worst_psnr(figures: dict[str, Any] | None) -> str:
    if not figures or "psnr_db" not in figures:
        return "–"
    worst = min(figures["psnr_db"])
    return "same bits" if worst >= 200 else f"{worst:.1f} dB"  # noqa: PLR2004 - what psnr says of equal pictures


def _images(row: Row) -> str:
    if not row.blocks or row.verdict is None:
        return "–"
    return "never" if row.break_even is None else f"{row.break_even:.0f} images"


def _gate(row: Row) -> str:
    if row.failure:
        return "failed"
    if not row.gates:
        return "not judged"
    if not row.passes:
        return "FAILS"
    return "passes" if all(gate.holds for gate in row.gates) else "passes, partly unjudged"


def markdown(summary: Summary) -> str:
    """Render the verdict and the table."""
    lines = ["## Verdict", "", *(f"- {sentence}" for sentence in summary.headline()), ""]
    rows = [cells(row) for row in summary.rows]
    heads = list(rows[0])
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    for row in summary.rows:
        notes = [*row.remarks, *(f"gate {gate.name}: {gate.detail}" for gate in row.gates if gate.holds is not True)]
        if row.failure:
            notes.append(row.failure)
        lines += [f"- {row.name}: {note}" for note in notes]
    return "\n".join([*lines, "", _conditions(summary), ""])


def _conditions(summary: Summary) -> str:
    e, machine = summary.record["experiment"], summary.record["machine"]
    work = (
        f"{e['model']}, {e['steps']} steps, batch {e['batch']}, {e['blocks']} blocks × {e['repetitions']} repetitions"
    )
    return f"Measured: {work}; {machine['cpu']}, {machine['usable_cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; baseline {e['baseline']}."


def as_csv(summary: Summary) -> str:
    """Render one line an arm."""
    rows = [cells(row) for row in summary.rows]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_json(summary: Summary) -> str:
    """Render all figures, unrounded."""
    rows = [
        asdict(row) | {"median_s": row.median_s, "images_per_s": row.images_per_s, "passes": row.passes}
        for row in summary.rows
    ]
    floors = {point: asdict(ratio) for point, ratio in summary.floors.items()}
    return json.dumps({"headline": summary.headline(), "rows": rows, "floors": floors}, indent=1)


def pytest_benchmark(summary: Summary) -> str:
    """Render what `pytest-benchmark compare` reads."""
    record = summary.record
    benchmarks = []
    for row in summary.rows:
        if row.blocks:
            data = sorted(row.samples)
            quarters = statistics.quantiles(data, n=4) if len(data) > 1 else [data[0]] * 3
            stats = {
                "min": data[0],
                "max": data[-1],
                "mean": statistics.fmean(data),
                "stddev": statistics.stdev(data) if len(data) > 1 else 0.0,
                "rounds": len(data),
                "iterations": 1,
                "median": statistics.median(data),
                "q1": quarters[0],
                "q3": quarters[2],
                "iqr": quarters[2] - quarters[0],
                "ops": 1 / statistics.fmean(data),
                "total": sum(data),
                "data": row.samples,
                "outliers": f"{row.outlying};0",
                "iqr_outliers": 0,
                "stddev_outliers": row.outlying,
                "ld15iqr": data[0],
                "hd15iqr": data[-1],
            }
            name = {"name": row.name, "fullname": f"bakeoff::{row.name}", "group": row.point or None}
            benchmarks.append({**name, "params": None, "param": None, "extra_info": {}, "options": {}, "stats": stats})
    machine = {"node": "", "processor": record["machine"]["cpu"], "python_version": record["machine"]["python"]}
    return json.dumps(
        {
            "machine_info": machine,
            "commit_info": {"id": record["hash"][:40], "time": record["started"], "dirty": False, "branch": ""},
            "benchmarks": benchmarks,
            "datetime": record["started"],
            "version": "5.0.0",
        },
        indent=1,
    )
