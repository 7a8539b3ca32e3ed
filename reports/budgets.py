"""What an arm may take, said by the user: each limit becomes a gate."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, unknown
from .gates import Gate

if TYPE_CHECKING:
    from .summary import Row


@dataclass(frozen=True)
class Budget:
    """Limits; None where there is none."""

    ratio: float | None = None
    """Most time against the baseline: the upper bound of the 95 % interval must stay within it."""
    median_s: float | None = None
    """Most seconds a batch, at the median."""
    peak_anon_bytes: float | None = None
    """Most anonymous memory, in bytes."""
    disk_bytes: float | None = None
    psnr_db: float | None = None
    """Least PSNR to the reference of every picture."""
    flip: float | None = None
    """Most mean ꟻLIP to the reference."""

    @classmethod
    def read(cls, data: dict[str, Any]) -> Budget:
        """Read a table of a TOML file.

        Raises:
            UsageError: it has a limit that there isn't, or one that is no number.
        """
        known = [item.name for item in fields(cls)]
        for name, value in data.items():
            if name not in known:
                raise UsageError(unknown("limit of a budget", name, known))
            if isinstance(value, bool) or not isinstance(value, int | float):
                message = f"got {name} = {value!r} in a budget, expected a number"
                raise UsageError(message)
        return cls(**data)

    def gates(self, row: Row, baseline: str) -> list[Gate]:
        """Return a gate a limit; what wasn't measured doesn't hold."""
        anon = row.memory["peak_anon_bytes"] if row.memory else None
        figures = row.figures or {}
        psnr_db = min(figures["psnr_db"]) if "psnr_db" in figures else None
        flip = statistics.fmean(figures["flip"]) if "flip" in figures else None
        found = [
            None if self.ratio is None else _ratio(row, self.ratio, baseline),
            _most("seconds a batch", row.median_s, self.median_s),
            _most("bytes of anonymous memory", anon, self.peak_anon_bytes),
            _most("bytes on disk", row.disk_bytes, self.disk_bytes),
            _most("mean ꟻLIP", flip, self.flip),
            _least_psnr(psnr_db, self.psnr_db),
        ]
        return [gate for gate in found if gate]


def _ratio(row: Row, most: float, baseline: str) -> Gate:
    ratio = row.verdict.ratio if row.verdict else None
    if ratio is None:
        return Gate("budget", holds=False, detail="no ratio: it takes a baseline and two blocks")
    interval = f"{ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
    detail = f"takes {interval} of {baseline}'s time, at most {most:g} allowed"
    return Gate("budget", holds=ratio.high <= most, detail=detail)


def _least_psnr(found: float | None, least: float | None) -> Gate | None:
    if least is None:
        return None
    told = "unknown" if found is None else f"{found:.1f} dB"
    detail = f"worst PSNR {told}, at least {least:g} dB demanded"
    return Gate("budget", holds=found is not None and found >= least, detail=detail)


def _most(what: str, found: float | None, most: float | None) -> Gate | None:
    if most is None:
        return None
    told = "an unknown number of" if found is None else f"{found:.6g}"
    return Gate(
        "budget", holds=found is not None and found <= most, detail=f"{told} {what}, at most {most:.6g} allowed"
    )
