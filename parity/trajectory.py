"""What an artifact draws against what eager float32 drew: distance after each step, and the pictures.

In units of floors that were drawn with it: F0, eager float32 on one thread and a picture at a time; F1,
eager bfloat16 (float16 for a recipe in it), torch alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import pictures
from ..errors import InputError, ParityError
from ..reports.gates import HALF_FLIP, HALF_GATE, LOST_POINTS, LOST_PROMPTS, MEANING_GATE, Gate, gates
from ..runtimes.engine import Engine
from ..runtimes.opening import judged_on, of_artifact
from ..weights import save_tensors
from .drawing import Drawn, Session, Shot, draw, open_source, sit_again

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ..artifact import Artifact
    from ..sources.source import Source

FILE = "trajectory.safetensors"
NO_PICTURE = "vae_encoder"
"""The part that a picture drawn from text doesn't come through."""
_FIGURES = ("psnr_db", "ssim", "flip")


@dataclass(frozen=True)
class Reference:
    """What eager float32 drew, and the floors of that."""

    shots: tuple[Shot, ...]
    drawn: tuple[Drawn, ...]
    floors: Mapping[str, Mapping[str, Any]]
    """`f0`, and `f1` where the recipe is in less than float32: figures as `figures` returns them."""


def record(artifact: Artifact, source: Source, session: Session, folder: Path) -> None:
    """Draw the floors of what was drawn in eager float32, and write all of it into the artifact's `proof`."""
    import torch

    floors = {"f0": _floor(source, session, "fp32", threads=1, max_batch=1)}
    kinds = precisions(artifact)
    if kinds != {"fp32"}:
        dtypes = ("fp16", "bf16") if "fp16" in kinds and not kinds & set(LOST_POINTS) else ("bf16",)
        for dtype in dtypes:
            floors["f1"] = {"dtype": dtype, **_floor(source, session, dtype)}
            if "problem" not in floors["f1"]:
                break
    tensors = {}
    for index, drawn in enumerate(session.drawn):
        tensors[f"{index}.latents"] = torch.from_numpy(drawn.latents).contiguous()
        tensors[f"{index}.pictures"] = torch.from_numpy(drawn.pictures).contiguous()
    about = {"shots": json.dumps([asdict(shot) for shot in session.shots]), "floors": json.dumps(floors)}
    folder.mkdir(exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)  # it may be a link that shares its bytes
    save_tensors(tensors, folder / FILE, about)


def _floor(
    source: Source, session: Session, precision: str, threads: int | None = None, max_batch: int = 8
) -> dict[str, Any]:
    """Draw the shots again in eager torch; return the figures of that, or its problem."""
    try:
        with open_source(source, precision, threads) as engine:
            got = [draw(engine, shot, max_batch) for shot in session.shots]
    except ParityError as error:
        return {"problem": error.message}
    return figures(session.drawn, got)


def read(file: Path) -> Reference:
    """Read what `record` wrote."""
    from safetensors import safe_open

    with safe_open(file, "numpy") as stream:
        about = stream.metadata()
        shots = tuple(Shot.read(each) for each in json.loads(about["shots"]))
        drawn = tuple(
            Drawn(stream.get_tensor(f"{index}.latents"), stream.get_tensor(f"{index}.pictures"))
            for index in range(len(shots))
        )
    return Reference(shots, drawn, json.loads(about["floors"]))


def precisions(artifact: Artifact) -> set[str]:
    """Return the precisions, layers' own among them, of the parts that a picture drawn from text comes through."""
    found: set[str] = set()
    for name, part in artifact.manifest.parts.items():
        if name != NO_PICTURE:
            found |= part.precisions
    return found


def figures(expected: Sequence[Drawn], got: Sequence[Drawn]) -> dict[str, Any]:
    """Compare what was drawn with a reference: `drift` after each step, the largest of the shots; a figure a picture.

    `flat` says which pictures show one colour where the reference's don't.
    """
    told: dict[str, Any] = {"drift": [], **{name: [] for name in _FIGURES}, "flat": []}
    drifts = [pictures.drift(one.latents, other.latents) for one, other in zip(expected, got, strict=True)]
    told["drift"] = [max(each) for each in zip(*drifts, strict=False)]
    for one, other in zip(expected, got, strict=True):
        found = pictures.likeness(one.pictures, other.pictures)
        if "problem" in found:
            return {"problem": found["problem"]}
        shown = pictures.likeness(one.pictures, one.pictures)["flat"]
        told["flat"] += [flat and not before for flat, before in zip(found["flat"], shown, strict=True)]
        for name in _FIGURES:
            told[name] += found.get(name, [])
    return {name: values for name, values in told.items() if values}


def prove(artifact: Artifact) -> dict[str, Any]:
    """Draw with an artifact what its `proof` has of eager float32, and judge it.

    Returns:
        `figures`, floors, `units` (each figure over its floor's), `gates`, what is `missing` and the `problem`, if any;
        or why nothing was drawn, as `skipped`.
    """
    import torch

    idle = [name for name, part in artifact.manifest.parts.items() if part.backend == "null"]
    if idle:
        return {"skipped": f"{', '.join(idle)} of the null backend compute nothing"}
    file = artifact.folder / "proof" / FILE
    if not file.is_file():
        return {"skipped": "nothing drawn by eager float32 is kept with it; --source MODEL draws it"}
    reference = read(file)
    told: dict[str, Any] = {"shots": [asdict(shot) for shot in reference.shots], "floors": reference.floors}
    try:
        with Engine(of_artifact(artifact), judged_on(artifact, torch.get_num_threads())) as engine:
            found = figures(reference.drawn, [draw(engine, shot) for shot in reference.shots])
    except InputError as error:  # such as a fractional timestep, which the file can't take
        return {"skipped": f"the artifact can't draw this: {error.message}"}
    except ParityError as error:
        found = {"problem": error.message}
    except Exception as error:  # noqa: BLE001 - a backend's own, such as for a shape that was baked in
        found = {"problem": f"the artifact can't draw: {error}"}
    if "problem" in found:
        return told | {"problem": found["problem"]}
    unit, floor = _floor_of(reference)
    judged = judge(precisions(artifact), found, reference.floors.get("f1"))
    failed = [f"{gate.name}: {gate.detail}" for gate in judged if gate.holds is False]
    return told | {
        "figures": found,
        "unit": unit,
        "units": units(found, floor),
        "missing": pictures.missing(),
        "gates": [asdict(gate) for gate in judged],
        "problem": "; ".join(failed) or None,
    }


def is_undecided(told: Mapping[str, Any]) -> bool:
    """Say whether the half-precision gate failed for lack of pictures: its mean is within the limit, its interval isn't."""
    if not any(gate["name"] == HALF_GATE and gate["holds"] is False for gate in told.get("gates", ())):
        return False
    mine, theirs = (sum(each["flip"]) for each in (told["figures"], told["floors"]["f1"]))
    return mine <= HALF_FLIP * theirs


def prove_further(artifact: Artifact, source: Source) -> dict[str, Any]:
    """Draw further pictures with a model and its floors, keep them in `proof`, and judge the artifact by all of them.

    Two looks at intervals of 97.5 % to one side: together they mislead in 5 % of cases at most (Bonferroni).
    """
    folder = artifact.folder / "proof"
    before, further = read(folder / FILE), sit_again(source, artifact.manifest.source["id"])
    joined = Session(before.shots + further.shots, before.drawn + further.drawn)
    record(artifact, source, joined, folder)
    return prove(artifact)


def _floor_of(reference: Reference) -> tuple[str, Mapping[str, Any]]:
    name = "f1" if "f1" in reference.floors else "f0"
    return name.upper(), reference.floors[name]


def units(found: Mapping[str, Any], floor: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return figures over their floor's: None where the floor is nothing.

    Of PSNR it is the ratio of root-mean-square errors, of SSIM that of what lacks to 1.
    """

    def distance(name: str, value: float) -> float:
        if name == "psnr_db":
            return 0.0 if value >= pictures.SAME_DB else 10 ** (-value / 20)
        return 1 - value if name == "ssim" else value

    return {
        name: [
            round(distance(name, mine) / theirs, 3) if (theirs := distance(name, base)) > 0 else None
            for mine, base in zip(found[name], floor[name], strict=True)
        ]
        for name in ("drift", *_FIGURES)
        if name in found and name in floor
    }


def judge(kinds: Iterable[str], found: Mapping[str, Any], floor: Mapping[str, Any] | None) -> list[Gate]:
    """Apply the default gate of the widest tolerance: of low bits, if any part or layer has them, else of two bytes, else fp32.

    What low bits cost pictures is for the scorer to judge, so that theirs is left open here.
    """
    kinds = set(kinds)
    if kinds & set(LOST_POINTS):
        told = f"low bits are judged by what pictures show, over {LOST_PROMPTS} prompts: --scorer {LOST_PROMPTS}"
        return [*gates({"fp32"}, {**found, "psnr_db": [math.inf]}, None, None, [])[:1], Gate(MEANING_GATE, None, told)]
    lacking = pictures.missing()
    if kinds != {"fp32"} and "flip" in lacking:
        return [Gate(HALF_GATE, holds=None, detail=lacking["flip"])]
    usable = dict(floor) if floor and "flip" in floor else None
    return gates(kinds, dict(found), None, usable, [])


def in_words(told: Mapping[str, Any]) -> list[str]:
    """Return what was drawn as lines of text."""
    if "skipped" in told:
        return [f"pictures: none drawn, {told['skipped']}"]
    if "figures" not in told:
        return [f"pictures: {told['problem']}"]
    found, ratios, unit = told["figures"], told["units"], told["unit"]
    lines = []
    if "drift" in found:
        steps = [f"{value:.1e}{_in(unit, ratios, 'drift', step)}" for step, value in enumerate(found["drift"])]
        lines.append(f"latents, farthest after each step: {', '.join(steps)}")
    sizes = [(shot["height"], shot["width"]) for shot in told["shots"] for _ in shot["prompts"]]
    for index, (height, width) in enumerate(sizes):
        said = [
            f"{label} {_figure(name, found[name][index])}{_in(unit, ratios, name, index)}"
            for name, label in (("psnr_db", "PSNR"), ("ssim", "SSIM"), ("flip", "ꟻLIP"))
            if name in found
        ]
        lines.append(f"picture {index} ({height}×{width}): {', '.join(said)}")
    lines += [f"{name}: {why}" for name, why in told["missing"].items()]
    words = {True: "passes", False: "fails", None: "open"}
    return lines + [f"gate {gate['name']}: {words[gate['holds']]}, {gate['detail']}" for gate in told["gates"]]


def _figure(name: str, value: float) -> str:
    return pictures.decibels(value) if name == "psnr_db" else f"{value:.4f}"


def _in(unit: str, ratios: Mapping[str, Sequence[float | None]], name: str, index: int) -> str:
    """Say a figure in units of its floor."""
    if name not in ratios:
        return ""
    ratio = ratios[name][index]
    return f" ({unit} is 0)" if ratio is None else f" ({ratio:.2f} {unit})"
