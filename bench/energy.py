"""Energy from counters, in joules: RAPL's of processor packages, NVML's of GPUs. Absent where there are none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import nvidia

_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter's value, and after how much it starts again from 0 (None: never)."""

    joules: float
    wraps_at: float | None = None


def read(gpu: str | None = None, rapl: Path = _RAPL) -> dict[str, Counter]:
    """Read every counter that may be read, of GPUs that of the one in use; RAPL's are root's alone on many systems.

    Args:
        gpu: its UUID; without one all GPUs are read.
        rapl: where Linux has RAPL's counters.
    """
    found = {name: Counter(joules) for name, joules in nvidia.joules(gpu).items()}
    for zone in sorted(rapl.glob("intel-rapl:?")):  # packages; their parts, such as intel-rapl:0:0, are within
        try:
            name = f"{(zone / 'name').read_text().strip()} ({zone.name})"
            microjoules = [int((zone / file).read_text()) for file in ("energy_uj", "max_energy_range_uj")]
        except (OSError, ValueError):
            continue
        found[name] = Counter(*(value / 1e6 for value in microjoules))
    return found


def between(before: dict[str, Counter], after: dict[str, Counter]) -> dict[str, float] | None:
    """Return the joules of each counter between two readings, or None without any.

    A counter that stood still says nothing: GPUs' move some ten times a second, so a short window may lie between two ticks.
    """
    spent = {name: _difference(before[name], counter) for name, counter in after.items() if name in before}
    return {name: joules for name, joules in spent.items() if joules} or None


def _difference(before: Counter, after: Counter) -> float:
    spent = after.joules - before.joules
    return spent + (after.wraps_at or 0.0) if spent < 0 else spent
