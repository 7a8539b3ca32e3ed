"""`bakeoff report` (and `replay`, another word for it) and `bakeoff compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from .summary import Summary

FORMATS = ("html", "markdown", "csv", "json", "model-card", "pytest-benchmark")
_FILES = {
    "html": "report.html",
    "markdown": "report.md",
    "csv": "report.csv",
    "json": "report.json",
    "model-card": "model-card.md",
    "pytest-benchmark": "pytest-benchmark.json",
}


def add_report(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser(
        "report", aliases=["replay"], help="render a record, of whatever machine, as a page and tables"
    )
    command.add_argument("record", type=Path, help="the folder that bakeoff bench wrote, or its record.json")
    command.add_argument("--format", choices=FORMATS, action="append", help="by default all but the last two")
    command.add_argument("-o", "--output", type=Path, metavar="DIR", help="by default beside the record")
    command.add_argument("--png", action="store_true", help="write the figures as PNG files, too")
    command.set_defaults(run=_report)
    return command


def _report(options: argparse.Namespace) -> None:
    from . import tables
    from .record import read_record
    from .summary import summarize

    folder = options.record if options.record.is_dir() else options.record.parent
    summary = summarize(read_record(options.record))
    written = write(summary, folder, options.output or folder, options.format or FORMATS[:-2], png=options.png)
    if options.json:
        print(tables.as_json(summary))
    else:
        print("\n".join(map(str, written)))


def write(
    summary: Summary, folder: Path, output: Path, formats: Sequence[str] = FORMATS[:-2], *, png: bool = False
) -> list[Path]:
    """Render a record of `folder`, whose pictures lie there, into `output`; return the files."""
    from . import tables
    from .figures import figures
    from .page import page
    from .pairs import worst_pairs

    render = {
        "html": lambda: page(summary, worst_pairs(summary, folder)),
        "markdown": lambda: tables.markdown(summary),
        "csv": lambda: tables.as_csv(summary),
        "json": lambda: tables.as_json(summary),
        "model-card": lambda: tables.model_card(summary),
        "pytest-benchmark": lambda: tables.pytest_benchmark(summary),
    }
    output.mkdir(parents=True, exist_ok=True)
    written = [_write(output / _FILES[name], render[name]().encode()) for name in formats]
    if png:
        written += [_write(output / f"{figure.name}.png", figure.png) for figure in figures(summary)]
    return written


def _write(file: Path, content: bytes) -> Path:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)
    return file


def add_compare(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "compare", help="set records of two machines or two dates side by side, if their work is the same"
    )
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.set_defaults(run=_compare)
    return command


def _compare(options: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from .compare import compare, table
    from .record import read_record

    first, second = read_record(options.first), read_record(options.second)
    folders = tuple(path if path.is_dir() else path.parent for path in (options.first, options.second))
    compared = compare(first, second, folders)
    print(json.dumps([asdict(each) for each in compared], indent=1) if options.json else table(compared, first, second))
