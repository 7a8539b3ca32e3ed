"""What else the machine did while an arm was timed: load, other processes, stolen time, frequency, throttling."""

from __future__ import annotations

import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .. import nvidia

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_OTHERS = 0.1
"""Share of one core that other processes may take before a run is tainted."""
MOST_STOLEN = 0.02
_BUSY = (0, 1, 2, 5, 6)
"""user, nice, system, irq and softirq of `/proc/stat`'s first line."""
_STEAL = 7


SAMPLE_EVERY_S = 0.25
"""How often GPUs are asked while an arm is timed: between runs they idle, and tell nothing of them."""


@dataclass(frozen=True)
class Gpus:
    """What GPUs did at a moment."""

    foreign: int = 0
    """Other processes that compute on them."""
    throttled: tuple[str, ...] = ()
    clocks: tuple[dict[str, int | None], ...] = ()
    """Of each, as `nvidia.clocks` tells them."""


@dataclass(frozen=True)
class Reading:
    """Counters at a moment, in seconds summed over all cores."""

    at: float
    busy: float
    stolen: float
    ours: float
    gpus: Gpus = Gpus()


def read(pid: int, gpu: str | None = None) -> Reading:
    """Read the machine's counters and those of one process; zeros where the system has none.

    Args:
        pid: of the process that is watched.
        gpu: UUID of the GPU that it uses; without one all GPUs are asked.
    """
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return Reading(time.monotonic(), 0, 0, 0)
    busy = sum(ticks[i] for i in _BUSY if i < len(ticks))
    ours = (int(words[11]) + int(words[12])) / tick
    return Reading(time.monotonic(), busy / tick, ticks[_STEAL] / tick, ours, _gpus(pid, gpu))


def _gpus(pid: int, gpu: str | None) -> Gpus:
    if not nvidia.has_any():
        return Gpus()
    foreign = nvidia.foreign_processes({pid, os.getpid()}, gpu)
    if foreign:  # or what we have started; that takes longer to find out
        foreign = nvidia.foreign_processes(_family(pid), gpu)
    return Gpus(foreign, tuple(nvidia.throttled(gpu)), tuple(nvidia.clocks(gpu)))


class Watch:
    """Context manager that watches the machine while a process is timed: both ends, and GPUs all along, from a thread."""

    def __init__(self, pid: int, gpu: str | None = None) -> None:
        self._pid, self._gpu = pid, gpu
        self._during: list[Gpus] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self.before = read(self._pid, self._gpu)
        if nvidia.has_any():
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.after = read(self._pid, self._gpu)
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def seconds(self) -> float:
        return self.after.at - self.before.at

    def told(self) -> dict[str, Any]:
        """Say what happened, as `between` does."""
        return between(self.before, self.after, self._during)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self._during.append(_gpus(self._pid, self._gpu))


def _family(pid: int) -> set[int]:
    """Return the processes that are ours: one that is watched, this one, and all that it has started."""
    import psutil

    try:
        children = {child.pid for child in psutil.Process().children(recursive=True)}
    except psutil.Error:
        children = set()
    return {pid, os.getpid(), *children}


def between(before: Reading, after: Reading, during: Sequence[Gpus] = ()) -> dict[str, Any]:
    """Say what happened between two readings; `tainted` names what makes the run doubtful."""
    wall = max(after.at - before.at, 1e-9)
    others = max(after.busy - before.busy - (after.ours - before.ours), 0) / wall
    stolen = (after.stolen - before.stolen) / wall
    gpus = [before.gpus, *during, after.gpus]
    foreign = max(each.foreign for each in gpus)
    throttled = sorted({reason for each in gpus for reason in each.throttled})
    tainted = [
        text
        for text, beyond in (
            (f"other processes took {others:.2f} cores", others > MOST_OTHERS),
            (f"the host stole {stolen:.2f} cores", stolen > MOST_STOLEN),
            (f"{foreign} other processes used a GPU", foreign > 0),
            (f"a GPU was held back by {', '.join(throttled)}", bool(throttled)),
        )
        if beyond
    ]
    return {
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "others_cores": round(others, 3),
        "stolen_cores": round(stolen, 3),
        "frequency_mhz": frequency_mhz(),
        "gpu_clocks": _clocks(during or gpus),
        "gpu_samples": len(during),
        "tainted": tainted,
    }


def _clocks(seen: Sequence[Gpus]) -> list[dict[str, float | None]]:
    """Return of each GPU the lowest and the median clock that were seen, the highest that it has, and the most heat."""
    found = []
    for moments in zip(*(each.clocks for each in seen), strict=False):
        mhz, celsius = (
            [value for each in moments if (value := each[name]) is not None] for name in ("sm_mhz", "celsius")
        )
        found.append(
            {
                "lowest_sm_mhz": min(mhz, default=None),
                "median_sm_mhz": statistics.median(mhz) if mhz else None,
                "most_sm_mhz": moments[0]["most_sm_mhz"],
                "celsius": max(celsius, default=None),
            }
        )
    return found


def frequency_mhz() -> float | None:
    """Return the mean frequency of the cores now, in MHz, or None where it can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    values = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(values) / len(values), 1) if values else None
