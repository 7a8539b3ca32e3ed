"""The page of a record of `make gpu`: its items in words and tables."""

from __future__ import annotations

from typing import Any

from bakeoff.reports.record import joules_of

_COMMANDS = (
    'Each row of its own: `python docs/benchmarks/gpu.py RECORD.json --only "ROW"`, with its first column for ROW; '
    "`--only shapes` and `--only features` for what stands below the table."
)
OWN_TABLES = {"shapes", "features"}
"""Items of many results, which they keep as they go on."""
_SAID_APART = {"outcome", "seconds"}
_MEMORY = ("allocator_peak_bytes", "reserved_peak_bytes", "process_bytes")


def page(record: dict[str, Any]) -> str:
    """Return the record in words and tables."""
    gpus = ", ".join(gpu["name"] for gpu in record["machine"]["gpus"]) or "no GPU"
    lines = ["# What the GPU showed", "", f"On {gpus}; {record['machine']['cpu']}. {_COMMANDS}"]
    lines += [", ".join(f"{name} {each}" for name, each in record["versions"].items()) + ".", ""]
    if record["tiny"] or record["device"] != "cuda":
        lines += [f"**Tiny models on {record['device']}: the script was tried, no figure here means anything.**", ""]
    lines += ["Weights of full-size models are random: seconds, memory and energy are theirs, pictures are noise.", ""]
    lines += ["Memory in GB: what torch's tensors took at most, what its allocator reserved, what the process has.", ""]
    lines += [
        "| model, arm | a picture, s | a step, ms | first picture, s | tensors | reserved | process | GPU, J | processor, J | |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [_row(name, outcome) for name, outcome in record["items"].items() if name not in OWN_TABLES]
    anchors = record["anchors"]
    lines += ["", f"Anchors: {anchors['model']}: "]
    lines[-1] += ", ".join(f"{name} {each} s" for name, each in anchors["seconds"].items()) + f" ({anchors['label']})."
    judged = record["items"].get("shapes", {})
    lines += ["", "## The embedded model", ""]
    lines += [text for text in (_remark(judged), judged.get("markdown")) if text] or ["not run"]
    for arm, reason in judged.get("left_out", {}).items():
        lines.append(f"- left out: `{arm}`: {reason}")
    return "\n".join([*lines, *_features(record["items"].get("features", {}))]) + "\n"


def _features(outcome: dict[str, Any]) -> list[str]:
    """Return the table of features, each passed, failed or skipped with the reason."""
    lines = ["", "## Features", "", *(text for text in [_remark(outcome)] if text), ""]
    lines += ["| feature | | seconds | |", "| --- | --- | --- | --- |"]
    for name, told in outcome.get("features", {}).items():
        said = told.get("reason") or ", ".join(f"{key} {told[key]}" for key in told if key not in _SAID_APART)
        text = " ".join(said.split())[-300:].replace("|", "/")
        lines.append(f"| {name} | {told['outcome']} | {told.get('seconds', '–')} | {text} |")
    return lines


def _row(name: str, outcome: dict[str, Any]) -> str:
    memory = outcome.get("memory") or {}
    joules = outcome.get("energy_j_per_picture")
    cells = [
        _figure(outcome.get("median_picture_s"), "{:.3f}"),
        _figure(outcome.get("step_s"), "{:.2f}", 1e3),
        _figure(outcome.get("first_picture_s"), "{:.1f}"),
        *(_figure(memory.get(kind), "{:.2f}", 1e-9) for kind in _MEMORY),
        _figure(joules_of(joules, gpus=True), "{:.0f}"),
        _figure(joules_of(joules, gpus=False), "{:.0f}"),
        _remark(outcome),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _figure(value: float | None, text: str, times: float = 1.0) -> str:
    return "–" if value is None else text.format(value * times)


def said(outcome: dict[str, Any]) -> str:
    """Say in a line what came of an item."""
    return _remark(outcome) or _figure(outcome.get("median_picture_s"), "{:.3f} s a picture")


def _remark(outcome: dict[str, Any]) -> str:
    for word in ("skipped", "failed", "not_run", "unfinished"):
        if word in outcome:
            said = " ".join(str(outcome[word]).split())[-200:]
            return f"{word.replace('_', ' ')}: {said}".replace("|", "/")
    tainted = (outcome.get("guard") or {}).get("tainted", [])
    turns = ["parts took turns on the device"] if outcome.get("offload") == "parts" else []
    compiled = [each["compiled_s"] for each in outcome.get("prepared", {}).values() if "compiled_s" in each]
    before = [f"compiled before, in {seconds:.0f} s beside other work" for seconds in compiled]
    return "; ".join([*turns, *before, *tainted])
