"""The tables of `docs/precisions.md`, from the record of `unet_precisions.py`."""

from __future__ import annotations

from typing import Any

BEGIN, END = "<!-- tables: make bench-precisions -->", "<!-- end of tables -->"
_IN_TURN = {
    "first": " Opened in turn: each step is the first after opening.",
    "later": " Opened anew for each block, whose step is the median of three behind the first.",
}
_NNCF = {"to_nncf": "NNCF's", "to_plain_nncf": "NNCF's as OpenVINO alone runs it"}
HEAD = (
    "| arm | step, s | to fp32 | to bf16 | SQNR, dB | opened, GB | peak of a step, GB | on disk, GB | export, s | its peak, GB |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def with_tables(page: str, record: dict[str, Any]) -> str:
    """Return the page with its tables made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [BEGIN, ""]
    for model, found in record.items():
        if model == "command":
            continue
        for name, group in sorted(found["groups"].items(), key=_place):
            lines += [f"### {model}: {name}", "", *_group(group), ""]
        for name, profile in sorted(found["profiles"].items(), key=_place):
            lines += [f"### {model}: one step of {name}, node class by node class", "", *_profile(profile), ""]
    return f"{before}{chr(10).join([*lines, END])}{after}"


def _place(named: tuple[str, Any]) -> int:
    """Return a place for what is recorded: those with AMX first, those without VNNI last."""
    name, _ = named
    return 0 if name.endswith("(AMX)") else 2 if name.endswith("(no VNNI)") else 1


def _machine(machine: dict[str, Any]) -> str:
    sets = ", ".join(machine["instruction_sets"])
    return f"{machine['cpu']}, {machine['usable_cores']} cores ({sets}), {machine['memory_bytes'] / 1e9:.0f} GB"


def _group(group: dict[str, Any]) -> list[str]:
    busy = group["machine_time"]
    load = f"all cores were {busy['busy']:.0%} busy, {busy['stolen']:.0%} stolen"
    told = f"{_machine(group['machine'])}. Threads: {group['threads']}; blocks: {group['blocks']}; {load}."
    if group.get("in_turn"):
        told += _IN_TURN[group["in_turn"]]
    told += "".join(_beside(name, row, key) for name, row in group["arms"].items() for key in _NNCF if row.get(key))
    return [told, "", *HEAD, *(_arm(name, row) for name, row in group["arms"].items())]


def _beside(name: str, row: dict[str, Any], key: str) -> str:
    return f" {name} takes {_interval(row[key])} of the seconds of {_NNCF[key]}."


def _arm(name: str, row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| {name} | refused: {row['refused']} | | | | | | | | |"
    peak = row["step_peak_anon_bytes"] - row["before_anon_bytes"]
    cells = [
        f"{row['median_s']:.{_decimals(row['median_s'])}f}",
        _ratio(name, row, "fp32"),
        _ratio(name, row, "bf16"),
        "same" if row["sqnr_db"] > 150 else f"{row['sqnr_db']:.1f}",  # noqa: PLR2004 - of float32
        *(f"{size / 1e9:.2f}" for size in (row["opened_anon_bytes"], peak, row["disk_bytes"])),
        "not timed" if row["export_seconds"] is None else f"{row['export_seconds']:.0f}",
        f"{row['export_peak_anon_bytes'] / 1e9:.1f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _decimals(seconds: float) -> int:
    return 1 if seconds >= 10 else 2  # noqa: PLR2004 - three figures


def _ratio(name: str, row: dict[str, Any], precision: str) -> str:
    found = row[f"to_{precision}"]
    if found is None:
        return "1" if name.partition("+")[0] == precision else ""
    return _interval(found)


def _interval(found: dict[str, float]) -> str:
    return f"{found['middle']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _profile(profile: dict[str, Any]) -> list[str]:
    rows = [
        f"| {row['node']} | {row['kernel']} | {row['count']} | {row['seconds']:.2f} | {row['share']:.0%} |"
        for row in profile["nodes"]
    ]
    return [
        f"{_machine(profile['machine'])}. {profile['step_seconds']:.1f} s.",
        "",
        "| node | kernel | nodes | s | share |",
        "| --- | --- | --- | --- | --- |",
        *rows,
    ]
