"""`bakeoff sensitivity`: what each layer adds to the pictures' error when it alone is rounded, on whole trajectories."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..errors import ParityError, UsageError, unknown
from ..memory import give_back
from ..parity.drawing import open_whole
from ..plan import module_keys, open_calibration
from ..progress import Steps
from ..quantize.sensitivity import Layer, Sensitivity
from ..sources.source import Source
from .calibrate import FEWEST_PROMPTS
from .options import add_drawing_options, check_output, prompts_of, size_of
from .studio import Studio, distance, psnr_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..models.prompts import Prompt
    from ..quantize.calibration import Calibration

DEFAULT_PRECISIONS = ("int8", "int4")
DEFAULT_PROMPTS, DEFAULT_STEPS = 4, 6
_SHOWN = 3


def sensitivity(
    model: str,
    prompts: Sequence[Prompt],
    file: Path,
    *,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    parts: Sequence[str] = (),
    steps: int = DEFAULT_STEPS,
    calibration: Path | None = None,
    size: tuple[int, int] | None = None,
    revision: str | None = None,
    config: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Round one layer at a time, and draw each prompt on the same latents: the error of the pictures is the layer's.

    Everything runs in eager float32 with torch, and at last once in bfloat16, which layers that aren't rounded are left in. The
    file is written after each layer, and an interrupted run goes on where it stopped.

    Args:
        model: a Diffusers folder, a hub id, a single-file checkpoint, or `shapes`.
        prompts: what to draw, all in one batch.
        file: to write.
        precisions: of low-bit weights.
        parts: of the pipeline; by default all that make pictures from text.
        steps: denoising steps of each picture.
        calibration: for precisions that round activations with calibrated scales.
        size: height and width in pixels; by default the model's own.
        revision: of a hub model.
        config: of a single-file checkpoint.
        progress: called with a line at each layer.

    Raises:
        UsageError: a precision or part that there isn't, too few prompts, or a calibration that is missing or another's.
        CorruptError: the file is there already and is something else.
        ResourceError: all parts in float32 don't fit into memory at once.
    """
    if len(prompts) < FEWEST_PROMPTS:
        message = f"got {len(prompts)} prompts to measure with, expected at least {FEWEST_PROMPTS}"
        raise UsageError(message, fix=f"give more, such as --count {DEFAULT_PROMPTS}")
    source = Source.open(model, revision, config=config)
    formats = {precision: plugins.weight_format(precision) for precision in precisions}
    for precision, weight_format in formats.items():
        if weight_format is None:
            raise UsageError(unknown("precision of low-bit weights", precision, plugins.names("formats")))
    calibrated = [name for name, weight_format in formats.items() if weight_format and weight_format.calibrated]
    helped = calibration is not None and any(each and each.uses_inputs for each in formats.values())
    what = f"rounding to {calibrated[0]}" if calibrated else ""
    scales = open_calibration(calibration, source, what) if calibrated or helped else None
    info = {
        "model": source.id,
        "revision": source.revision,
        "modules": module_keys(source),
        "config": config,
        "prompts": [prompt.text for prompt in prompts],
        "steps": steps,
        "size": size,
        "calibration": scales.info["sha256"] if scales else None,
    }
    found = _begun(file, info)
    texts, options = [prompt.text for prompt in prompts], {"steps": steps, "size": size}
    with open_whole(source) as engine:
        studio = Studio(engine, source, texts, options)
        for part in parts or list(studio.modules):
            if part not in studio.modules:
                raise UsageError(unknown("part", part, studio.modules))
            _measure(studio, found, part, precisions, scales, file, progress)
        if found.wide:
            return found
        reference, stored = studio.reference, studio.in_bfloat16()
        del studio
    found.wide = {"stored": stored, "computed": _in_bfloat16(source, texts, options, reference)}
    progress(f"everything in bfloat16: {_decibels(found.wide['computed'])}; weights alone: {_decibels(stored)}")
    found.save(file)
    return found


def _begun(file: Path, info: dict[str, Any]) -> Sensitivity:
    """Return what an interrupted run has left, if it was of the same model, prompts and steps."""
    if not file.is_file():
        return Sensitivity(info)
    found = Sensitivity.open(file)
    asked = json.loads(json.dumps(info))
    others = sorted(name for name in {*asked, *found.info} if asked.get(name) != found.info.get(name))
    if others:
        message = f"{file} was measured with other {', '.join(others)}"
        raise UsageError(message, fix="give another file with -o, or delete this one")
    return found


def _measure(
    studio: Studio,
    found: Sensitivity,
    part: str,
    precisions: Sequence[str],
    calibration: Calibration | None,
    file: Path,
    progress: Callable[[str], None],
) -> None:
    """Measure the layers of a part that weren't yet, each alone and then all together."""
    names = studio.layers(part)
    known, together = found.parts.setdefault(part, {}), found.together.setdefault(part, {})
    for precision in precisions:
        mixture = plugins.mixture(precision)
        weight_format = mixture.formats[precision]
        own = {
            path: name
            for path, name in names.items()
            if weight_format.obstacle(studio.modules[part].get_submodule(path).weight.shape) is None  # type: ignore[arg-type]
        }
        for number, (path, name) in enumerate(own.items(), 1):
            weight: Any = studio.modules[part].get_submodule(path).weight
            layer = known.setdefault(name, Layer(tuple(weight.shape), studio.macs[part, path]))
            if precision not in layer.errors:
                layer.errors[precision] = studio.error({part: ({path: name}, mixture)}, calibration)
                progress(f"{part}, {precision}: [{number}/{len(own)}] {name} {_decibels(layer.errors[precision])}")
                found.save(file)
        if own and precision not in together:
            together[precision] = studio.error({part: (own, mixture)}, calibration)
            progress(f"{part}, {precision}: all layers at once {_decibels(together[precision])}")
            found.save(file)


def _in_bfloat16(
    source: Source, texts: Sequence[str], options: Mapping[str, Any], reference: NDArray[np.float64]
) -> float:
    """Return the error of pictures that are drawn with everything in bfloat16."""
    give_back()
    try:
        with open_whole(source, "bf16") as engine:
            return distance(Studio(engine, source, texts, options).reference, reference)
    except ParityError:
        return math.inf


def _decibels(error: float) -> str:
    """Return the PSNR of pictures with this mean squared error, of pixels from 0 to 1."""
    return f"{psnr_of(error):.1f} dB" if 0 < error < math.inf else ("broken" if error else "unchanged")


def add_sensitivity(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser(
        "sensitivity",
        help="measure what each layer adds to the pictures' error when it is rounded",
        description="Round one layer at a time and draw. An interrupted run goes on where it stopped.",
    )
    add_drawing_options(command, "layers.json", DEFAULT_PROMPTS, DEFAULT_STEPS)
    command.add_argument(
        "--precisions", default=",".join(DEFAULT_PRECISIONS), help=f"of low bits ({','.join(DEFAULT_PRECISIONS)})"
    )
    command.add_argument("--parts", default="", help="of the pipeline, separated by commas (all)")
    command.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what bakeoff calibrate wrote: w8a8 takes it, weights alone may use it",
    )
    command.set_defaults(run=_run)
    return command


def _run(options: argparse.Namespace) -> None:
    check_output(options.output)
    with Steps() as progress:
        found = sensitivity(
            options.model,
            prompts_of(options),
            options.output,
            precisions=options.precisions.split(","),
            parts=[part for part in options.parts.split(",") if part],
            steps=options.steps,
            calibration=options.calibration,
            size=size_of(options),
            revision=options.revision,
            config=options.config,
            progress=progress,
        )
    if options.json:
        print(options.output.read_text())
        return
    for part, layers in found.parts.items():
        for precision, error in found.together[part].items():
            worst = sorted(layers, key=lambda name: -layers[name].errors.get(precision, 0))[:_SHOWN]
            told = ", ".join(f"{name} {_decibels(layers[name].errors.get(precision, 0))}" for name in worst)
            print(f"{part} in {precision}: {_decibels(error)} with all layers; most by {told}")
