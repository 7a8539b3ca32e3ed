"""`bakeoff bench`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..recipe import read_text
from ..terminal import say
from .metrics import known

if TYPE_CHECKING:
    import argparse

    from .experiment import Experiment


def add_bench(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="compare arms on the same work: latency, memory and quality in one record",
        description="Run an experiment: every arm in processes of its own, interleaved, on the same prompts and latents. "
        "Interrupted, the same command goes on at the next block.",
    )
    command.add_argument("experiment", nargs="?", type=Path, help="a .toml file that declares it all")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the record")
    command.add_argument("--model", help="a Diffusers folder, a hub id, a .safetensors checkpoint, or: shapes")
    command.add_argument("--config", metavar="DIR", help="of a .safetensors checkpoint, as for export")
    command.add_argument(
        "--calibration", metavar="FILE", help="what bakeoff calibrate wrote, for recipes such as onnx:w8a8"
    )
    command.add_argument(
        "--no-prove",
        dest="prove",
        action="store_const",
        const=False,
        help="don't prove what is exported: its pictures are judged",
    )
    command.add_argument(
        "--arms", help="recipes and artifact folders after commas: torch:fp32,openvino:bf16@cpu,my/artifact"
    )
    command.add_argument("--baseline", help="the arm that the others are compared with; by default the first")
    command.add_argument("--prompts", help="a prompt set (shapes-256, shapes-1024), or a .txt file with one a line")
    command.add_argument("--negative-prompt", help="of all prompts")
    command.add_argument("--scheduler", help="a Diffusers scheduler class")
    for name, kind, text in (
        ("steps", int, "denoising steps (20)"),
        ("blocks", int, "times that every arm runs (5)"),
        ("repetitions", int, "batches that are timed in each block (5)"),
        ("warmups", int, "batches before them (1)"),
        ("batch", int, "prompts in a batch (1)"),
        ("height", int, "pixels"),
        ("width", int, "pixels"),
        ("threads", int, "of every arm; by default the physical cores"),
        ("timed-prompts", int, "prompts that the repetitions rotate through (8)"),
        ("quality-prompts", int, "prompts that are judged (64)"),
        ("guidance-scale", float, "by default the pipeline's own"),
        ("timeout-s", float, "silence after which an arm counts as hung (1800)"),
        ("seed", int, "of the order of arms in a block (0)"),
    ):
        command.add_argument(f"--{name}", type=kind, help=text, metavar="N")
    command.add_argument("--rigorous", action="store_true", help="10 blocks")
    command.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="AXIS=A,B",
        help="measure at several values: steps=4,8,20; repeatable",
    )
    command.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME=WEIGHTS",
        help=f"judge by a metric that takes weights, from a folder or a hub id; repeatable: {', '.join(known())}",
    )
    command.add_argument(
        "--resident",
        action="store_true",
        default=None,
        help="keep the arms' processes alive between blocks, where loading outweighs the timed work",
    )
    command.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="arms that draw their judged pictures at once, before anything is timed: for a GPU, or many cores (1)",
    )
    command.set_defaults(run=_bench)
    return command


def _bench(options: argparse.Namespace) -> None:
    from ..reports.summary import summarize
    from ..reports.tables import as_json, markdown
    from .display import Display
    from .runner import run

    declared = _declared(options)
    with Display() as display:
        record = run(declared, options.output, display, options.jobs)
    summary = summarize(record)
    print(as_json(summary) if options.json else markdown(summary))
    say(f"report: bakeoff report {options.output}")


def _declared(options: argparse.Namespace) -> Experiment:
    """Return the experiment of the file, or of the options."""
    from .experiment import Experiment, from_dict, from_toml

    names = [field.name for field in fields(Experiment)]
    given = {name: value for name in names if (value := getattr(options, name, None)) not in (None, [])}
    if options.experiment:
        if given:
            message = f"got {options.experiment} and --{', --'.join(given)}; a file declares the whole experiment"
            raise UsageError(message, fix="write them into the file")
        return from_toml(read_text(options.experiment, "experiment"))
    if options.rigorous:
        given.setdefault("blocks", 10)
    given["sweep"] = dict(_axis(text) for text in options.sweep)
    given["metrics"] = dict(_weights(text) for text in options.metric)
    return from_dict(given)


def _weights(text: str) -> tuple[str, str]:
    name, equals, weights = text.partition("=")
    if not equals or not weights:
        message = f"got --metric {text}, expected a metric and its weights"
        raise UsageError(message, fix="--metric lpips=FOLDER")
    return name.replace("-", "_"), weights


def _axis(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        message = f"got --sweep {text}, expected an axis and its values"
        raise UsageError(message, fix="--sweep steps=4,8,20")
    return name.replace("-", "_"), [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:  # noqa: ANN401 - a number, or a name
    try:
        return json.loads(text)
    except ValueError:
        return text
