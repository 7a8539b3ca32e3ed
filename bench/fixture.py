"""The fixture `bakeoff`, for users' own tests: hold an arm to a budget of latency, memory and quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..reports.summary import Row, Summary


class Measured:
    """A finished experiment, to be held to budgets."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def row(self, arm: str) -> Row:
        """Return all about an arm."""
        return next(row for row in self.summary.rows if row.name == arm)

    def require(
        self, arm: str, *, ratio: float | None = None, peak_anon_bytes: float | None = None, gates: bool = True
    ) -> None:
        """Fail the test, with the figures, where an arm exceeds its budget.

        Args:
            arm: its name.
            ratio: most time against the baseline; the upper bound of the 95 % interval must stay within it.
            peak_anon_bytes: most anonymous memory.
            gates: whether its pictures must pass their gates.

        Raises:
            AssertionError: it exceeds one.
        """
        row = self.row(arm)
        broken = [row.failure] if row.failure else self._broken(row, ratio, peak_anon_bytes, gates=gates)
        if broken:
            message = f"{arm} exceeds its budget: {'; '.join(broken)}"
            raise AssertionError(message)

    def _broken(self, row: Row, ratio: float | None, peak_anon_bytes: float | None, *, gates: bool) -> list[str]:
        broken = []
        if ratio is not None:
            found = row.verdict.ratio if row.verdict else None
            if found is None:
                broken.append("no ratio: it takes a baseline and two blocks")
            elif found.high > ratio:
                interval = f"{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"
                broken.append(f"takes {interval} of {self.summary.baseline}'s time, at most {ratio:g} allowed")
        if peak_anon_bytes is not None:
            peak = row.memory["peak_anon_bytes"] if row.memory else None
            if peak is None or peak > peak_anon_bytes:
                broken.append(f"takes {peak} bytes of anonymous memory, at most {peak_anon_bytes:.0f} allowed")
        if gates:
            broken += [f"gate {gate.name}: {gate.detail}" for gate in row.gates if gate.holds is False]
        return broken


@pytest.fixture
def bakeoff(tmp_path: Any) -> Callable[..., Measured]:  # noqa: ANN401 - a Path
    """Run an experiment, given as the fields of a TOML experiment file, and return what it measured."""

    def measure(**declared: Any) -> Measured:  # noqa: ANN401 - as in the file
        from ..reports.summary import summarize
        from .experiment import from_dict
        from .runner import run

        return Measured(summarize(run(from_dict(declared), tmp_path / "bakeoff", lambda _: None)))

    return measure
