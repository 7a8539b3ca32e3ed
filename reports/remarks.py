"""What makes a comparison unfair, or a figure doubtful, read from what each arm told of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    Run = dict[str, Any]

_KNOBS = ("threads", "device", "compile", "offload", "step_cache", "latents")
"""What an adapter's parts may tell of themselves that has to be equal for a fair comparison."""
_BITS = {
    "i4": 4, "u4": 4, "int4": 4, "uint4": 4, "nf4": 4,
    "i8": 8, "u8": 8, "int8": 8, "uint8": 8, "fp8": 8,
    "f16": 16, "bf16": 16, "fp16": 16, "float16": 16, "bfloat16": 16,
}  # fmt: skip
_CLAIMED_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "w8a8": 8, "w8a8-dynamic": 8, "fp8": 8}

_WARMING = 2.0
_FALLING = 0.02
"""Share of the time by which each repetition is faster than the one before."""
_NOTED_OVERHEAD = 0.02


def unfair(runs: list[Run], others: list[Run], precisions: Iterable[str]) -> list[str]:
    """Say in what an arm's runs differ from the baseline's that the recipe doesn't say, and what it hides."""
    if not runs:
        return []
    found = [*_fallbacks(runs[0]), *_hidden(runs[0], precisions)]
    if others:
        found += [
            f"{knob}: {mine} against the baseline's {theirs}"
            for knob in _KNOBS
            if (mine := _knob(runs[0], knob)) != (theirs := _knob(others[0], knob)) and mine and theirs
        ]
        cores = [len(run["configuration"].get("affinity", [])) for run in (runs[0], others[0])]
        if cores[0] != cores[1]:
            found.append(f"may use {cores[0]} cores, the baseline {cores[1]}")
    return found


def doubts(runs: list[Run], overhead: float | None) -> list[str]:
    """Say what disturbed an arm's runs: other processes, a drift while it warmed up, the cost of the stage pass."""
    found = []
    tainted = [text for run in runs for text in run["guard"]["tainted"]]
    if tainted:
        count = sum(bool(run["guard"]["tainted"]) for run in runs)
        found.append(f"{count} of {len(runs)} blocks were disturbed ({tainted[0]})")
    slow = sum(max(run["warmup_s"], default=0) > _WARMING * min(run["samples_s"]) for run in runs)
    if slow:
        found.append(f"warm-ups took over {_WARMING:g} times as long as repetitions in {slow} of {len(runs)} blocks")
    slopes = [_slope(run["samples_s"]) for run in runs]
    if len(slopes) > 1 and all(slope < -_FALLING for slope in slopes):
        found.append("repetitions still got faster within every block: more warm-ups are needed")
    if overhead is not None and abs(overhead) > _NOTED_OVERHEAD:
        found.append(f"timing the stages changes the time by {overhead:+.1%}")
    return found


def _slope(samples: list[float]) -> float:
    """Return the mean relative change from one repetition to the next."""
    return (samples[-1] / samples[0] - 1) / max(len(samples) - 1, 1)


def _parts(run: Run) -> list[dict[str, Any]]:
    return list(run["configuration"]["adapter"].values())


def _knob(run: Run, name: str) -> str:
    return ", ".join(sorted({str(part[name]) for part in _parts(run) if name in part}))


def _fallbacks(run: Run) -> list[str]:
    said = {part["fallback"] for part in _parts(run) if part.get("fallback")}
    nodes = [part["nodes"] for part in _parts(run) if len(part.get("nodes") or ()) > 1]
    said |= {f"nodes by provider: {', '.join(f'{name} {count}' for name, count in each.items())}" for each in nodes}
    return sorted(said)


def _hidden(run: Run, precisions: Iterable[str]) -> list[str]:
    """Return the types of fewer bits than the arm says it runs in."""
    claimed = [_CLAIMED_BITS.get(name, 0) for name in precisions]
    if not claimed:
        return []
    ran = {name for part in _parts(run) for name in _types(part.get("precision"))}
    hidden = sorted(name for name in ran if _BITS.get(name, 32) < min(claimed))
    return [f"runs in {', '.join(hidden)}, which its recipe doesn't say"] if hidden else []


def _types(precision: Any) -> Iterable[str]:  # noqa: ANN401 - a name, or how many operations run in each
    return precision if isinstance(precision, dict) else [precision] if precision else []
