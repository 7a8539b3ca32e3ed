"""What a running bench says of its rest: time left, and how far the repetitions lie apart."""

from __future__ import annotations

import statistics
import time

_MINUTE_S = 60


class Outlook:
    """Learns from each finished run of an arm."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spreads: list[float] = []

    def took(self, samples_s: list[float]) -> None:
        self._spreads.append(statistics.pstdev(samples_s) / statistics.fmean(samples_s))

    def text(self, runs_left: int) -> str:
        """Return the words to append, empty before the first run has ended."""
        if not self._spreads:
            return ""
        left = (time.monotonic() - self._began) / len(self._spreads) * runs_left
        time_left = f"{left / _MINUTE_S:.0f} min" if left >= _MINUTE_S else f"{left:.0f} s"
        return f" ({time_left} left, noise {statistics.median(self._spreads):.1%})"
