"""Find where an artifact departs from eager float32: part, step, layer, operator, and the likely cause.

Part and step come from the recorded cases: the first step, along the drawing that they are from, at which the part is
beyond its tolerance. The layer is what `search` finds in that case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ParityError, UnavailableError, UsageError
from ..runtimes.opening import judged_on, open_part, read_folder
from .causes import CANNOT_RUN, HARMLESS, UNKNOWN
from .distance import measure
from .drawing import sit
from .proof import as_baked, axes_of, recorded, run_case, scales_of
from .search import Search
from .traces import Eager

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..artifact import Artifact
    from ..components.family import Part
    from ..runtimes.runtime import Runtime
    from ..sources.source import Source
    from .proof import Recorded

NOWHERE = "no layer stands out"
"""Cause of a departure that no layer shows."""


@dataclass(frozen=True)
class CaseError:
    """One recorded case: its sizes, its timestep where the part has one, and its relative error."""

    sizes: Mapping[str, int]
    timestep: float | None
    error: float
    """Infinite where the part couldn't run."""
    call: int | None = None
    """Which call of the part in its drawing it was, from 0; None where inputs are made up."""


@dataclass(frozen=True)
class Explanation:
    """Where one part departs from eager float32, and why."""

    part: str
    tolerance: float
    cases: tuple[CaseError, ...]
    case: int
    """The one that was looked into: the first along the drawing that is beyond tolerance, else that of the largest error."""
    layer: str | None = None
    """By its name in the checkpoint; of what lies between layers, the module that it is in."""
    operator: str | None = None
    """The backend's own type: Conv, MatMul, Softmax…"""
    operation: str | None = None
    """Its name in the backend's file."""
    cause: str = NOWHERE
    """One of `bakeoff.parity.causes`."""
    figures: Mapping[str, float | str] = field(default_factory=dict)
    refused: bool = False
    """Whether its proof says that it fails: that may be by the interval of rows' errors, with each case within tolerance."""

    @property
    def error(self) -> float:
        return self.cases[self.case].error

    @property
    def departs(self) -> bool:
        """Whether the part is beyond its tolerance, or was proved to fail."""
        return self.refused or not self.error <= self.tolerance

    @property
    def fault(self) -> bool:
        """Whether something is wrong, rather than computed as the recipe asks for."""
        return self.cause not in HARMLESS and (self.departs or self.cause != NOWHERE)


def explain(artifact: Artifact, source: Source) -> list[Explanation]:
    """Explain each part that is beyond its tolerance; if none is, the one that is nearest to it.

    Args:
        artifact: of any backend that can look inside its parts.
        source: the model that it was made from; see `parity.origin.source_of`.

    Raises:
        UnavailableError: a backend can't be used here, or no part computes anything.
    """
    baked = read_folder(artifact.folder)
    known = all((artifact.folder / "proof" / f"{name}.safetensors").is_file() for name in artifact.manifest.parts)
    session = None if known else sit(source, artifact.manifest.source["id"])
    explained = []
    for name, entry in artifact.manifest.parts.items():
        if entry.backend != "null":
            part = baked.family.part(name)
            vouched, placement = artifact.vouched(name), judged_on(artifact).of(name)
            with open_part(artifact.folder / name, part, entry, placement, vouched=vouched) as runtime:
                record = recorded(artifact, name, source, session)
                refused = bool(artifact.manifest.proof.get("parts", {}).get(name, {}).get("problem"))
                explained.append((replace(_survey(runtime, name, record), refused=refused), part, record))
    if not explained:
        message = f"{artifact.folder} has parts of the null backend alone, which compute nothing"
        raise UnavailableError(message, fix="explain an artifact of another backend")
    explained.sort(key=lambda item: -item[0].error / item[0].tolerance)
    chosen = [item for item in explained if item[0].departs] or explained[:1]
    return [item[0] if item[0].cause == CANNOT_RUN else _explain_part(artifact, source, *item) for item in chosen]


def _survey(runtime: Runtime, name: str, record: Recorded) -> Explanation:
    """Run the recorded cases, and choose the one that is to be looked into: the first that can't run, if there is one."""
    cases: list[CaseError] = []
    failed: dict[int, str] = {}
    for (inputs, expected), call in zip(record.cases, record.calls, strict=True):
        time = inputs.get("timestep")
        try:
            error = measure(run_case(runtime, name, inputs), expected, {}).error
        except ParityError as problem:
            error = math.inf
            failed[len(cases)] = problem.message
        cases.append(CaseError(axes_of(inputs), None if time is None else float(time.flatten()[0]), error, call))
    if failed:
        index, figures = min(failed), {"backend": failed[min(failed)]}
        return Explanation(name, record.tolerance, tuple(cases), index, cause=CANNOT_RUN, figures=figures)
    return Explanation(name, record.tolerance, tuple(cases), _chosen(cases, record.tolerance))


def _chosen(cases: Sequence[CaseError], tolerance: float) -> int:
    """Return the index of the first case, along the drawing, that is beyond tolerance; else that of the largest error."""
    beyond = [
        (case.call, index) for index, case in enumerate(cases) if case.call is not None and case.error > tolerance
    ]
    return min(beyond)[1] if beyond else max(range(len(cases)), key=lambda index: cases[index].error)


def _explain_part(
    artifact: Artifact, source: Source, surveyed: Explanation, part: Part, record: Recorded
) -> Explanation:
    entry = artifact.manifest.parts[part.name]
    eager, folder = Eager(part, source), artifact.folder / part.name
    inputs, expected = record.cases[surveyed.case]
    mixture, scales = as_baked(entry, folder), scales_of(folder)
    vouched, placement = artifact.vouched(part.name), judged_on(artifact).of(part.name)
    with open_part(folder, part, entry, placement, vouched=vouched) as runtime:
        try:
            search = Search(runtime, eager, inputs, record.tolerance, mixture, scales)
        except UsageError:
            return replace(surveyed, figures={"not looked into": f"{entry.backend} can't look inside its parts"})
        suspect = search.first() or search.outputs(expected) or search.largest
    if suspect is None or (not surveyed.departs and suspect.cause.name == UNKNOWN):
        return surveyed
    return replace(
        surveyed,
        layer=suspect.layer,
        operator=suspect.cause.operation.kind if suspect.cause.operation else None,
        operation=suspect.cause.operation.name if suspect.cause.operation else None,
        cause=suspect.cause.name,
        figures={"error in": suspect.before, "error out": suspect.after, **suspect.cause.figures},
    )


def as_json(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation for JSON, in which what is infinite is a string; `step` is the first that is beyond tolerance."""
    from dataclasses import asdict

    def plain(value: Any) -> Any:  # noqa: ANN401 - JSON
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    found: dict[str, Any] = plain(asdict(explanation))
    chosen = found["cases"][explanation.case]
    step = {"call": chosen["call"], "timestep": chosen["timestep"]} if explanation.departs else None
    return found | {"step": step, "departs": explanation.departs, "fault": explanation.fault}


def in_words(explanation: Explanation) -> list[str]:
    """Return an explanation as lines of text."""
    e = explanation
    beyond = [case for case in e.cases if not case.error <= e.tolerance]
    lines = [
        f"{e.part}: error {e.error:.2e}, tolerance {e.tolerance:.2e}; {len(beyond)} of {len(e.cases)} cases are beyond it",
        f"  case      {e.case}{_time(e.cases[e.case])}: "
        + ", ".join(f"{k} {v}" for k, v in e.cases[e.case].sizes.items()),
    ]
    lines += [f"  step      {_step(e, beyond)}"] if beyond else []
    if e.layer is not None:
        operation = f" ({e.operation})" if e.operation else ""
        lines += [f"  layer     {e.layer}", f"  operator  {e.operator or 'unknown'}{operation}"]
    lines.append(f"  cause     {e.cause}" + ("" if e.fault else ": no fault"))
    return lines + [f"  {name}: {_figure(value)}" for name, value in e.figures.items()]


def _step(explanation: Explanation, beyond: Sequence[CaseError]) -> str:
    """Say at which step of a drawing the part is first beyond its tolerance."""
    case = explanation.cases[explanation.case]
    if case.call is None:
        return "unknown: this part's inputs are made up, not recorded in a drawing"
    first = all(case in beyond for case in explanation.cases)
    said = f"call {case.call} of the part in its drawing{_time(case)}: the first that is beyond tolerance"
    return said + (", as are all that were recorded" if first else "")


def _time(case: CaseError) -> str:
    return "" if case.timestep is None else f" at timestep {case.timestep:g}"


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
