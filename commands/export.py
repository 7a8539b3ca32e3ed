"""`bakeoff export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..progress import Steps
from ..recipe import LOAD_OPTIONS
from ..terminal import say
from .inspect import show
from .source_options import add_source, recipe_of, source_fields

if TYPE_CHECKING:
    import argparse

    from ..parity.budget import Gate


def add_export(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="bake a model into an artifact",
        description="Bake a model into an artifact folder, whole or not at all. The same export again does nothing.",
    )
    command.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="the artifact's folder")
    add_source(command)
    command.add_argument("--no-prove", action="store_true", help="don't run the parts against eager fp32")
    _add_gate(command)
    command.add_argument("--force", action="store_true", help="replace what is at DIR")
    command.add_argument("--reuse", action="append", default=[], metavar="DIR", help="take unchanged parts from DIR")
    command.set_defaults(run=_export)
    return command


def _add_gate(command: argparse.ArgumentParser) -> None:
    """Add what says how far parts may be from eager fp32."""
    command.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="PART=DB",
        help="least SQNR of a part to eager fp32, such as unet=30dB; by default what the noise floors justify",
    )
    command.add_argument(
        "--budget-reason", metavar="TEXT", help="why a budget is looser than that; kept in the manifest"
    )
    command.add_argument(
        "--repair", action="store_true", help="put back as few layers as needed in higher precision to pass"
    )
    command.add_argument(
        "--allow-failing", action="store_true", help="keep an artifact that fails its budget, marked for good"
    )


def _gate(options: argparse.Namespace) -> Gate:
    from ..parity.budget import Gate, parse

    return Gate(parse(options.budget, options.budget_reason), options.allow_failing)


def _export(options: argparse.Namespace) -> None:
    recipe, placement = recipe_of(options)
    from ..bake import export

    if placement.as_dict() != type(placement)().as_dict():
        say(f"note: @device, +{', +'.join(LOAD_OPTIONS)} are given when an artifact is loaded; ignored here")
    with Steps() as progress:
        if Path(options.model).suffix == ".safetensors":
            progress(f"reading {options.model}, which is hashed and converted once")
        details: dict[str, Any] = {
            **source_fields(options),
            "gate": _gate(options),
            "progress": progress,
            "reuse": options.reuse,
            "force": options.force,
        }
        if options.repair:
            if options.no_prove:
                message = "got --repair and --no-prove, expected one of them: what is put back is found by proofs"
                raise UsageError(message)
            from ..tuning.repair import export_repaired

            artifact, repaired = export_repaired(options.model, options.output, recipe, **details)
            told = repaired.in_words() if repaired else []
        else:
            artifact, told = export(options.model, options.output, recipe, prove=not options.no_prove, **details), []
    for line in told:
        say(line)
    show(artifact, as_json=options.json)
