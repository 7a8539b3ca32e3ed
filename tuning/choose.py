"""`bakeoff recipe`: from what layers add to the error, the smallest or fastest recipe that stays within a bound."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..errors import RecipeError, UsageError
from ..exporters.exporter import SCALES
from ..parity.budget import MOST_DB
from ..parity.drawing import open_whole
from ..plan import ACTIVATIONS_OPTION, module_keys, open_calibration
from ..progress import Steps
from ..quantize.calibration import METHODS
from ..quantize.choice import Option, choose
from ..quantize.sensitivity import Sensitivity
from ..recipe import PartRecipe, Recipe, to_toml
from ..sources.source import Source
from ..terminal import print_json
from ..weights import Checkpoint, Entry
from .options import check_output
from .studio import Studio, psnr_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

    from ..exporters.exporter import Exporter
    from ..quantize.mixture import Mixture
    from ..quantize.sensitivity import Layer

_MOST_CHOICES = 8
_LEAST_TIGHTENING = 1.25
"""Least factor by which a choice that failed is made anew with less error."""
_BROKEN_TIGHTENING = 10.0
"""The same of a choice whose pictures aren't finite."""
WIDE = "bf16"
"""What layers have that aren't rounded to a few bits."""
_USUAL_BACKENDS = ("onnx", "openvino", "torch")


def recipe_within(
    found: Sensitivity, backend: str, psnr_db: float, *, fastest: bool = False, factor: float = 1.0
) -> tuple[Recipe, float]:
    """Choose a precision for each layer that was measured.

    What is left in bfloat16 errs, too: as much as everything in it was measured to, which layers add to.

    Args:
        found: what layers add to the error.
        backend: for all parts.
        psnr_db: least PSNR of the pictures to eager float32's, in dB, as predicted.
        fastest: save time of multiplications rather than bytes.
        factor: by which errors of layers together are more than the sum of those alone.

    Returns:
        The recipe, and the PSNR that it is predicted to have, in dB.

    Raises:
        RecipeError: the backend has none of the precisions that were measured, none is quicker, or nothing stays within
            the bound.
        UsageError: the measurement was interrupted.
    """
    _refuse_interrupted(found)
    mixtures, wide = _mixtures(found, backend, fastest=fastest), _wide(found, backend)
    bound = (_allowed(psnr_db, wide, found, backend) - wide) / factor
    possible = [
        chosen for able in mixtures if (chosen := choose(_options(found, backend, able, fastest=fastest), bound))
    ]
    if not possible:
        message = f"no recipe of {backend} keeps {psnr_db:g} dB"
        raise RecipeError(message, fix="ask for less with --within")
    chosen = min(possible, key=lambda each: sum(option.cost for option in each.values()))
    precisions = {
        part: {name: chosen[_key(part, name)].precision for name in found.parts[part]} for part in found.parts
    }
    parts = {part: _part(backend, layers) for part, layers in precisions.items()}
    error = wide + sum(option.error for option in chosen.values()) * factor
    return Recipe(PartRecipe(backend, WIDE), parts), psnr_of(error)


def _wide(found: Sensitivity, backend: str) -> float:
    """Return the pictures' error of a backend that has everything in `WIDE`."""
    return found.wide["stored" if plugins.runtime(backend).widens else "computed"]


def _allowed(psnr_db: float, wide: float, found: Sensitivity, backend: str) -> float:
    """Return the error that pictures may have.

    Raises:
        RecipeError: what isn't rounded errs as much by itself.
    """
    allowed: float = 10 ** (-psnr_db / 10)
    if wide >= allowed:
        keeps = f"keeps {psnr_of(wide):.1f} dB" if math.isfinite(wide) else "breaks the pictures"
        message = f"{backend} {keeps} in {WIDE} alone, got --within {psnr_db:g}dB"
        stored, fix = psnr_of(found.wide["stored"]), "ask for less with --within"
        if psnr_db < stored and all(_bakes(plugins.exporter("onnx"), each) for each in _measured(found)):
            fix += f"; or --backend onnx, which computes in float32: it keeps {stored:.1f} dB"
        raise RecipeError(message, fix=fix)
    return allowed


def _refuse_interrupted(found: Sensitivity) -> None:
    """Refuse a measurement that lacks layers: a recipe would round these unseen.

    Raises:
        UsageError: with what lacks.
    """
    begun = {(part, name) for part, layers in found.parts.items() for layer in layers.values() for name in layer.errors}
    lacking = sorted(f"layers of {part} in {name}" for part, name in begun if name not in found.together.get(part, {}))
    if begun and not lacking and not found.wide:
        lacking = [f"everything in {WIDE}"]
    if lacking:
        message = f"the measurement was interrupted: it lacks {', '.join(lacking)}"
        raise UsageError(
            message, fix=f"bakeoff sensitivity {found.info['model']} -o …, as before: it goes on from there"
        )


def checked_recipe(
    found: Sensitivity,
    backend: str,
    psnr_db: float,
    *,
    fastest: bool = False,
    calibration: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Recipe, float]:
    """Choose as `recipe_within`, draw with the choice in eager float32, and choose anew until the pictures keep the bound.

    Errors of layers aren't independent: a trajectory may amplify what several do together. What bfloat16 errs is added to
    what was drawn.

    Args:
        found: what layers add to the error; its model and prompts are drawn again.
        backend: for all parts.
        psnr_db: least PSNR of the pictures to eager float32's, in dB.
        fastest: save time of multiplications rather than bytes.
        calibration: the one that was measured with, where one was.
        progress: called with a line at each choice.

    Returns:
        The recipe, and the PSNR that was drawn with what bfloat16 errs added, in dB.

    Raises:
        RecipeError: as `recipe_within`.
        UsageError: a calibration is missing, or another one.
    """
    source = Source.open(found.info["model"], found.info.get("revision"), config=found.info.get("config"))
    scales = None
    if found.info["calibration"]:
        scales = open_calibration(calibration, source, "checking what was measured with calibrated activations")
        if scales.info["sha256"] != found.info["calibration"]:
            message = f"{calibration} is another calibration than the one that was measured with"
            raise UsageError(message, fix="give that one, or measure again: bakeoff sensitivity")
    if found.info.get("modules", known := module_keys(source)) != known:
        message = f"{source.id} has other weights than when its layers were measured"
        raise UsageError(message, fix="measure again: bakeoff sensitivity, into another file")
    size = found.info["size"]
    options = {"steps": found.info["steps"], "size": tuple(size) if size else None}
    factor = 1.0
    usual = next(iter(plugins.exporter(backend).options.get(ACTIVATIONS_OPTION, METHODS)))
    with open_whole(source) as engine:
        studio = Studio(engine, source, found.info["prompts"], options, usual)
        for _ in range(_MOST_CHOICES):
            recipe, predicted = recipe_within(found, backend, psnr_db, fastest=fastest, factor=factor)
            error, wide = studio.error(_rounded(studio, found, recipe), scales), _wide(found, backend)
            measured = psnr_of(wide + error)
            progress(f"chosen for {predicted:.1f} dB, comes to {measured:.1f} dB")
            if measured >= psnr_db:
                return recipe, measured
            foreseen = 10 ** (-predicted / 10) - wide
            missed = error / foreseen if foreseen > 0 else math.inf
            factor *= max(_LEAST_TIGHTENING, missed) if math.isfinite(missed) else _BROKEN_TIGHTENING
    message = f"no recipe of {backend} keeps {psnr_db:g} dB when it is drawn"
    raise RecipeError(message, fix="ask for less with --within")


def _rounded(studio: Studio, found: Sensitivity, recipe: Recipe) -> dict[str, tuple[dict[str, str], Mixture]]:
    """Return what a recipe rounds: part -> path of each layer, with its name, and the precisions."""
    rounded = {}
    for part, each in recipe.parts.items():
        mixture = plugins.mixture(each.precision, each.layers)
        names = studio.layers(part).items()
        own = {path: name for path, name in names if name in found.parts[part] and mixture.format_of(name)}
        rounded[part] = (own, mixture)
    return rounded


def _mixtures(found: Sensitivity, backend: str, *, fastest: bool) -> list[tuple[str, ...]]:
    """Return the precisions that were measured as sets that a backend bakes beside each other, and beside `WIDE`.

    Raises:
        RecipeError: it bakes none of them, or none that is quicker where that is asked for.
    """
    measured = _measured(found)
    exporter, runtime = plugins.exporter(backend), plugins.runtime(backend)
    if not measured:
        message = "no layer was measured in any precision"
        raise RecipeError(message, fix=f"bakeoff sensitivity {found.info['model']} -o FILE")
    able = [name for name in measured if _bakes(exporter, name)]
    if not able:
        message = f"{backend} bakes none of {', '.join(measured)} for single layers, which were measured"
        low = [name for name in exporter.precisions if name in plugins.names("formats")]
        again = f"bakeoff sensitivity {found.info['model']} -o FILE --precisions {','.join(low)}"
        raise RecipeError(message, fix=again if low else "another --backend")
    if fastest and min(map(runtime.relative_time, able)) >= 1:
        message = f"none of {', '.join(able)} is known to be quicker than {WIDE} in {backend} on this processor"
        raise RecipeError(message, fix="--smallest, or measure w8a8: bakeoff sensitivity … --precisions w8a8")
    sets = []
    for first in able:
        mixing = [first]
        for other in able:
            if other != first and all(_mix(exporter.layer_precisions, other, each) for each in mixing):
                mixing.append(other)
        sets.append(tuple(sorted(mixing)))
    return sorted(set(sets))


def _options(found: Sensitivity, backend: str, able: Iterable[str], *, fastest: bool) -> dict[str, list[Option]]:
    """Return layer of a part -> what it may have of some precisions, with its cost and error."""
    exporter, runtime = plugins.exporter(backend), plugins.runtime(backend)

    def cost(precision: str, name: str, layer: Layer) -> float:
        stored = _stored(exporter, precision, name, layer.shape)
        runs_in = precision if SCALES in stored else WIDE
        return layer.macs * runtime.relative_time(runs_in) if fastest else float(sum(stored.values()))

    options = {}
    for part, layers in found.parts.items():
        factor = {name: _factor(found, part, layers, name) for name in able}
        for name, layer in layers.items():
            options[_key(part, name)] = [
                Option(WIDE, cost(WIDE, name, layer), 0.0),
                *(
                    Option(each, cost(each, name, layer), layer.errors[each] * factor[each])
                    for each in able
                    if math.isfinite(layer.errors.get(each, math.inf)) and math.isfinite(factor[each])
                ),
            ]
    return options


def _measured(found: Sensitivity) -> list[str]:
    """Return the precisions that any layer was measured in."""
    return sorted({name for layers in found.parts.values() for layer in layers.values() for name in layer.errors})


def _key(part: str, layer: str) -> str:
    return json.dumps((part, layer))


def _first_able(found: Sensitivity) -> str:
    """Return the first backend that bakes all precisions that were measured, for single layers.

    Raises:
        UsageError: none does.
    """
    measured = _measured(found)
    for backend in _USUAL_BACKENDS:
        exporter = plugins.exporter(backend)
        if all(_bakes(exporter, name) for name in measured):
            return backend
    message = f"none of {', '.join(_USUAL_BACKENDS)} bakes all of {', '.join(measured)} for single layers"
    raise UsageError(message, fix="name one with --backend: it takes those that it has")


def _bakes(exporter: Exporter, precision: str) -> bool:
    """Say whether a backend bakes a precision among layers that stay wide."""
    return precision in exporter.precisions and WIDE in exporter.layer_precisions.get(precision, ())


def _mix(possible: Mapping[str, Iterable[str]], one: str, other: str) -> bool:
    return one == other or (one in possible.get(other, ()) and other in possible.get(one, ()))


def _factor(found: Sensitivity, part: str, layers: Mapping[str, Layer], precision: str) -> float:
    """Return what all layers at once err, over the sum of what each errs alone; 1 at least.

    Infinite, so that none is chosen, where all at once break pictures that no layer alone breaks. Where one does, that is left
    out, and the others are taken to err more than alone by a factor that nobody measured.
    """
    errors = [layer.errors.get(precision, 0.0) for layer in layers.values()]
    alone, together = sum(errors), found.together[part].get(precision, 0.0)
    if not math.isfinite(alone):
        return _BROKEN_TIGHTENING
    if not math.isfinite(together) or (together and not alone):
        return math.inf
    return max(1.0, together / alone) if alone else 1.0


def _stored(exporter: Exporter, precision: str, layer: str, shape: tuple[int, ...]) -> Mapping[str, int]:
    """Return what bytes count as -> how many a backend stores for a layer's weight; `SCALES` among them if it has codes."""
    entry = Entry(f"{layer}.weight", Path(), "F32", shape, 0, 4 * math.prod(shape))
    checkpoint, mixture = Checkpoint((), {entry.name: entry}), plugins.mixture(precision)
    return exporter.cost(checkpoint, mixture, options={}, operations=0, shared=False).weight_bytes


def _part(backend: str, layers: Mapping[str, str]) -> PartRecipe:
    """Return a part's recipe: what most of its layers have, among which the backend bakes the others, and these."""
    beside = plugins.exporter(backend).layer_precisions
    counts = Counter(layers.values()).most_common() or [(WIDE, 0)]
    most = next(each for each, _ in counts if {*layers.values()} <= {each, *beside.get(each, ())})
    return PartRecipe(backend, most, layers={name: each for name, each in sorted(layers.items()) if each != most})


def add_recipe(commands: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's subparsers have no public type
    command: argparse.ArgumentParser = commands.add_parser(
        "recipe",
        help="choose a precision for each layer, within a bound on the pictures' error",
        description="Write the smallest or fastest recipe that keeps a PSNR, from what bakeoff sensitivity measured.",
    )
    command.add_argument("layers", type=Path, help="what bakeoff sensitivity wrote")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="recipe.toml")
    command.add_argument(
        "--backend", help="of all parts (the first that has what was measured, of onnx, openvino, torch)"
    )
    command.add_argument(
        "--within", required=True, metavar="DB", help="least PSNR of the pictures to eager float32's, such as 35dB"
    )
    goal = command.add_mutually_exclusive_group()
    goal.add_argument("--smallest", action="store_true", help="fewest bytes (default)")
    goal.add_argument("--fastest", action="store_true", help="least time of multiplications")
    command.add_argument(
        "--check", action="store_true", help="draw with the choice, and choose anew until the pictures keep the bound"
    )
    command.add_argument("--calibration", type=Path, metavar="FILE", help="for --check: what was measured with")
    command.set_defaults(run=_run)
    return command


def _run(options: argparse.Namespace) -> None:
    if options.output.suffix != ".toml":
        message = (
            f"got -o {options.output}, expected a name that ends in .toml, which is how recipes are told from text"
        )
        raise UsageError(message, fix=f"-o {options.output.with_suffix('.toml')}")
    check_output(options.output)
    found = Sensitivity.open(options.layers)
    asked, backend = _decibels(options.within), options.backend or _first_able(found)
    if options.check:
        with Steps() as progress:
            recipe, psnr = checked_recipe(
                found,
                backend,
                asked,
                fastest=options.fastest,
                calibration=options.calibration,
                progress=progress,
            )
        told = f"drawn: {psnr:.1f} dB to eager float32, {WIDE}'s own error added, on the prompts that layers were measured on"
    else:
        recipe, psnr = recipe_within(found, backend, asked, fastest=options.fastest)
        told = f"predicted: {psnr:.1f} dB, if layers err independently; --check draws with it"
    partial = options.output.with_name(f".{options.output.name}.partial")
    partial.write_text(f"# {told}\n{to_toml(recipe)}")
    partial.replace(options.output)
    counts = {part: Counter(_precisions(found, part, each)) for part, each in recipe.parts.items()}
    if options.json:
        print_json(
            {
                "file": str(options.output),
                "backend": backend,
                "psnr_db": psnr if math.isfinite(psnr) else None,
                "layers": counts,
            }
        )
        return
    for part, count in counts.items():
        print(f"{part}: " + ", ".join(f"{number} layers in {name}" for name, number in count.most_common()))
    print(f"{options.output}: {told}")


def _precisions(found: Sensitivity, part: str, recipe: PartRecipe) -> list[str]:
    return [recipe.layers.get(name, recipe.precision) for name in found.parts[part]]


def _decibels(text: str) -> float:
    try:
        found = float(text.lower().removesuffix("db"))
    except ValueError:
        found = math.nan
    if not 0 < found <= MOST_DB:
        message = f"got --within {text!r}, expected decibels from 0 to {MOST_DB}, such as 35dB"
        raise UsageError(message)
    return found
