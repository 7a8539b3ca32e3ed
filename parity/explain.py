"""Find where an artifact departs from eager float32: part, step, layer, operator, and the likely cause.

Part and step come from the recorded cases: the first step, along the drawing that they are from, at which the part is
beyond its tolerance. The layer is the first one, as eager runs them, whose output is off: by
bisection on the backend's own tensors against eager's. A layer that is off is believed to be at fault once eager, given
the very input that the backend gave it, makes something else of it; so what came from before isn't blamed on it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ParityError, UnavailableError, UsageError
from ..runtimes.opening import judged_on, open_part, read_folder
from .anatomy import Anatomy
from .causes import CANNOT_RUN, GRIDS, HARMLESS, UNKNOWN, Cause, Evidence, Rounding, find_cause, principal
from .drawing import sit
from .proof import as_baked, axes_of, fed, measure, recorded, relative_error, run_case, scales_of
from .traces import Eager, Seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from ..artifact import Artifact
    from ..components.family import Part
    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..runtimes.runtime import Operation, Runtime
    from ..sources.source import Source
    from .proof import Recorded

Tensors = dict[str, "Tensor"]

_PROBES, _SCANNED = 8, 32
"""Layers whose tensors are held at once, in bisection and after it: a big part's all together would be more than the part."""
_JUMP = 10.0
"""What lies between layers is suspected if its error is so many times that of what it was given."""
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
            search = _Search(runtime, eager, inputs, record.tolerance, mixture, scales)
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


@dataclass(frozen=True)
class _Suspect:
    layer: str
    before: float
    """Error of what it was given, against eager's."""
    after: float
    """Error of what it made."""
    cause: Cause


@dataclass(frozen=True)
class _View:
    """One layer in the backend and in eager."""

    name: str
    got: Seen
    tensor: str
    """Name of what it was given, in the backend."""
    expected: Seen

    @property
    def before(self) -> float:
        return relative_error(self.got.given.float(), self.expected.given.float())

    @property
    def after(self) -> float:
        return relative_error(self.got.made.float(), self.expected.made)


class _Search:
    """The search in one case of one part."""

    def __init__(
        self,
        runtime: Runtime,
        eager: Eager,
        inputs: Tensors,
        limit: float,
        mixture: Mixture,
        scales: Mapping[str, Grids],
    ) -> None:
        self._runtime, self._eager, self._inputs, self._limit = runtime, eager, inputs, limit
        self._anatomy = Anatomy(runtime.operations(), [port.name for port in runtime.inputs])
        self._fed = fed(runtime, inputs)
        self._mixture, self._scales = mixture, scales
        self._order = [name for name in eager.order(inputs) if self._anatomy.operations(name)]
        self._errors: dict[str, float] = {}
        """Layer -> error of what it made."""
        self._made: dict[str, str] = {}
        """Tensor in the backend -> the layer that made it."""
        self.largest: _Suspect | None = None
        """The layer that makes the most of an error by itself, where none makes too much."""

    def first(self) -> _Suspect | None:
        """Return the first suspect in the order of execution."""
        start, largest = self._bisect(), 0.0
        for index in range(start, len(self._order), _SCANNED):
            for view in self._views(self._order[index : index + _SCANNED]):
                suspect = self._between(view.tensor, view.name, view.before, view.expected.given)
                own, expected, rounded = self._own_error(view)
                if suspect or own > self._limit:
                    return suspect or self._suspect(view, expected, rounded)
                exact = relative_error(view.got.made.float(), expected)
                if exact > largest:
                    largest, self.largest = exact, self._suspect(view, expected, rounded)
        return None

    def outputs(self, expected: Tensors) -> _Suspect | None:
        """Return what lies between the last layers and the part's outputs, if that is at fault."""
        if not self._anatomy.joined:
            return None
        got = self._runtime.run(self._fed)
        for name in sorted(set(got) & set(expected)):
            suspect = self._between(name, name, relative_error(got[name], expected[name]), expected[name])
            if suspect:
                return suspect
        return None

    def _bisect(self) -> int:
        """Return the index of the first layer whose output is off; 0 if none is."""
        low, high, found = 0, len(self._order), False
        while high - low > 1:
            step = max(1, (high - low) // _PROBES)
            probes = [*range(low, high, step)]
            views = {view.name: view for view in self._views([self._order[probe] for probe in probes])}
            off = [i for i in probes if self._order[i] in views and not views[self._order[i]].after <= self._limit]
            near = [i for i in probes if not off or i < off[0]]
            found = found or bool(off)
            low, high = (near[-1] + 1 if near else low), (off[0] if off else high)
            if step == 1:
                low = high
        return low if found else 0

    def _views(self, names: Sequence[str]) -> list[_View]:
        """Run eager and the backend once, and pick the backend's tensors of eager's shapes."""
        seen = self._eager.see(self._inputs, names)
        given = {name: self._anatomy.given(name) for name in names}
        made = {name: self._anatomy.made(name) for name in names}
        got = self._runtime.tap(self._fed, [each for name in names for each in (*given[name], *made[name])])
        views = []
        for name in names:
            taken, output = _like(seen[name].given, given[name], got), _like(seen[name].made, made[name], got)
            if output is not None:
                there = Seen(got[taken] if taken else seen[name].given, got[output])
                views.append(_View(name, there, taken or output, seen[name]))
                self._made[output], self._errors[name] = name, views[-1].after
        return views

    def _own_error(self, view: _View) -> tuple[float, Tensor, Tensor | None]:
        """Give eager's layer what the backend's was given.

        Returns:
            The error that the layer makes by itself, beside its weights' rounding; what eager makes of that input; and
            what it makes of it with rounded weights, where the recipe rounds.
        """
        layer = self._eager.layers[view.name]
        given = view.got.given.float() if view.got.given.is_floating_point() else view.got.given
        expected = _run(layer, given)
        rounded = self._rounded(view.name, layer, given)
        made = view.got.made.float()
        errors = [relative_error(made, each) for each in (expected, rounded) if each is not None]
        finite = bool(expected.isfinite().all())
        return (min(errors) if finite else 0.0), expected, rounded

    def _rounded(self, name: str, layer: nn.Module, given: Tensor) -> Tensor | None:
        """Run a copy that is rounded as the artifact's layer is: weights for what they are given, biases, activations."""
        weight: Tensor | None = getattr(layer, "weight", None)
        weight_format = self._mixture.format_of(name)
        if weight is None or weight_format is None or weight_format.obstacle(weight.shape) is not None:
            return None
        return _run(self._mixture.round_module(copy.deepcopy(layer), {"": name}, self._scales), given)

    def _suspect(self, view: _View, expected: Tensor, rounded: Tensor | None) -> _Suspect:
        operations = [*self._anatomy.roundings(view.name), *self._anatomy.operations(view.name)]
        evidence = Evidence(
            made=view.got.made.float(),
            expected=expected,
            inner=self._tapped(operations),
            roundings=self._roundings(operations),
            precision=self._runtime.part.precision,
            module=self._eager.layers[view.name],
            given=view.got.given.float() if view.got.given.is_floating_point() else view.got.given,
            rounded=rounded,
        )
        return _Suspect(view.name, view.before, view.after, find_cause(evidence))

    def _between(self, tensor: str, layer: str, error: float, expected: Tensor) -> _Suspect | None:
        """Suspect what lies between the layers before a tensor and the tensor, if that is where it goes off."""
        if error <= self._limit or not self._anatomy.joined:
            return None
        self._place()
        operations, begins = self._anatomy.between(tensor, self._made)
        unknown = [self._made[name] for name in begins if self._made[name] not in self._errors]
        self._views(unknown)
        before = max((self._errors[self._made[name]] for name in begins), default=0.0)
        if not operations or not error > _JUMP * before:
            return None
        inner = self._tapped(operations)
        attended = self._eager.attended(self._inputs, layer) if layer in self._eager.layers else []
        got = next((each for operation, each in inner if tensor in operation.outputs), None)
        if got is None or got.shape != expected.shape:
            return None
        precision, roundings = self._runtime.part.precision, self._roundings(operations)
        cause = find_cause(Evidence(got.float(), expected, inner, precision, attended=attended, roundings=roundings))
        return _Suspect(_place_of(cause, inner, layer), before, error, cause)

    def _place(self) -> None:
        """Say of layers that weren't looked at where their outputs are: most probably their last tensors."""
        known = set(self._made.values())
        self._made |= {self._anatomy.made(name)[0]: name for name in self._order if name not in known}

    def _tapped(self, operations: Sequence[Operation]) -> list[tuple[Operation, Tensor]]:
        got = self._runtime.tap(self._fed, [operation.outputs[0] for operation in operations])
        return [(each, got[each.outputs[0]]) for each in operations if each.outputs[0] in got]

    def _roundings(self, operations: Sequence[Operation]) -> list[Rounding]:
        """Return those that round activations to a grid, with what they were given and the grid's ends."""
        found = [each for each in operations if each.kind in GRIDS]
        names = dict.fromkeys(name for each in found for name in (*each.inputs, each.outputs[0]))
        got = self._runtime.tap(self._fed, [*names]) if found else {}
        return [Rounding.of(each, [got[name] for name in each.inputs], got[each.outputs[0]]) for each in found]


def _place_of(cause: Cause, inner: Sequence[tuple[Operation, Tensor]], following: str) -> str:
    """Return the module that the blamed operation is in, or that most of them are in."""
    blamed = cause.operation or principal(inner)
    if blamed and blamed.layer:
        return blamed.layer
    return next((operation.layer for operation, _ in inner if operation.layer), following)


def _like(expected: Tensor, names: Iterable[str], got: Mapping[str, Tensor]) -> str | None:
    """Return the first tensor that has the shape and the kind of numbers that eager's has."""
    for name in names:
        found = got.get(name)
        same_kind = found is not None and found.is_floating_point() == expected.is_floating_point()
        if found is not None and same_kind and found.shape == expected.shape:
            return name
    return None


def _run(layer: nn.Module, given: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        made: Tensor = layer(given)
    return made


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
