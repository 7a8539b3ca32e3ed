"""Summaries as Markdown, CSV, JSON, a model card's section, and what pytest-benchmark reads."""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..pictures import decibels
from ..verdict import PERCENTILE_SAMPLES, share_interval
from .summary import seconds

if TYPE_CHECKING:
    from .summary import Row, Summary

_MB = 1e6
_NONE = "–"


def table(summary: Summary) -> list[dict[str, str]]:
    """Return the rows as people read them: latency, ratio, quality and memory side by side; no column of dashes."""
    rows = [cells(row, summary) for row in summary.rows]
    empty = {name for name in rows[0] if all(row[name] == _NONE for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def cells(row: Row, summary: Summary) -> dict[str, str]:
    """Return all that can be said of a row, a dash where it wasn't measured; † marks an unfair comparison."""
    told = {"arm": row.name} | _latency(row) | _setup(row) | _memory(row) | _quality(row, summary)
    return {key: value.replace("|", "·") for key, value in told.items()}


def _latency(row: Row) -> dict[str, str]:
    ratio = row.verdict and row.verdict.ratio
    mark = " †" if row.unfair else ""
    return {
        "median": seconds(row.median_s),
        "min – max": f"{seconds(min(row.samples))} – {seconds(max(row.samples))}" if row.blocks else _NONE,
        **{f"p{percent}": seconds(row.percentile(percent)) for percent in PERCENTILE_SAMPLES},
        "blocks × reps": f"{len(row.blocks)} × {len(row.blocks[0])}" if row.blocks else _NONE,
        "ratio [95 %]": f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]{mark}" if ratio else _NONE,
        "verdict": row.verdict.word if row.verdict else _NONE,
        "images/s": f"{row.images_per_s:.3g}" if row.images_per_s else _NONE,
        "GPU J/image": f"{row.gpu_j:.3g}" if row.gpu_j else _NONE,
        "CPU J/image": f"{row.processor_j:.3g}" if row.processor_j else _NONE,
    }


def _setup(row: Row) -> dict[str, str]:
    return {
        "export": seconds(row.export_s),
        "cold load": seconds(row.cold_load_s),
        "load": seconds(row.load_s),
        "first image": seconds(row.first_s),
        "break-even": _images(row),
    }


def _memory(row: Row) -> dict[str, str]:
    memory = row.memory
    device = (memory or {}).get("device") or {}
    return {
        "peak RSS": f"{max(memory['peak_bytes'].values()) / _MB:.0f} MB" if memory else _NONE,
        "peak anon": f"{memory['peak_anon_bytes'] / _MB:.0f} MB" if memory else _NONE,
        "device, allocator": _megabytes(device.get("allocator_peak_bytes")),
        "device, process": _megabytes(device.get("process_bytes")),
        "disk": f"{row.disk_bytes / _MB:.1f} MB" if row.disk_bytes else _NONE,
    }


def _megabytes(value: float | None) -> str:
    return _NONE if value is None else f"{value / _MB:.0f} MB"


def _quality(row: Row, summary: Summary) -> dict[str, str]:
    figures = row.figures or {}
    taken = figures.get("metrics", {})
    told = {
        "worst part": f"{min(row.proof.values()):.0f} dB" if row.proof else _NONE,
        "worst PSNR": decibels(min(figures["psnr_db"])) if "psnr_db" in figures else _NONE,
        "mean SSIM": f"{statistics.fmean(figures['ssim']):.4f}" if "ssim" in figures else _NONE,
        "mean ꟻLIP": f"{row.flip:.4f}" if row.flip is not None else _NONE,
        "ꟻLIP / bf16's": f"{row.flip / row.floor_flip:.2f}" if row.flip is not None and row.floor_flip else _NONE,
        "right [95 %]": _right(figures["right"]) if "right" in figures else _NONE,
    }
    for name, about in summary.metrics.items():
        few = " (too few pictures)" if name in taken and len(figures["flat"]) < about["fewest"] else ""
        told[about["title"]] = f"{statistics.fmean(taken[name]):.4g}{few}" if name in taken else _NONE
    return told | {"gate": _gate(row)}


def _right(each: list[bool]) -> str:
    low, high = share_interval(sum(each), len(each))
    return f"{statistics.fmean(each):.1%} [{low:.1%}, {high:.1%}]"


def _images(row: Row) -> str:
    if not row.blocks or row.verdict is None:
        return _NONE
    return "never" if row.break_even is None else f"{row.break_even:.0f} images"


def _gate(row: Row) -> str:
    if row.failure:
        return "failed"
    if not row.gates:
        return "not judged"
    if not row.passes:
        return "FAILS"
    return "passes" if all(gate.holds for gate in row.gates) else "passes, partly unjudged"


def notes(row: Row) -> list[str]:
    """Return what stands beside a row: what is unfair, what disturbed it, gates that it doesn't pass."""
    told = [f"† {text}" for text in row.unfair] + row.doubts
    told += [f"gate {gate.name}: {gate.detail}" for gate in row.gates if gate.holds is not True]
    return [*told, row.failure] if row.failure else told


def markdown(summary: Summary) -> str:
    """Render the verdict and the table."""
    lines = ["## Verdict", "", *(f"- {sentence}" for sentence in summary.headline()), "", *_grid(table(summary)), ""]
    lines += [f"- {row.name}: {note}" for row in summary.rows for note in notes(row)]
    lines += [f"- noise: {line}" for line in summary.noise()]
    if summary.unmeasured():
        lines.append(f"- not measured, no weights named: {', '.join(summary.unmeasured())}")
    return "\n".join([*lines, "", conditions(summary), ""])


def _grid(rows: list[dict[str, str]]) -> list[str]:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(row.values()) + " |" for row in rows]


_CARD = (
    "arm",
    "median",
    "ratio [95 %]",
    "verdict",
    "peak RSS",
    "disk",
    "worst PSNR",
    "mean ꟻLIP",
    "right [95 %]",
    "gate",
)


def model_card(summary: Summary) -> str:
    """Render a section to paste into a model's card."""
    rows = [{name: value for name, value in row.items() if name in _CARD} for row in table(summary)]
    lines = ["## Measured with bakeoff", "", *_grid(rows), "", *(f"- {text}" for text in summary.headline()), ""]
    how = (
        "Latency is from prompt to pixels in host memory; ratios are of paired block medians with 95 % intervals; "
        "PSNR and ꟻLIP are against eager fp32 on the same latents."
    )
    return "\n".join([*lines, f"{conditions(summary)} {how}", ""])


def conditions(summary: Summary) -> str:
    """Say what was measured, and on what."""
    e, machine = summary.record["experiment"], summary.record["machine"]
    work = (
        f"{e['model']}, {e['steps']} steps, batch {e['batch']}, {e['blocks']} blocks of {e['repetitions']} repetitions, "
        f"{e['quality_prompts']} prompts judged"
    )
    kept = ", workers kept alive between blocks (intervals speak of these processes alone)" if e.get("resident") else ""
    here = f"{machine['cpu']}, {machine['usable_cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB"
    return f"Measured: {work}{kept}; {here}; baseline {e['baseline']}; {summary.record['started']}."


def as_csv(summary: Summary) -> str:
    """Render one line an arm."""
    rows = table(summary)
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
    told = {"headline": summary.headline(), "rows": rows, "floors": floors, "noise": summary.noise()}
    return json.dumps(told, indent=1)


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
