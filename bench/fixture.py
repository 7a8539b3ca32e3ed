"""The fixture `bakeoff`, for users' own tests: hold an arm to a budget of latency, memory and quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ..reports.budgets import Budget

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

    def require(self, arm: str, *, gates: bool = True, **limits: float) -> None:
        """Fail the test, with the figures, where an arm exceeds its budget.

        Args:
            arm: its name.
            gates: whether its pictures must pass their gates, too.
            limits: those of `bakeoff.reports.budgets.Budget`.

        Raises:
            AssertionError: it exceeds one.
        """
        row = self.row(arm)
        judged = Budget.read(limits).gates(row, self.summary.baseline) + (row.gates if gates else [])
        broken = (
            [row.failure] if row.failure else [f"{gate.name}: {gate.detail}" for gate in judged if gate.holds is False]
        )
        if broken:
            message = f"{arm} exceeds its budget: {'; '.join(broken)}"
            raise AssertionError(message)


@pytest.fixture
def bakeoff(tmp_path: Any) -> Callable[..., Measured]:  # noqa: ANN401 - a Path
    """Run an experiment, given as the fields of a TOML experiment file, and return what it measured."""

    def measure(**declared: Any) -> Measured:  # noqa: ANN401 - as in the file
        from ..reports.summary import summarize
        from .experiment import from_dict
        from .runner import run

        return Measured(summarize(run(from_dict(declared), tmp_path / "bakeoff")))

    return measure
