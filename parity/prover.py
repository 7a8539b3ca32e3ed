"""Prove an artifact: each part computes what its source computes, within what the noise floor justifies."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import Artifact, staged
from ..errors import ParityError, UnavailableError
from ..hardware import processor
from ..memory import available_bytes, in_child
from . import meaning, trajectory
from .budget import Budget, Gate, decibels, granted, upper_bound
from .distance import measure, row_errors
from .drawing import sit
from .origin import folders_of, origin_of, source_of
from .proof import axes_of, family_part, justified, record, recorded, row_tolerances, run_case

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..components.family import Part
    from ..sources.source import Source
    from .distance import Measured

PROVED, FAILING, UNPROVED = "proved", "failing", "unproved"
"""What a proof comes to. A failing artifact was let pass; it stays failing until it is exported again."""


def prove(
    artifact: Artifact,
    source: Source | None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Prove an artifact in a child process; return what goes into the manifest, the proof's memory and time beside it.

    With a source, eager outputs are recorded into `proof/` first; without, those already there are used. Parts of
    the null backend compute nothing and aren't proved.

    Args:
        artifact: of any recipe.
        source: what it was made from.
        gate: what it has to pass; by default what the noise floors justify.

    Raises:
        ParityError: a part is farther from eager than it is granted, or can't run at one of three shapes.
        UsageError: a budget is looser than the floors justify, without a reason.
    """
    gate = gate or Gate()
    reason = obstacle(artifact, source)
    if reason:
        return {"status": UNPROVED, "reason": reason}
    started = time.perf_counter()
    arguments = {
        "folder": str(artifact.folder),
        **(folders_of(source) if source else {"source": None, "elsewhere": {}}),
        "budgets": {name: asdict(budget) for name, budget in gate.budgets.items()},
    }
    found, peak = in_child("bakeoff.parity.prover:prove_here", arguments)
    problems = [each["problem"] for each in (*found["parts"].values(), found["trajectory"]) if each.get("problem")]
    if problems and not gate.allow_failing:
        raise ParityError("; ".join(problems), fix=_fix(artifact, source, found["trajectory"]))
    return {
        "status": FAILING if problems else PROVED,
        **({"reason": "; ".join(problems)} if problems else {}),
        **found,
        "processor": processor(),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_anon_bytes": peak.anon_bytes,
        "peak_rss_bytes": peak.rss_bytes,
    }


def _fix(artifact: Artifact, source: Source | None, drawn: Mapping[str, Any]) -> str:
    """Say what helps where a proof fails."""
    if source is None and trajectory.is_undecided(drawn):
        return "the pictures are too few to tell: --source MODEL draws more"
    if any("loras" in entry.key_fields for entry in artifact.manifest.parts.values()):
        return (
            "bakeoff verify DIR --explain --source MODEL --lora … on an export with --allow-failing says where and why"
        )
    return "bakeoff verify DIR --explain --source MODEL on an export with --allow-failing says where and why"


def prove_in_place(
    artifact: Artifact, source: Source | None, gate: Gate | None = None, scorer_prompts: int | None = None
) -> Artifact:
    """Prove an artifact again: a twin made of links takes its place once it is proved, else nothing changes on disk.

    What it was granted before holds again, unless the gate says otherwise. One that was let pass stays marked, and one that
    the scorer fails is marked from then on. What the scorer said earlier is kept, where it isn't asked again.

    Args:
        artifact: of any recipe.
        source: what it was made from.
        gate: what it has to pass.
        scorer_prompts: how many prompts the embedded model's scorer judges; see `meaning.judge`.

    Raises:
        ParityError: as `prove`; or the scorer fails it, which is kept.
        UnavailableError: it can't be proved here; the reason is in the message.
    """
    gate = gate or Gate()
    reason = obstacle(artifact, source)
    if reason:
        message = f"{artifact.folder} couldn't be proved: {reason}"
        raise UnavailableError(message, fix="give the model with --source, on a machine with the memory for it")
    known = {
        name: Budget(**part["budget"])
        for name, part in artifact.manifest.proof.get("parts", {}).items()
        if part.get("budget")
    }
    was_failing = artifact.manifest.proof["status"] == FAILING
    allowed = gate.allow_failing or was_failing
    scored = artifact.manifest.proof.get("scorer")
    if scorer_prompts is not None:
        known_source = contextlib.nullcontext(source) if source else source_of(artifact, artifact.manifest.source["id"])
        with known_source as model:
            scored = meaning.judge(artifact, model, scorer_prompts)
    with staged(artifact.folder, replace_existing=True) as folder:
        twin = artifact.twin(folder)
        proof = prove(twin, source, Gate({**known, **gate.budgets}, allowed))
        if scored:
            proof = _with_scores(proof, scored)
        if was_failing and proof["status"] == PROVED:
            proof |= {"status": FAILING, "reason": artifact.manifest.proof["reason"]}
        twin.with_proof(proof)
    problem = meaning.problem_of(scored) if scored else None
    if problem and not allowed:
        raise ParityError(problem, fix="bakeoff recipe chooses layers that stay wide; see docs/quantization.md")
    return Artifact.open(artifact.folder)


def _with_scores(proof: dict[str, Any], scored: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the scorer said to a proof; one that it fails is failing."""
    problem = meaning.problem_of(scored)
    failing = {"status": FAILING, "reason": "; ".join(filter(None, (proof.get("reason"), problem)))} if problem else {}
    return {**proof, **failing, "scorer": dict(scored)}


def in_words(proof: Mapping[str, Any]) -> list[str]:
    """Return a proof as lines of text: each part, then what was drawn, then what the scorer said."""
    lines = []
    for name, part in proof.get("parts", {}).items():
        if not part["cases"]:
            lines.append(f"{name}: {part['problem']}")
            continue
        worst = max(part["cases"], key=lambda case: case["error"])
        floors = [f"{worst['error'] / part[key]:.2f} {key.upper()}" for key in ("f0", "f1") if part.get(key)]
        lines.append(
            f"{name}: SQNR {worst['sqnr_db']:.1f} dB (granted {decibels(part['tolerance']):.1f}), cosine "
            f"{min(case['cosine'] for case in part['cases']):.7f}, worst relative error "
            f"{max(case['worst'] for case in part['cases']):.1e}, {', '.join(floors) or 'F0 is 0'}; "
            f"{len(part['cases'])} cases, inputs {part.get('inputs', 'made up')}"
            + (f": {part['why']}" if "why" in part else "")
        )
    if "trajectory" in proof:
        lines += trajectory.in_words(proof["trajectory"])
    return lines + ([meaning.in_words(proof["scorer"])] if "scorer" in proof else [])


def obstacle(artifact: Artifact, source: Source | None) -> str | None:
    """Say why an artifact can't be proved here, if it can't."""
    if all(part.backend == "null" for part in artifact.manifest.parts.values()):
        return "the null backend computes nothing"
    if source is None and not (artifact.folder / "proof").is_dir():
        return "nothing recorded to prove it against, and no source"
    needed, free = _needed_bytes(artifact, source), available_bytes()
    if needed > free:
        return f"running it takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return None


def _needed_bytes(artifact: Artifact, source: Source | None) -> int:
    """Estimate the proof's memory: the interpreter, and for the largest part its packed weights and a margin.

    With a source each part is also recorded from it: in float32, and as its copy that gives F1.
    """
    parts = artifact.manifest.parts
    packed = max(sum(part.weight_bytes.values()) for part in parts.values())
    if source is None:
        return int(0.7e9 + 1.3 * packed)
    narrow = [name for name, part in parts.items() if part.backend != "null" and part.precisions != {"fp32"}]
    wide = [source.checkpoint(family_part(artifact, name).module).bytes_in("float32") for name in narrow]
    return int(0.7e9 + max(2.0 * packed, 1.5 * max(wide, default=0)))


def prove_here(
    folder: str, source: str | None, elsewhere: Mapping[str, str], budgets: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Prove all parts, and what they draw, in this process; runs in the child of `prove`."""
    artifact = Artifact.open(Path(folder))
    origin = None if source is None else origin_of(artifact, source, elsewhere)
    made_up = {} if origin is None else _record(artifact, origin)
    results = {}
    for name, entry in artifact.manifest.parts.items():
        if entry.backend != "null":
            budget = Budget(**budgets[name]) if name in budgets else None
            found = _prove_part(artifact, family_part(artifact, name), budget)
            results[name] = found | ({"why": made_up[name]} if name in made_up else {})
            gc.collect()
    drawn = trajectory.prove(artifact)
    if origin and trajectory.is_undecided(drawn):
        drawn = trajectory.prove_further(artifact, origin)
    return {"parts": results, "trajectory": drawn}


def _record(artifact: Artifact, source: Source) -> dict[str, str]:
    """Draw with the source, write into `proof/` what that gives; return part -> why its inputs are made up, of those."""
    folder = artifact.folder / "proof"
    session = sit(source, artifact.manifest.source["id"])
    if session.obstacle is None:
        trajectory.record(artifact, source, session, folder)
    gc.collect()
    why = session.obstacle or f"no drawing of a {artifact.manifest.family} pipeline comes to it"
    made_up: dict[str, str] = {}
    for name, entry in artifact.manifest.parts.items():
        if entry.backend != "null":
            cases = session.cases.get(name, ())
            record(family_part(artifact, name), entry, source, folder, cases)
            made_up |= {} if cases else {name: why}
            gc.collect()
    return made_up


def _prove_part(artifact: Artifact, part: Part, budget: Budget | None) -> dict[str, Any]:
    from ..runtimes.opening import judged_on, open_part

    found = recorded(artifact, part.name)
    allowed = granted(part.name, justified(found.floors), budget)
    by_row = [] if budget else row_tolerances(found.floors)
    entry, placement = artifact.manifest.parts[part.name], judged_on(artifact).of(part.name)
    cases, rows, problem = [], [], None
    try:
        vouched = artifact.vouched(part.name)
        with open_part(artifact.folder / part.name, part, entry, placement, vouched=vouched) as runtime:
            for inputs, expected in found.cases:
                got = run_case(runtime, part.name, inputs)
                cases.append(measure(got, expected, axes_of(inputs)))
                rows += row_errors(got, expected)
        problem = _problem(part.name, cases, _upper(rows, by_row, allowed), allowed)
    except ParityError as error:
        problem = error.message
    return {
        "tolerance": allowed,
        **({"budget": asdict(budget)} if budget else {}),
        **{name: floor.error for name, floor in found.floors.items()},
        "inputs": found.inputs,
        "upper": _upper(rows, by_row, allowed),
        "problem": problem,
        "cases": [asdict(case) for case in cases],
    }


def _upper(rows: Sequence[float], by_row: Sequence[float], allowed: float) -> float:
    """Return the upper end of the 95 % interval of rows' errors: each against its own tolerance, in terms of the part's."""
    if not rows:
        return math.inf
    own = by_row if len(by_row) == len(rows) else [allowed] * len(rows)
    return allowed * upper_bound([error / each for error, each in zip(rows, own, strict=True)])


def _problem(part: str, cases: list[Measured], upper: float, allowed: float) -> str | None:
    """Say what is beyond the tolerance: a case, or the upper end of the interval of all rows' errors."""
    worst = max(cases, key=lambda case: case.error)
    if not worst.error <= allowed < math.inf:
        return (
            f"{part} differs from eager fp32 by {worst.error:.2e}, {worst.sqnr_db:.1f} dB (granted {allowed:.2e}, "
            f"{decibels(allowed):.1f} dB) at {worst.sizes}"
        )
    if not upper <= allowed:
        return f"{part} differs from eager fp32 by up to {upper:.2e} with 95 % confidence (granted {allowed:.2e})"
    return None
