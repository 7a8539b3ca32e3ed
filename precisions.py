"""`bakeoff precisions`: which backend has which precision, here and anywhere, and why where it hasn't."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .recipe import PRECISIONS
from .terminal import print_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

_COMPUTES_NOTHING = "null"
_MARKS = {"yes": "yes", "floats": "yes ¹", "absent": "not here", "no": "no"}


@dataclass(frozen=True)
class Cell:
    """A precision in a backend."""

    precision: str
    backend: str
    exported: bool
    """Whether it can be baked, on any machine."""
    runs: bool
    """Whether it can be run on this one's CPU."""
    reason: str | None
    """Why not, or how else it is run here than it is meant."""
    fix: str | None = None

    @property
    def state(self) -> str:
        if not self.exported:
            return "no"
        return ("floats" if self.reason else "yes") if self.runs else "absent"


def cells() -> list[Cell]:
    """Return each precision in each backend that computes something, precision by precision."""
    from . import plugins

    backends = [name for name in plugins.names("exporters") if name != _COMPUTES_NOTHING]
    return [_cell(precision, backend) for precision in PRECISIONS for backend in backends]


def _cell(precision: str, backend: str) -> Cell:
    from . import plugins

    exporter = plugins.exporter(backend)
    if precision not in exporter.precisions:
        why = getattr(exporter, "reasons", {}).get(precision, "it doesn't say why")
        return Cell(precision, backend, exported=False, runs=False, reason=why)
    runtime = plugins.runtime(backend)
    found = runtime.probe()
    obstacle = runtime.obstacle(precision) if found.ok else found
    if obstacle is None:
        return Cell(precision, backend, exported=True, runs=True, reason=None)
    return Cell(precision, backend, exported=True, runs=obstacle.ok, reason=obstacle.reason, fix=obstacle.fix)


def markdown(found: Iterable[Cell]) -> list[str]:
    """Return the table of what can be baked on any machine, and under it why not, as lines of Markdown."""
    listed = list(found)
    backends = list(dict.fromkeys(cell.backend for cell in listed))
    rows = {cell.precision: [] for cell in listed}  # type: dict[str, list[str]]
    for cell in listed:
        rows[cell.precision].append("yes" if cell.exported else "no")
    head = [
        "| precision | " + " | ".join(f"`{name}`" for name in backends) + " |",
        "| --- " * (len(backends) + 1) + "|",
    ]
    body = [f"| `{precision}` | " + " | ".join(marks) + " |" for precision, marks in rows.items()]
    why = [f"- No `{cell.backend}:{cell.precision}`: {cell.reason}." for cell in listed if not cell.exported]
    return [*head, *body, "", *why]


def add_precisions(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser(
        "precisions",
        help="show which backend has which precision, and why not",
        description="Show which backend can be given which precision in a recipe, whether it runs on this machine's CPU, "
        "and why where it doesn't.",
    )
    command.set_defaults(run=_precisions)
    return command


def _precisions(options: argparse.Namespace) -> None:
    found = cells()
    if options.json:
        print_json([asdict(cell) for cell in found])
        return
    backends = list(dict.fromkeys(cell.backend for cell in found))
    print(f"{'':14}" + "".join(f"{name:10}" for name in backends).rstrip())
    for precision in PRECISIONS:
        marks = [_MARKS[cell.state] for cell in found if cell.precision == precision]
        print(f"{precision:14}" + "".join(f"{mark:10}" for mark in marks).rstrip())
    print()
    for cell in found:
        if cell.reason:
            mark = "¹ " if cell.state == "floats" else ""
            print(f"{mark}{cell.backend}:{cell.precision}: {cell.reason}")
            if cell.fix:
                print(f"  hint: {cell.fix}")
