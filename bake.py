"""Bake a model: open the source, capture each part, lower it, write the artifact, prove it. The order is known here alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .artifact import (
    ACTIVATIONS,
    MANIFEST,
    SCHEMA,
    Artifact,
    Manifest,
    PartEntry,
    describe_files,
    key_of,
    scratch,
    staged,
    sweep,
)
from .errors import CorruptError, RecipeError, ResourceError, UnavailableError, UsageError, unknown
from .exporters.capture import module_on_hollow, on_hollow
from .exporters.exporter import Subject
from .forecast import Forecast
from .lora import Lora, merge
from .memory import available_bytes, give_back
from .quantize.calibration import Calibration
from .recipe import PartRecipe, Recipe, to_dict
from .runtimes.opening import port_to_dict
from .source import Source
from .weights import WEIGHT_MODES, layer_names, place, sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .components.component import Port
    from .components.family import Part
    from .exporters.exporter import Exporter, Lowered

    Progress = Callable[[str], None]


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

    def forecast(self, folder: Path) -> Forecast:
        """Predict what the export into an existing folder takes."""
        shared = self.weights != "copy" and self.source.folder.stat().st_dev == folder.stat().st_dev
        parts = {name: self.source.family.part(name) for name in self.parts}
        checkpoints = {name: self.source.checkpoint(part.module) for name, part in parts.items()}
        components = {name: part.component for name, part in parts.items()}
        merged = [self.source.checkpoint(module) for module in _merged_modules(self)]
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
    calibrated = _open_calibration(calibration, source, parts)
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
    missing = [package for package in exporter.packages() if not _is_installed(package)]
    if missing:
        message = f"{part}: to export to {recipe.backend} takes {', '.join(missing)}, which can't be found"
        raise UnavailableError(message, fix=f"pip install 'bakeoff[{recipe.backend}]'")
    if recipe.precision not in exporter.precisions:
        message = f"{part}: {recipe.backend} can't bake {recipe.precision}; it bakes {', '.join(exporter.precisions)}"
        raise RecipeError(message, fix=f"--recipe {recipe.backend}:{exporter.precisions[0]}")
    for option, value in recipe.options.items():
        if option not in exporter.options:
            raise RecipeError(unknown(f"option of {recipe.backend}", option, exporter.options))
        if value not in exporter.options[option]:
            raise RecipeError(unknown(f"value of {recipe.backend}'s {option}", value, exporter.options[option]))


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _without_idle_options(source: Source, name: str, recipe: PartRecipe) -> PartRecipe:
    """Drop options named after another part's input, so that `timestep=f32` changes the UNet's key alone."""
    ports = {port for part in source.parts for port in part.component.conventions(recipe.backend)}
    idle = ports - set(source.family.part(name).component.conventions(recipe.backend))
    return replace(recipe, options={key: value for key, value in recipe.options.items() if key not in idle})


def _open_calibration(file: str | Path | None, source: Source, parts: Mapping[str, PartRecipe]) -> Calibration | None:
    """Read the calibration that a recipe needs.

    Raises:
        UsageError: it needs one and there is none, or one of another model.
    """
    needed = [name for name, part in parts.items() if _is_calibrated(part)]
    if not needed:
        return None
    if file is None:
        message = f"{parts[needed[0]]} of {needed[0]} rounds activations with scales that were calibrated"
        raise UsageError(message, fix="bakeoff calibrate MODEL -o calibration.safetensors, then --calibration FILE")
    found = Calibration.open(Path(file))
    if found.info.get("model") != source.id:
        message = f"{file} was calibrated on {found.info.get('model')}, not on {source.id}"
        raise UsageError(message, fix=f"bakeoff calibrate {source.id} -o {file}")
    return found


def _is_calibrated(recipe: PartRecipe) -> bool:
    weight_format = plugins.weight_format(recipe.precision)
    return weight_format is not None and weight_format.calibrated


def _part_fields(
    source: Source,
    part: Part,
    recipe: PartRecipe,
    loras: Sequence[Lora],
    weights: str,
    calibration: Calibration | None,
) -> dict[str, Any]:
    own = [lora.fields for lora in loras if part.module in lora.deltas]
    weight_format = plugins.weight_format(recipe.precision)
    return {
        "source": source.hashes(part.module),
        "component": f"{part.component.name}@{part.component.version}",
        "exporter": f"{recipe.backend}@{plugins.exporter(recipe.backend).version}",
        "recipe": recipe.as_dict(),
        "weights": "own" if weights == "copy" else "shared where possible",
        **({"format": f"{weight_format.name}@{weight_format.version}"} if weight_format else {}),
        **({"calibration": calibration.info["sha256"]} if calibration and _is_calibrated(recipe) else {}),
        **({"loras": own} if own else {}),
    }


def _merged_modules(planned: Plan) -> list[str]:
    return sorted({module for lora in planned.loras for module in lora.deltas})


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


def _other_recipes() -> Iterator[Recipe]:
    for backend in plugins.names("exporters"):
        if backend != "null":
            yield from (Recipe(PartRecipe(backend, precision)) for precision in plugins.exporter(backend).precisions)


def export(
    model: str,
    output: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    config: str | None = None,
    weights: str = "auto",
    prove: bool = True,
    force: bool = False,
    loras: Sequence[str] = (),
    controlnet: str | None = None,
    calibration: str | Path | None = None,
    progress: Progress = lambda _: None,
    reuse: Sequence[str | Path] = (),
) -> Artifact:
    """Export a model into an artifact folder, whole or not at all.

    An artifact with the same key that is already there is returned as it is. Parts whose key hasn't changed are
    taken from the artifacts in `reuse`.

    Args:
        model: a Diffusers folder, a hub id, a single-file checkpoint, or `shapes`.
        output: the artifact's folder.
        recipe: what to bake.
        revision: of a hub model.
        config: of a single-file checkpoint: folder or hub id with its tokenizers, scheduler and configs.
        weights: `auto`, `link` or `copy`: how weights that needn't change come into the folder.
        prove: run each part against eager fp32 before the artifact counts as made.
        force: replace what is at `output`.
        loras: LoRA files to bake in, each as `FILE.safetensors` or `FILE.safetensors:SCALE`.
        controlnet: folder or hub id of a ControlNet to bake beside the pipeline, whose UNet then takes its residuals.
        calibration: what `bakeoff calibrate` wrote, for precisions that round activations with calibrated scales.
        progress: called with a line at each step.
        reuse: other artifacts to take unchanged parts from.

    Raises:
        BakeoffError: with the fix; nothing is left at `output` then.
    """
    target = Path(output)
    planned = plan(
        model,
        recipe,
        revision=revision,
        config=config,
        weights=weights,
        loras=loras,
        controlnet=controlnet,
        calibration=calibration,
    )
    sweep(target)
    present = None if force else _present(target, planned.key)
    if present is not None:
        progress(f"{target} is up to date")
        return _proved_later(present, planned, progress) if prove else present
    check_room(planned, target)
    donors = [Artifact.open(Path(folder)) for folder in reuse]
    with staged(target, replace_existing=force) as folder, _with_loras(planned, target, progress) as baked:
        with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
            entries = _write_parts(baked, folder, Path(work), donors, progress)
        _copy_host_files(planned.source, folder)
        _write_manifest(planned, folder, entries)
        if prove:
            _prove(Artifact.open(folder), baked.source, progress)
        else:
            progress("not proved: --no-prove")
    return Artifact.open(target)


@contextlib.contextmanager
def _with_loras(planned: Plan, target: Path, progress: Progress) -> Iterator[Plan]:
    """Write the modules that LoRAs change, with these added; yield the plan with a source that has them, for the while."""
    if not planned.loras:
        yield planned
        return
    with scratch(target) as work:
        for module in _merged_modules(planned):
            progress(f"merging {' and '.join(lora.file.name for lora in planned.loras)} into {module}")
            merge(planned.loras, planned.source, module, work / module)
        merged = {module: work / module for module in _merged_modules(planned)}
        yield replace(planned, source=replace(planned.source, elsewhere={**planned.source.elsewhere, **merged}))


def _prove(artifact: Artifact, source: Source, progress: Progress) -> None:
    from . import parity

    progress("proving each part in a child process")
    proved = artifact.with_proof(parity.prove(artifact, source))
    if not proved.manifest.proved:
        progress(f"not proved: {proved.manifest.proof['reason']}")


def _proved_later(artifact: Artifact, planned: Plan, progress: Progress) -> Artifact:
    """Prove an artifact that an earlier export left unproved, if that can be done here."""
    from . import parity

    if artifact.manifest.proved:
        return artifact
    reason = parity.obstacle(artifact, planned.source)
    if reason:
        progress(f"not proved: {reason}")
        return artifact
    with _with_loras(planned, artifact.folder, progress) as baked:
        progress("proving each part in a child process")
        return parity.prove_in_place(artifact, baked.source)


def _present(target: Path, key: str) -> Artifact | None:
    if not (target / MANIFEST).is_file():
        return None
    artifact = Artifact.open(target)
    return artifact if artifact.manifest.key == key else None


def _write_parts(
    planned: Plan, folder: Path, work: Path, donors: list[Artifact], progress: Progress
) -> dict[str, PartEntry]:
    entries = {}
    count = len(planned.parts)
    for number, name in enumerate(planned.parts, 1):
        part_folder = folder / name
        part_folder.mkdir()
        key = key_of(planned.part_fields[name])
        donor = next((d for d in donors if name in d.manifest.parts and d.manifest.parts[name].key == key), None)
        if donor is not None:
            progress(f"[{number}/{count}] {name}: taken from {donor.folder}")
            entries[name] = _take(donor, name, part_folder, planned.weights)
        else:
            progress(f"[{number}/{count}] {name}: {planned.parts[name]}")
            entries[name] = _write_part(planned, name, key, part_folder, work)
        give_back()
    return entries


def _take(donor: Artifact, name: str, folder: Path, weights: str) -> PartEntry:
    for file in (donor.folder / name).iterdir():
        expected = donor.manifest.files.get(f"{name}/{file.name}")
        if expected is None or sha256(file) != expected.sha256:
            message = f"{file} is not what was written: {donor.folder} can't lend its {name}"
            raise CorruptError(message, fix="export that artifact again, or leave out --reuse")
        place(file, folder / file.name, weights)
    return donor.manifest.parts[name]


def _write_part(planned: Plan, name: str, key: str, folder: Path, work: Path) -> PartEntry:
    part, recipe = planned.source.family.part(name), planned.parts[name]
    exporter = plugins.exporter(recipe.backend)
    config, origin = planned.source.config(part.module), planned.source.path(part.module)
    inputs, outputs = _ports(part, config, recipe), part.component.outputs(config)
    subject = Subject(
        part=name,
        precision=recipe.precision,
        weight_format=plugins.weight_format(recipe.precision),
        activations=_activations(planned, part),
        inputs=inputs,
        outputs=outputs,
        source=origin,
        checkpoint=planned.source.checkpoint(part.module),
        capture=on_hollow(name, part.component, config, origin, work / part.module),
        module=module_on_hollow(part.component, origin, work / part.module),
        weights=planned.weights,
    )
    shutil.copyfile(origin / "config.json", folder / "config.json")
    if subject.activations:
        (folder / ACTIVATIONS).write_text(json.dumps(subject.activations, indent=1) + "\n")
    lowered = exporter.lower(subject, folder)
    _refuse_unchanged(subject, lowered)
    return PartEntry(
        backend=recipe.backend,
        precision=recipe.precision,
        key=key,
        key_fields=planned.part_fields[name],
        inputs=[port_to_dict(port) for port in inputs],
        outputs=[port_to_dict(port) for port in outputs],
        weights=lowered.weights,
        weight_bytes=lowered.weight_bytes,
        kept=lowered.kept,
        tools=_versions(exporter),
    )


def _activations(planned: Plan, part: Part) -> dict[str, tuple[float, float]]:
    """Return the calibrated scales of a part's layers, under their names in the checkpoint."""
    if planned.calibration is None or not _is_calibrated(planned.parts[part.name]):
        return {}
    scales = planned.calibration.scales(part.name)
    if not scales:
        message = f"the calibration says nothing of {part.name}"
        raise UsageError(message, fix=f"give it another precision, such as --recipe …,{part.name}=BACKEND:bf16")
    names = layer_names(scales, planned.source.checkpoint(part.module))
    return {names[path]: both for path, both in scales.items() if path in names}


def _refuse_unchanged(subject: Subject, lowered: Lowered) -> None:
    """Raise if a low-bit recipe changed no weight of a part."""
    if subject.weight_format and not lowered.weight_bytes.get(subject.weight_format.name):
        reasons = Counter(lowered.kept.values()).most_common(3)
        why = "; ".join(f"{count} × {reason}" for reason, count in reasons)
        message = f"{subject.precision} changes no weight of {subject.part}: {why or 'it has none'}"
        raise RecipeError(message, fix=f"give it another precision, such as --recipe …,{subject.part}=BACKEND:bf16")


def _ports(part: Part, config: dict[str, Any], recipe: PartRecipe) -> tuple[Port, ...]:
    """Return the part's inputs as its backend's readers feed them, unless an option asks for a plain one."""
    conventions = part.component.conventions(recipe.backend)
    plain = part.component.inputs(config)
    return tuple(port if port.name in recipe.options else conventions.get(port.name, port) for port in plain)


def _versions(exporter: Exporter) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("bakeoff", *exporter.packages())}


def _copy_host_files(source: Source, folder: Path) -> None:
    """Copy scheduler and tokenizers, and the index without what isn't baked (safety checker, feature extractor)."""
    for file in source.host_files:
        target = folder / file.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    modules = {part.module for part in source.parts}
    index = {
        name: [None, None]
        if isinstance(value, list) and name not in modules and not (folder / name).is_dir()
        else value
        for name, value in source.index.items()
    }
    index |= {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_manifest(planned: Plan, folder: Path, entries: dict[str, PartEntry]) -> None:
    source = planned.source
    manifest = Manifest(
        schema=SCHEMA,
        bakeoff=importlib.metadata.version("bakeoff"),
        key=planned.key,
        key_fields=planned.key_fields,
        family=source.family.name,
        pipeline=source.index["_class_name"],
        variant=source.variant,
        source={"id": source.id, "revision": source.revision, **source.origins}
        | ({"loras": [{"file": lora.file.name, **lora.fields} for lora in planned.loras]} if planned.loras else {})
        | ({"calibration": planned.calibration.info} if planned.calibration else {}),
        recipe={"asked": to_dict(planned.recipe), "resolved": {n: r.as_dict() for n, r in planned.parts.items()}},
        hardware=None,
        parts=entries,
        files=describe_files(folder),
    )
    Artifact(folder, manifest).write_manifest()


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
