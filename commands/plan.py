"""`bakeoff plan` and `bakeoff why-rebuild`: what an export would take, and what it would change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import print_json
from .source_options import add_source, plan_of

if TYPE_CHECKING:
    import argparse


def add_plan(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="predict memory, disk and time of an export, and the memory of running it",
        description="Predict what an export takes from the model's headers, and refuse what can't fit. Writes nothing.",
    )
    command.add_argument("-o", "--output", type=Path, default=Path(), metavar="DIR", help="where it would be written")
    add_source(command)
    command.set_defaults(run=_plan)
    return command


def _plan(options: argparse.Namespace) -> None:
    from ..forecast import running, table
    from ..memory import available_bytes
    from ..plan import check_room, existing_parent

    planned, free = plan_of(options), available_bytes()
    forecast = planned.forecast(existing_parent(options.output))
    if options.json:
        print_json({**forecast.as_dict(), "available_bytes": free, "running": running(forecast, free)})
    else:
        print(f"{planned.source.family.name} from {planned.source.id}", *table(forecast, free), sep="\n")
    check_room(planned, options.output)


def add_why_rebuild(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "why-rebuild", help="say which fields of an artifact's key an export would change"
    )
    command.add_argument("folder", type=Path)
    add_source(command)
    command.set_defaults(run=_why_rebuild)
    return command


def _why_rebuild(options: argparse.Namespace) -> None:
    from ..artifact import Artifact
    from ..plan import why_rebuild

    reasons = why_rebuild(Artifact.open(options.folder), plan_of(options))
    if options.json:
        print_json({"rebuild": bool(reasons), "fields": reasons})
        return
    print("\n".join(reasons) if reasons else f"{options.folder} is up to date")
