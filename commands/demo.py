"""`bakeoff demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import print_json, say

if TYPE_CHECKING:
    import argparse


def add_demo(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "demo", help="bake the embedded model for each backend and compare the pictures"
    )
    command.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR")
    command.set_defaults(run=_demo)
    return command


def _demo(options: argparse.Namespace) -> None:
    from .. import demo

    artifacts = demo.bake(options.output, say)
    rows = demo.run(options.output, artifacts, say)
    if not options.json:
        print(demo.table(rows), f"\npictures: {options.output / 'contact-sheet.png'}\n", sep="\n", flush=True)
    verdict = demo.bench(options.output, artifacts)
    if options.json:
        print_json({"pictures": rows, "verdict": verdict})
        return
    print("", *verdict, f"\nreport: {options.output / 'bench' / 'report.html'}", sep="\n")
