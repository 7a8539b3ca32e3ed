"""The command line: data to stdout, progress and errors to stderr."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from typing import TYPE_CHECKING

if not __package__:
    sys.exit("type bakeoff, not python cli.py: run as a script, the folder's modules would load twice")

from .bench.command import add_bench
from .commands.demo import add_demo
from .commands.export import add_export
from .commands.generate import add_generate
from .commands.inspect import add_inspect
from .commands.plan import add_plan, add_why_rebuild
from .commands.verify import add_verify
from .doctor import add_doctor
from .errors import BakeoffError, ResourceError, UsageError
from .precisions import add_precisions
from .reports.command import add_compare, add_report
from .terminal import print_json
from .tuning.calibrate import add_calibrate
from .tuning.choose import add_recipe
from .tuning.sensitivity import add_sensitivity

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_CODES = """\
exit codes:
  0   done
  1   something that bakeoff has no name for
  2   a call, recipe or input that can't be meant as it is
  3   a model that isn't there, or whose weights are pickles
  4   a folder that isn't an artifact, or one that was changed
  5   a backend or device that can't be used here
  6   a part that a backend couldn't take
  7   a part that doesn't compute what its source computes
  8   too little memory or disk
  130 stopped on request
"""
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return int(options.run(options) or 0)
    except BakeoffError as error:
        return _report(error, options)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _report(_named(error), options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _INTERRUPTED


def _report(error: BakeoffError, options: argparse.Namespace) -> int:
    if getattr(options, "json", False):
        print_json({"error": type(error).__name__, "message": error.message, "fix": error.fix})
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _named(error: OSError) -> BakeoffError:
    """Turn what the system refused into an error of ours."""
    message = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ResourceError(message, fix="free some space on that disk")
    return UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bakeoff",
        description="Bake Diffusers pipelines into hardware artifacts, then hold a bake-off between them.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_doctor,
        add_precisions,
        add_export,
        add_plan,
        add_inspect,
        add_verify,
        add_why_rebuild,
        add_generate,
        add_calibrate,
        add_sensitivity,
        add_recipe,
        add_bench,
        add_report,
        add_compare,
        add_demo,
    ):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _version() -> str:
    from importlib.metadata import version

    return f"bakeoff {version('bakeoff')}"


def _quiet_libraries() -> None:
    """Keep what libraries say of themselves off the terminal; without importing them, so that errors come at once."""
    import warnings

    warnings.filterwarnings("ignore")
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


if __name__ == "__main__":
    sys.exit(main())
