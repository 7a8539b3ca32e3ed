"""Plan an export: resolve model and recipe, hash what decides the result, refuse what can't be or can't fit."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .artifact import key_of
from .errors import RecipeError, ResourceError, UnavailableError, UsageError, unknown
from .exporters.exporter import BoundExporter
from .forecast import Forecast
from .memory import available_bytes
from .quantize.calibration import Calibration
from .recipe import PartRecipe, Recipe
from .sources.lora import Lora, changed_modules
from .sources.source import Source
from .weights import WEIGHT_MODES, sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .artifact import Artifact
    from .components.family import Part
    from .quantize.mixture import Mixture


ACTIVATIONS_OPTION, OUTPUTS_OPTION = "activations", "outputs"
"""Options of a recipe: how the steps of calibrated activations are chosen, and whether what convolutions make is rounded,
too, or stays wide."""


@dataclass(frozen=True)
class Plan:
    """What an export will do and take, known before it starts."""

    source: Source
    recipe: Recipe
    parts: dict[str, PartRecipe]
    loras: tuple[Lora, ...]
    weights: str
    calibration: Calibration | None
    key_fields: dict[str, Any]
    part_fields: dict[str, dict[str, Any]]

    @property
    def key(self) -> str:
        return key_of(self.key_fields)

    @property
    def note(self) -> str | None:
        """Say so where activations were calibrated with other LoRAs than are baked in, or with none."""
        if self.calibration is None:
            return None
        seen = self.calibration.info.get("loras", [])
        if seen == [lora.fields for lora in self.loras]:
            return None
        known = "other LoRAs" if seen else "no LoRA"
        return f"activations were calibrated with {known}: bakeoff calibrate MODEL --lora FILE:SCALE sees them"

    def forecast(self, folder: Path) -> Forecast:
        """Predict what the export into an existing folder takes."""
        shared = self.weights != "copy" and self.source.folder.stat().st_dev == folder.stat().st_dev
        parts = {name: self.source.family.part(name) for name in self.parts}
        checkpoints = {name: self.source.checkpoint(part.module) for name, part in parts.items()}
        components = {name: part.component for name, part in parts.items()}
        merged = [self.source.checkpoint(module) for module in changed_modules(self.loras)]
        return Forecast.of(checkpoints, self.parts, components, shared=shared, merged=merged)


def plan(
    model: str,
    recipe: Recipe,
    *,
    revision: str | None = None,
    config: str | None = None,
    weights: str = "auto",
    loras: Sequence[str] = (),
    controlnet: str | None = None,
    calibration: str | Path | None = None,
) -> Plan:
    """Resolve model and recipe, hash what decides the result, and predict memory and disk.

    Writes nothing but the modules of a single-file checkpoint that wasn't converted before.

    Raises:
        SourceError: the model can't be had.
        RecipeError: the recipe names something unknown, or what its backend can't do.
    """
    if weights not in WEIGHT_MODES:
        raise UsageError(unknown("weights mode", weights, WEIGHT_MODES))
    source = Source.open(model, revision, "controlnet" if controlnet else None, str(controlnet or ""), config)
    merged = tuple(Lora.open(text, source) for text in loras)
    parts = recipe.resolve(part.name for part in source.parts)
    for name, part_recipe in parts.items():
        _check_backend(name, part_recipe)
    parts = {name: _without_idle_options(source, name, part_recipe) for name, part_recipe in parts.items()}
    parts = {name: _with_layers(source, name, part_recipe) for name, part_recipe in parts.items()}
    refuse_unchanged({name: _unchanged_by_shapes(source, name, part) for name, part in parts.items()}, parts)
    needed = [f"{part} of {name}" for name, part in parts.items() if is_calibrated(part)]
    helped = calibration is not None and any(uses_inputs(part) for part in parts.values())
    calibrated = open_calibration(calibration, source, needed[0] if needed else "") if needed or helped else None
    for name, part_recipe in parts.items():
        if calibrated and is_calibrated(part_recipe) and not calibrated.parts.get(name):
            message = f"the calibration says nothing of {name}"
            raise UsageError(message, fix=f"give it another precision: {_as_bf16([name], parts)}")
    fields = {
        name: _part_fields(source, source.family.part(name), parts[name], merged, weights, calibrated) for name in parts
    }
    host = {str(file.relative_to(source.folder)): sha256(file) for file in source.host_files}
    return Plan(
        source=source,
        recipe=recipe,
        parts=parts,
        loras=merged,
        weights=weights,
        calibration=calibrated,
        key_fields={"parts": {name: key_of(part) for name, part in fields.items()}, "host": host},
        part_fields=fields,
    )


def _check_backend(part: str, recipe: PartRecipe) -> None:
    exporter = plugins.exporter(recipe.backend)
    if isinstance(exporter, BoundExporter) and not (found := exporter.probe()).ok:
        message = f"{part}: can't export to {recipe.backend} here: {found.reason}"
        raise UnavailableError(message, fix=found.fix)
    missing = [package for package in exporter.packages() if not _is_installed(package)]
    if missing:
        message = f"{part}: to export to {recipe.backend} takes {', '.join(missing)}, which can't be found"
        raise UnavailableError(message, fix=f"pip install 'bakeoff[{recipe.backend}]'")
    if recipe.precision not in exporter.precisions:
        why = getattr(exporter, "reasons", {}).get(recipe.precision, "it doesn't say why")
        has = ", ".join(exporter.precisions)
        message = f"{part}: {recipe.backend} can't bake {recipe.precision}: {why}; it bakes {has}"
        raise RecipeError(message, fix=f"--recipe {recipe.backend}:{exporter.precisions[0]}")
    for option, value in recipe.options.items():
        if option not in exporter.options:
            raise RecipeError(unknown(f"option of {recipe.backend}", option, exporter.options))
        known = exporter.options[option]
        if known and value not in known:
            raise RecipeError(unknown(f"value of {recipe.backend}'s {option}", value, known))
    if isinstance(exporter, BoundExporter):
        exporter.check(recipe.precision, recipe.options)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _without_idle_options(source: Source, name: str, recipe: PartRecipe) -> PartRecipe:
    """Drop options that say nothing of a part, so that they don't change its key.

    They are named after another part's input, such as `timestep=f32`, or say how activations are rounded that aren't.
    """
    ports = {port for part in source.parts for port in part.component.conventions(recipe.backend)}
    idle = ports - set(source.family.part(name).component.conventions(recipe.backend))
    idle |= set() if is_calibrated(recipe) else {ACTIVATIONS_OPTION, OUTPUTS_OPTION}
    return replace(recipe, options={key: value for key, value in recipe.options.items() if key not in idle})


def _with_layers(source: Source, name: str, recipe: PartRecipe) -> PartRecipe:
    """Name each layer that isn't to have the part's precision.

    Raises:
        RecipeError: there is no such layer, or it can't be mixed with the others.
    """
    if not recipe.layers:
        return recipe
    entries = source.checkpoint(source.family.part(name).module).entries
    named = recipe.for_layers(name, {entry.removesuffix(".weight") for entry in entries if entry.endswith(".weight")})
    possible = plugins.exporter(recipe.backend).layer_precisions.get(recipe.precision, ())
    for layer, precision in named.layers.items():
        if precision not in possible:
            message = f"{layer} of {name} can't be {precision} among layers of {recipe.backend}:{recipe.precision}"
            fitting = [each for each in possible if each != recipe.precision]
            raise RecipeError(message, fix=f"give it {' or '.join(fitting)}" if fitting else "leave out layers")
    return named


def _unchanged_by_shapes(source: Source, name: str, recipe: PartRecipe) -> str | None:
    """Say why a low-bit recipe of a part can change no weight, as far as shapes tell, if it can't."""
    mixture, checkpoint = mixture_of(recipe), source.checkpoint(source.family.part(name).module)
    if not mixture.formats:
        return None
    exporter = plugins.exporter(recipe.backend)
    cost = exporter.cost(checkpoint, mixture, options=recipe.options, operations=0, shared=False)
    entries = (each for each in checkpoint.entries.values() if len(each.shape) > 1)
    kept = {each.name: mixture.obstacle(each.name, each.shape) or "it has no codes there" for each in entries}
    return unchanged(mixture, cost.weight_bytes, kept)


def refuse_unchanged(whys: Mapping[str, str | None], parts: Mapping[str, PartRecipe]) -> None:
    """Refuse low-bit recipes of parts of which no weight changes.

    Args:
        whys: part -> what `unchanged` says of it.
        parts: their recipes.

    Raises:
        RecipeError: with what to type instead.
    """
    told = {
        name: f"{mixture_of(parts[name]).precision} changes no weight of {name}: {why}"
        for name, why in whys.items()
        if why
    }
    if told:
        raise RecipeError("; ".join(told.values()), fix=f"give it another precision: {_as_bf16(told, parts)}")


def unchanged(mixture: Mixture, weight_bytes: Mapping[str, int], kept: Mapping[str, str]) -> str | None:
    """Say why a low-bit recipe changed no weight, if it didn't.

    Args:
        mixture: of the part.
        weight_bytes: dtype or format -> bytes of weights in it.
        kept: weight -> why it is left as it is.
    """
    stored = {label for label, size in weight_bytes.items() if size}
    if not mixture.formats or any(label.startswith(each.name) for each in mixture.formats.values() for label in stored):
        return None
    reasons = Counter(kept.values()).most_common(3)
    return "; ".join(f"{count} × {reason}" for reason, count in reasons) or "it has none"


def _as_bf16(names: Iterable[str], parts: Mapping[str, PartRecipe]) -> str:
    """Return the option that leaves some parts in bf16, of their own backends."""
    return f"--recipe …,{','.join(f'{name}={parts[name].backend}:bf16' for name in names)}"


def open_calibration(file: str | Path | None, source: Source, what: str) -> Calibration:
    """Read a calibration; `what` needs it.

    Raises:
        UsageError: there is none, or one of another model.
    """
    if file is None:
        message = f"{what} takes scales of activations that were calibrated"
        raise UsageError(message, fix="bakeoff calibrate MODEL -o calibration.safetensors, then --calibration FILE")
    found = Calibration.open(Path(file))
    other = _differs(found, source)
    if other:
        message = f"{file} was calibrated on {found.info.get('model')}, {other}"
        with_variant = f" --{source.variant} DIR" if source.variant else ""
        raise UsageError(message, fix=f"bakeoff calibrate {source.id} -o {file}{with_variant}")
    return found


def module_keys(source: Source) -> dict[str, str]:
    """Return module -> what tells its config and weights from any others, for calibrations."""
    return {module: key_of(source.hashes(module)) for module in source.modules}


def _differs(found: Calibration, source: Source) -> str | None:
    """Say in what a model differs from the one that was calibrated; None where it is the same, wherever it lies."""
    known = found.info.get("modules")
    if known is None:  # an older version's
        return None if found.info.get("model") == source.id else f"not on {source.id}"
    keys = module_keys(source)
    added = [name for name in known if name not in keys]
    if added:
        return f"with a {added[0]}, which this is without"
    if source.variant and source.variant not in known:
        return f"without the {source.variant} that this is with"
    others = [name for name, key in keys.items() if known.get(name, key) != key]
    return f"which has another {' and another '.join(others)} than {source.id}" if others else None


def is_calibrated(recipe: PartRecipe) -> bool:
    """Say whether a recipe rounds activations with scales that were calibrated."""
    as_it_runs = getattr(plugins.exporter(recipe.backend), "rounds_as_it_runs", ())
    return any(each.calibrated and each.name not in as_it_runs for each in mixture_of(recipe).formats.values())


def uses_inputs(recipe: PartRecipe) -> bool:
    """Say whether a recipe rounds weights for inputs that were calibrated, if there are any."""
    return any(each.uses_inputs for each in mixture_of(recipe).formats.values())


def _takes(calibration: Calibration, part: Part, recipe: PartRecipe) -> bool:
    """Say whether a calibration decides what a part becomes."""
    return is_calibrated(recipe) or (uses_inputs(recipe) and part.name in calibration.parts)


def mixture_of(recipe: PartRecipe) -> Mixture:
    """Return the precisions of a part's weights."""
    return plugins.mixture(recipe.precision, recipe.layers)


def _part_fields(
    source: Source,
    part: Part,
    recipe: PartRecipe,
    loras: Sequence[Lora],
    weights: str,
    calibration: Calibration | None,
) -> dict[str, Any]:
    exporter = plugins.exporter(recipe.backend)
    own = [lora.fields for lora in loras if part.module in lora.deltas]
    formats = sorted(f"{each.name}@{each.version}" for each in mixture_of(recipe).formats.values())
    return {
        "source": source.hashes(part.module),
        "component": f"{part.component.name}@{part.component.version}",
        "exporter": f"{recipe.backend}@{exporter.version}",
        "recipe": recipe.as_dict(),
        "weights": "own" if weights == "copy" else "shared where possible",
        **({"format": ", ".join(formats)} if formats else {}),
        **({"calibration": calibration.info["sha256"]} if calibration and _takes(calibration, part, recipe) else {}),
        **({"loras": own} if own else {}),
        **(exporter.key_fields(recipe.precision, recipe.options) if isinstance(exporter, BoundExporter) else {}),
    }


def existing_parent(target: Path) -> Path:
    """Return the folder that is there already in which `target` is or will be."""
    return next(folder for folder in (target, *target.absolute().parents) if folder.exists())


def check_room(planned: Plan, target: Path) -> None:
    """Refuse an export that can't fit.

    Raises:
        ResourceError: with what it takes, what is free, and recipes that would fit.
    """
    parent = existing_parent(target)
    memory, disk = available_bytes(), shutil.disk_usage(parent).free
    obstacles = planned.forecast(parent).obstacles(memory, disk)
    if obstacles:
        fitting = [
            str(recipe)
            for recipe in _other_recipes()
            if not replace(planned, recipe=recipe, parts=recipe.resolve(planned.parts))
            .forecast(parent)
            .obstacles(memory, disk)
        ]
        would = (
            f"what would fit: --recipe {' or '.join(fitting)}"
            if fitting
            else f"free some space on the disk of {parent}"
        )
        raise ResourceError("; ".join(obstacles), fix=would)


def check_provable(planned: Plan) -> None:
    """Refuse what couldn't be opened here to be proved, before anything is written.

    Raises:
        UnavailableError: naming the part, and what is missing.
    """
    for name, part in planned.parts.items():
        available = plugins.runtime(part.backend).probe()
        if not available.ok:
            message = f"{name} can't be proved here once it is written: {available.reason}"
            raise UnavailableError(message, fix=f"{available.fix}; or --no-prove, without --repair")


def _other_recipes() -> Iterator[Recipe]:
    for backend in plugins.names("exporters"):
        exporter = plugins.exporter(backend)
        if backend != "null" and not (isinstance(exporter, BoundExporter) and not exporter.probe().ok):
            yield from (Recipe(PartRecipe(backend, precision)) for precision in exporter.precisions)


def why_rebuild(artifact: Artifact, planned: Plan) -> list[str]:
    """Say which fields of an artifact's key differ from what an export would have now; empty if none."""
    return list(_differences(artifact.manifest.key_fields["host"], planned.key_fields["host"], "host")) + [
        line
        for name in sorted({*artifact.manifest.parts, *planned.part_fields})
        for line in _differences(
            artifact.manifest.parts[name].key_fields if name in artifact.manifest.parts else {},
            planned.part_fields.get(name, {}),
            name,
        )
    ]


def _differences(old: Any, new: Any, path: str) -> list[str]:  # noqa: ANN401 - any JSON value
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [f"{path}: {old} -> {new}"]
