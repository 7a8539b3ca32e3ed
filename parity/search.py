"""Search one case of one part for the first layer, as eager runs them, that is at fault.

By bisection on the backend's own tensors against eager's. A layer that is off is believed to be at fault once eager, given
the very input that the backend gave it, makes something else of it; so what came from before isn't blamed on it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .anatomy import Anatomy
from .causes import Cause, find_cause
from .distance import relative_error
from .evidence import GRIDS, Evidence, Rounding, principal
from .proof import fed
from .traces import Eager, Seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..runtimes.runtime import Operation, Runtime

    Tensors = dict[str, Tensor]

_PROBES, _SCANNED = 8, 32
"""Layers whose tensors are held at once, in bisection and after it: a big part's all together would be more than the part."""
_JUMP = 10.0
"""What lies between layers is suspected if its error is so many times that of what it was given."""


@dataclass(frozen=True)
class Suspect:
    """A layer, or what lies before it, that may be at fault."""

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


class Search:
    """The search in one case of one part.

    Args:
        runtime: the opened part.
        eager: the same in float32.
        inputs: of the case.
        limit: relative error that a layer may have.
        mixture: the precision of its weights.
        scales: layer -> what its activations are rounded to.

    Raises:
        UsageError: the backend can't look inside its parts.
    """

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
        self._fed = fed(runtime, inputs)
        self._anatomy = Anatomy(runtime.operations(self._fed), [port.name for port in runtime.inputs])
        self._mixture, self._scales = mixture, scales
        self._order = [name for name in eager.order(inputs) if self._anatomy.operations(name)]
        self._errors: dict[str, float] = {}
        """Layer -> error of what it made."""
        self._made: dict[str, str] = {}
        """Tensor in the backend -> the layer that made it."""
        self.largest: Suspect | None = None
        """The layer that makes the most of an error by itself, where none makes too much."""

    def first(self) -> Suspect | None:
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

    def outputs(self, expected: Tensors) -> Suspect | None:
        """Return what lies between the last layers and the part's outputs, if that is at fault."""
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

    def _suspect(self, view: _View, expected: Tensor, rounded: Tensor | None) -> Suspect:
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
        return Suspect(view.name, view.before, view.after, find_cause(evidence))

    def _between(self, tensor: str, layer: str, error: float, expected: Tensor) -> Suspect | None:
        """Suspect what lies between the layers before a tensor and the tensor, if that is where it goes off."""
        if error <= self._limit:
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
        return Suspect(_place_of(cause, inner, layer), before, error, cause)

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
