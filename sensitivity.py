"""`bakeoff sensitivity`: what each layer adds to the pictures' error when it alone is rounded, on whole trajectories."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .calibrate import FEWEST_PROMPTS, default_prompts, size_of
from .components.component import WRAPPER
from .errors import ParityError, UsageError, unknown
from .models.prompts import read_prompts
from .plan import open_calibration
from .progress import Steps
from .quantize.mixture import rounded_layers
from .quantize.sensitivity import Layer, Sensitivity
from .runtimes.engine import load
from .source import Source
from .weights import layer_names

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from .models.prompts import Prompt
    from .quantize.calibration import Calibration
    from .runtimes.engine import Engine

DEFAULT_PRECISIONS = ("int8", "int4")
DEFAULT_PROMPTS, DEFAULT_STEPS = 4, 6
_SEED = 1
_LAST = "vae_decoder"
"""The part whose output is the picture."""
_SHOWN = 3


class _Bench:
    """A model open in eager float32, whose layers can be swapped for rounded ones."""

    def __init__(self, engine: Engine, source: Source, texts: Sequence[str], options: Mapping[str, Any]) -> None:
        self._engine, self._source, self._texts, self._options = engine, source, texts, options
        self._pictures: list[Any] = []
        self.modules: dict[str, nn.Module] = {}
        self.macs: dict[tuple[str, str], int] = defaultdict(int)
        self._counters: list[Any] = []
        engine.visit(self._meet)
        self.reference = self._draw()
        for counter in self._counters:
            counter.remove()

    def _meet(self, part: str, module: nn.Module) -> None:
        from torch import nn

        self.modules[part] = module
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                self._counters.append(layer.register_forward_hook(partial(self._count, (part, path))))
        if part == _LAST:
            module.register_forward_hook(lambda *made: self._pictures.append(made[-1][0]))

    def _count(self, key: tuple[str, str], layer: Any, _: object, made: Any) -> None:  # noqa: ANN401 - a layer and its output
        self.macs[key] += layer.weight.numel() * made.numel() // layer.weight.shape[0] // len(self._texts)

    def _draw(self) -> NDArray[np.float64]:
        """Return pictures (B, 3, H, W), pixels from 0 to 1."""
        import torch

        self._pictures.clear()
        self._engine.generate(self._texts, seeds=_SEED, **self._options)
        found: NDArray[np.float64] = (torch.cat(self._pictures).double() / 2 + 0.5).clamp(0, 1).numpy()
        return found

    def layers(self, part: str) -> dict[str, str]:
        """Return path of a layer with weights -> its name in the checkpoint."""
        paths = [path for path, layer in self.modules[part].named_modules() if hasattr(layer, "weight")]
        own = {path.removeprefix(WRAPPER): path for path in paths}
        module = self._source.family.part(part).module
        return {own[path]: name for path, name in layer_names(own, self._source.checkpoint(module)).items()}

    def error(self, part: str, names: Mapping[str, str], precision: str, scales: Mapping[str, Any]) -> float:
        """Return the mean squared error of the pictures with these layers of a part in a precision; NaN becomes infinite.

        Args:
            part: whose they are.
            names: path of each layer -> its name in the checkpoint.
            precision: of low-bit weights.
            scales: layer, by that name -> scales of its input and output.
        """
        import numpy as np

        try:
            with rounded_layers(self.modules[part], names, plugins.mixture(precision), scales):
                found = float(np.square(self._draw() - self.reference).mean())
        except ParityError:
            return math.inf
        return found if math.isfinite(found) else math.inf


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
    progress: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Round one layer at a time, and draw each prompt on the same latents: the error of the pictures is the layer's.

    Everything runs in eager float32 with torch. The file is written after each layer, and an interrupted run goes on where
    it stopped.

    Args:
        model: a Diffusers folder, a hub id, or `shapes`.
        prompts: what to draw, all in one batch.
        file: to write.
        precisions: of low-bit weights.
        parts: of the pipeline; by default all that make pictures from text.
        steps: denoising steps of each picture.
        calibration: for precisions that round activations with calibrated scales.
        size: height and width in pixels; by default the model's own.
        progress: called with a line at each layer.

    Raises:
        UsageError: a precision or part that there isn't, too few prompts, or a calibration that is missing or another's.
        CorruptError: the file is there already and is something else.
    """
    if len(prompts) < FEWEST_PROMPTS:
        message = f"got {len(prompts)} prompts to measure with, expected at least {FEWEST_PROMPTS}"
        raise UsageError(message, fix=f"give more, such as --count {DEFAULT_PROMPTS}")
    source = Source.open(model)
    formats = {precision: plugins.weight_format(precision) for precision in precisions}
    for precision, weight_format in formats.items():
        if weight_format is None:
            raise UsageError(unknown("precision of low-bit weights", precision, plugins.names("formats")))
    calibrated = [name for name, weight_format in formats.items() if weight_format and weight_format.calibrated]
    scales = open_calibration(calibration, source, f"rounding to {calibrated[0]}") if calibrated else None
    info = {
        "model": source.id,
        "prompts": [prompt.id for prompt in prompts],
        "steps": steps,
        "size": size,
        "calibration": scales.info["sha256"] if scales else None,
    }
    found = _begun(file, info)
    with load(source.folder, device="cpu") as engine:
        bench = _Bench(engine, source, [prompt.text for prompt in prompts], {"steps": steps, "size": size})
        for part in parts or list(bench.modules):
            if part not in bench.modules:
                raise UsageError(unknown("part", part, bench.modules))
            _measure(bench, found, part, precisions, _named(scales, bench, part), file, progress)
    return found


def _begun(file: Path, info: dict[str, Any]) -> Sensitivity:
    """Return what an interrupted run has left, if it was of the same model, prompts and steps."""
    if not file.is_file():
        return Sensitivity(info)
    found = Sensitivity.open(file)
    if found.info != json.loads(json.dumps(info)):
        message = f"{file} is of {found.info}, expected {info}"
        raise UsageError(message, fix="give another file with -o, or delete this one")
    return found


def _named(scales: Calibration | None, bench: _Bench, part: str) -> dict[str, Any]:
    """Return a part's calibrated scales under the names that the checkpoint has for its layers."""
    if scales is None:
        return {}
    names = {path.removeprefix(WRAPPER): name for path, name in bench.layers(part).items()}
    return {names[path]: both for path, both in scales.scales(part).items() if path in names}


def _measure(
    bench: _Bench,
    found: Sensitivity,
    part: str,
    precisions: Sequence[str],
    scales: Mapping[str, Any],
    file: Path,
    progress: Callable[[str], None],
) -> None:
    """Measure the layers of a part that weren't yet, each alone and then all together."""
    names = bench.layers(part)
    known, together = found.parts.setdefault(part, {}), found.together.setdefault(part, {})
    for precision in precisions:
        weight_format = plugins.weight_format(precision)
        assert weight_format is not None  # noqa: S101 - checked before
        own = {
            path: name
            for path, name in names.items()
            if weight_format.obstacle(bench.modules[part].get_submodule(path).weight.shape) is None  # type: ignore[arg-type]
        }
        for number, (path, name) in enumerate(own.items(), 1):
            weight: Any = bench.modules[part].get_submodule(path).weight
            layer = known.setdefault(name, Layer(weight.numel(), bench.macs[part, path]))
            if precision not in layer.errors:
                layer.errors[precision] = bench.error(part, {path: name}, precision, scales)
                progress(f"{part}, {precision}: [{number}/{len(own)}] {name} {_decibels(layer.errors[precision])}")
                found.save(file)
        if own and precision not in together:
            together[precision] = bench.error(part, own, precision, scales)
            progress(f"{part}, {precision}: all layers at once {_decibels(together[precision])}")
            found.save(file)


def _decibels(error: float) -> str:
    """Return the PSNR of pictures with this mean squared error, of pixels from 0 to 1."""
    return f"{-10 * math.log10(error):.1f} dB" if 0 < error < math.inf else ("broken" if error else "unchanged")


def add_sensitivity(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser(
        "sensitivity",
        help="measure what each layer adds to the pictures' error when it is rounded",
        description="Round one layer at a time and draw. An interrupted run goes on where it stopped.",
    )
    command.add_argument("model", help="a Diffusers folder, a hub id, or: shapes")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="layers.json")
    command.add_argument(
        "--precisions", default=",".join(DEFAULT_PRECISIONS), help=f"of low bits ({','.join(DEFAULT_PRECISIONS)})"
    )
    command.add_argument("--parts", default="", help="of the pipeline, separated by commas (all)")
    command.add_argument("--calibration", type=Path, metavar="FILE", help="what bakeoff calibrate wrote, for w8a8")
    command.add_argument("--prompts", help="a prompt set, or a .txt file with one a line")
    command.add_argument("--count", type=int, default=DEFAULT_PROMPTS, help=f"how many of them ({DEFAULT_PROMPTS})")
    command.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=f"of each picture ({DEFAULT_STEPS})")
    command.add_argument("--height", type=int)
    command.add_argument("--width", type=int)
    command.set_defaults(run=_run)
    return command


def _run(options: argparse.Namespace) -> None:
    with Steps() as progress:
        found = sensitivity(
            options.model,
            read_prompts(options.prompts or default_prompts(options.model), options.count),
            options.output,
            precisions=options.precisions.split(","),
            parts=[part for part in options.parts.split(",") if part],
            steps=options.steps,
            calibration=options.calibration,
            size=size_of(options),
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
