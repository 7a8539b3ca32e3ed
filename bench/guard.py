"""What else the machine did while an arm was timed: load, other processes, stolen time, frequency, throttling."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import nvidia

MOST_OTHERS = 0.1
"""Share of one core that other processes may take before a run is tainted."""
MOST_STOLEN = 0.02
_BUSY = (0, 1, 2, 5, 6)
"""user, nice, system, irq and softirq of `/proc/stat`'s first line."""
_STEAL = 7


@dataclass(frozen=True)
class Reading:
    """Counters at a moment, in seconds summed over all cores."""

    at: float
    busy: float
    stolen: float
    ours: float
    foreign: int = 0
    """Other processes that compute on GPUs."""
    throttled: tuple[str, ...] = ()


def read(pid: int) -> Reading:
    """Read the machine's counters and those of one process; zeros where the system has none."""
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return Reading(time.monotonic(), 0, 0, 0)
    busy = sum(ticks[i] for i in _BUSY if i < len(ticks))
    ours = (int(words[11]) + int(words[12])) / tick
    return Reading(
        time.monotonic(),
        busy / tick,
        ticks[_STEAL] / tick,
        ours,
        nvidia.foreign_processes(_family(pid)),
        tuple(nvidia.throttled()),
    )


def _family(pid: int) -> set[int]:
    """Return the processes that are ours: one that is watched, this one, and all that it has started."""
    import psutil

    try:
        children = {child.pid for child in psutil.Process().children(recursive=True)}
    except psutil.Error:
        children = set()
    return {pid, os.getpid(), *children}


def between(before: Reading, after: Reading) -> dict[str, Any]:
    """Say what happened between two readings; `tainted` names what makes the run doubtful."""
    wall = max(after.at - before.at, 1e-9)
    others = max(after.busy - before.busy - (after.ours - before.ours), 0) / wall
    stolen = (after.stolen - before.stolen) / wall
    tainted = [
        text
        for text, beyond in (
            (f"other processes took {others:.2f} cores", others > MOST_OTHERS),
            (f"the host stole {stolen:.2f} cores", stolen > MOST_STOLEN),
            (f"{after.foreign} other processes used a GPU", after.foreign > 0),
            (f"a GPU was held back by {', '.join(after.throttled)}", bool(after.throttled)),
        )
        if beyond
    ]
    return {
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "others_cores": round(others, 3),
        "stolen_cores": round(stolen, 3),
        "frequency_mhz": frequency_mhz(),
        "gpu_clocks": nvidia.clocks(),
        "tainted": tainted,
    }


def frequency_mhz() -> float | None:
    """Return the mean frequency of the cores now, in MHz, or None where it can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    values = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(values) / len(values), 1) if values else None
