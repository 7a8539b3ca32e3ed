"""Families, exporters, runtimes and hooks, all found through entry points: the built-in ones use the same door.

| entry points | what each name loads |
| --- | --- |
| `bakeoff.families` | a `bakeoff.components.family.Family` |
| `bakeoff.exporters` | a class like `bakeoff.exporters.exporter.Exporter`; its name is the backend's in recipes |
| `bakeoff.runtimes` | a subclass of `bakeoff.runtimes.runtime.Runtime`, under the same name as its exporter |
| `bakeoff.formats` | a subclass of `bakeoff.quantize.format.Format`; its name is a precision in recipes |
| `bakeoff.hooks` | an object with any of `on_load(engine)`, `before(request)`, `after(request, result)` |
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from .errors import RecipeError, UnavailableError, unknown
from .quantize.mixture import Mixture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .components.family import Family
    from .exporters.exporter import Exporter
    from .quantize.format import Format
    from .runtimes.runtime import Runtime


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"bakeoff.{group}")}


def names(group: str) -> list[str]:
    """Return the registered names of a group, sorted."""
    return sorted(_points(group))


def _load(group: str, kind: str, name: str) -> Any:  # noqa: ANN401 - what a plugin registers
    points = _points(group)
    if name not in points:
        raise RecipeError(unknown(kind, name, points))
    try:
        return points[name].load()
    except ImportError as error:
        message = f"the {kind} {name!r} couldn't be imported: {error}"
        raise UnavailableError(message, fix=f"pip install 'bakeoff[{name}]'") from error


def families() -> list[Family]:
    return [_load("families", "family", name) for name in names("families")]


def exporter(backend: str) -> Exporter:
    made: Exporter = _load("exporters", "backend", backend)()
    return made


def runtime(backend: str) -> type[Runtime]:
    found: type[Runtime] = _load("runtimes", "runtime", backend)
    return found


def weight_format(precision: str) -> Format | None:
    """Return the format that weights have in a precision, if it is one of low-bit weights."""
    if precision not in _points("formats"):
        return None
    made: Format = _load("formats", "weight format", precision)()
    return made


def mixture(precision: str, layers: Mapping[str, str] | None = None) -> Mixture:
    """Return the formats of a part's precision and of its layers' that differ."""
    found = {name: weight_format(name) for name in {precision, *(layers or {}).values()}}
    return Mixture(precision, {name: each for name, each in found.items() if each}, layers or {})


def hooks(event: str) -> list[Any]:
    """Return what the registered hooks want called at `on_load`, `before` or `after`."""
    found = [_load("hooks", "hook", name) for name in names("hooks")]
    return [getattr(hook, event) for hook in found if hasattr(hook, event)]
