"""Bake a model: open the source, capture each part, lower it, write the artifact, prove it. The order is known here alone."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .artifact import (
    ACTIVATIONS,
    INPUTS,
    MANIFEST,
    SCHEMA,
    Artifact,
    Manifest,
    PartEntry,
    describe_files,
    key_of,
    shares_of,
    staged,
    stated_share,
    sweep,
)
from .components.component import Sizes
from .errors import CorruptError, ParityError
from .exporters.capture import module_on_hollow, on_hollow
from .exporters.corrected import lower_corrected
from .exporters.exporter import Subject
from .memory import give_back
from .naming import layer_names
from .parity.budget import Gate, check_parts
from .plan import (
    ACTIVATIONS_OPTION,
    OUTPUTS_OPTION,
    check_provable,
    check_room,
    is_calibrated,
    mixture_of,
    plan,
    refuse_unchanged,
    unchanged,
)
from .quantize.calibration import METHODS
from .quantize.grid import grids_to_json
from .quantize.inputs import with_inputs, write_inputs
from .recipe import to_dict
from .runtimes.opening import port_to_dict
from .sources.lora import with_loras
from .weights import place, sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .components.component import Port
    from .components.family import Part
    from .exporters.exporter import Exporter, Lowered
    from .plan import Plan
    from .quantize.calibration import Calibration
    from .quantize.grid import Grids
    from .recipe import PartRecipe, Recipe
    from .sources.source import Source
    from .weights import Checkpoint

    Progress = Callable[[str], None]

_BOUNDLESS = Sizes(1 << 20, 1 << 20, 1 << 20, 1 << 20)
"""Asked of a component, it says what it limits."""


def export(
    model: str,
    output: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    config: str | None = None,
    weights: str = "auto",
    prove: bool = True,
    gate: Gate | None = None,
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
        gate: what that has to come to; by default what the noise floors justify.
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
    gate = gate or Gate()
    check_parts(gate.budgets, [name for name, part in planned.parts.items() if part.backend != "null"])
    sweep(target)
    present = None if force else _present(target, planned.key)
    if present is not None:
        progress(f"{target} is up to date")
        return _proved_later(present, planned, gate, progress) if prove else present
    check_room(planned, target)
    if prove:
        check_provable(planned)
    if planned.note:
        progress(f"note: {planned.note}")
    if calibration is not None and planned.calibration is None:
        progress(f"note: {calibration} isn't used: no part is of a precision that takes one")
    donors = [Artifact.open(Path(folder)) for folder in reuse]
    with (
        staged(target, replace_existing=force) as folder,
        with_loras(planned.source, planned.loras, target, progress) as source,
    ):
        with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
            entries = _write_parts(replace(planned, source=source), folder, Path(work), donors, progress)
        _copy_host_files(planned.source, folder)
        _write_manifest(planned, folder, entries)
        if prove:
            _prove(Artifact.open(folder), source, gate, progress)
        else:
            progress("not proved: --no-prove")
    return Artifact.open(target)


def _prove(artifact: Artifact, source: Source, gate: Gate, progress: Progress) -> None:
    from .parity import prover

    progress("proving each part in a child process")
    proved = artifact.with_proof(prover.prove(artifact, source, gate))
    if not proved.manifest.proved:
        progress(f"{proved.manifest.proof['status']}: {proved.manifest.proof['reason']}")


def _proved_later(artifact: Artifact, planned: Plan, gate: Gate, progress: Progress) -> Artifact:
    """Prove an artifact that an earlier export left unproved, or granted something else, if that can be done here."""
    from .parity import prover

    proof = artifact.manifest.proof
    if proof["status"] == prover.FAILING and not gate.allow_failing:
        raise ParityError(proof["reason"], fix="add --allow-failing to keep it as it is, or --force to export it anew")
    if proof["status"] != prover.UNPROVED and all(
        proof["parts"][part].get("budget") == asdict(budget) for part, budget in gate.budgets.items()
    ):
        return artifact
    reason = prover.obstacle(artifact, planned.source)
    if reason:
        progress(f"not proved: {reason}")
        return artifact
    with with_loras(planned.source, planned.loras, artifact.folder, progress) as source:
        progress("proving each part in a child process")
        return prover.prove_in_place(artifact, source, gate)


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
    checkpoint = planned.source.checkpoint(part.module)
    mixture = with_inputs(mixture_of(recipe), planned.calibration, name, checkpoint)
    exporter = plugins.exporter(recipe.backend)
    config, origin = planned.source.config(part.module), planned.source.path(part.module)
    inputs, outputs = _ports(part, config, recipe), part.component.outputs(config)
    subject = Subject(
        part=name,
        mixture=mixture,
        activations=_activations(planned, part),
        inputs=inputs,
        outputs=outputs,
        source=origin,
        checkpoint=checkpoint,
        capture=on_hollow(name, part.component, config, origin, work / part.module),
        module=module_on_hollow(part.component, origin, work / part.module),
        weights=planned.weights,
        options=recipe.options,
        limits=part.component.limit(config, _BOUNDLESS).as_dict(),
        origin={field: planned.part_fields[name].get(field) for field in ("source", "component", "loras")},
    )
    shutil.copyfile(origin / "config.json", folder / "config.json")
    if mixture.known:
        write_inputs(mixture.known, folder / INPUTS)
    recapture = partial(on_hollow, name, part.component, config, origin, work / part.module)
    lowered = lower_corrected(exporter, subject, recapture, work / f"{name}.biases.safetensors", folder)
    if subject.activations:
        rounded = subject.activations if lowered.activations is None else lowered.activations
        told = {layer: grids_to_json(grids) for layer, grids in rounded.items()}
        (folder / ACTIVATIONS).write_text(json.dumps(told) + "\n")
    refuse_unchanged({name: unchanged(mixture, lowered.weight_bytes, lowered.kept)}, planned.parts)
    shares, weight_format = shares_of(lowered.weight_bytes), subject.mixture.formats.get(recipe.precision)
    uncalibrated = _uncalibrated(planned, part, subject, lowered)
    missed = sum(math.prod(checkpoint.entries[each].shape) for each in uncalibrated)
    share_missed = missed / sum(math.prod(each.shape) for each in checkpoint.entries.values())
    return PartEntry(
        backend=recipe.backend,
        precision=recipe.precision,
        key=key,
        key_fields=planned.part_fields[name],
        inputs=[port_to_dict(port) for port in inputs],
        outputs=[port_to_dict(port) for port in outputs],
        weights=lowered.weights,
        weight_bytes=lowered.weight_bytes,
        weight_shares=shares,
        stated_share=round(stated_share(shares, weight_format.name) - share_missed, 4) if weight_format else None,
        kept=lowered.kept,
        uncalibrated=uncalibrated,
        tools=_versions(exporter),
    )


def _activations(planned: Plan, part: Part) -> dict[str, Grids]:
    """Return what a part's layers round their activations to, under their names in the checkpoint."""
    recipe = planned.parts[part.name]
    if planned.calibration is None or not is_calibrated(recipe):
        return {}
    return activations(planned.calibration, part.name, recipe, planned.source.checkpoint(part.module))


def activations(calibration: Calibration, part: str, recipe: PartRecipe, checkpoint: Checkpoint) -> dict[str, Grids]:
    """Return layer, by its name in the checkpoint -> what its input and output are rounded to.

    Args:
        calibration: what was seen of the part's layers.
        part: its name.
        recipe: precision, backend, and how steps are chosen.
        checkpoint: of the part.
    """
    usual = {option: values[0] for option, values in plugins.exporter(recipe.backend).options.items() if values}
    outputs = recipe.options.get(OUTPUTS_OPTION) or usual.get(OUTPUTS_OPTION)
    return calibration.grids_of(
        part,
        mixture_of(recipe),
        checkpoint,
        asked=recipe.options.get(ACTIVATIONS_OPTION, ""),
        usual=usual.get(ACTIVATIONS_OPTION, METHODS[0]),
        outputs=outputs == "rounded",
    )


def _uncalibrated(planned: Plan, part: Part, subject: Subject, lowered: Lowered) -> list[str]:
    """Return the weights that became codes, of layers whose activations should be rounded and were never seen, or noughts alone.

    Parts may share a module, as a VAE's do: what none of them reached counts, and nothing if one wasn't calibrated at all.
    """
    from torch import nn

    calibration = planned.calibration
    sharing = [each.name for each in planned.source.parts if each.module == part.module]
    if not is_calibrated(planned.parts[part.name]) or not calibration or not all(map(calibration.parts.get, sharing)):
        return []
    seen = [calibration.reached(name) for name in sharing]
    reached = {name for layers in seen for name in layer_names(layers, subject.checkpoint).values()}
    entries, mixture = subject.checkpoint.entries, subject.mixture
    paths = [path for path, layer in subject.module().named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    names = {name: f"{name}.weight" for name in layer_names(paths, subject.checkpoint).values()}
    return sorted(
        weight
        for name, weight in names.items()
        if mixture.rounds_activations(name, entries[weight].shape)
        if name not in reached and weight not in lowered.kept
    )


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


def _hardware(planned: Plan) -> dict[str, Any] | None:
    """Return part -> what its files are bound to; None where none are bound."""
    bound = {name: fields["bound"] for name, fields in planned.part_fields.items() if "bound" in fields}
    return bound or None


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
        hardware=_hardware(planned),
        parts=entries,
        files=describe_files(folder),
    )
    Artifact(folder, manifest).write_manifest()
