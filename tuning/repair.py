"""`bakeoff export --repair`: put back as few layers as needed in higher precision for an export to pass its gate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..artifact import Artifact, check_target, scratch
from ..bake import export
from ..errors import ParityError
from ..parity.budget import Gate
from ..parity.origin import source_of
from ..parity.proof import family_part, fed, recorded
from ..parity.prover import UNPROVED
from ..parity.trajectory import NO_PICTURE
from ..runtimes.opening import judged_on, open_part
from .remedy import hopeless, is_narrow, reached, remedy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..recipe import Recipe

_MOST_ROUNDS = 8
_LESS = 0.5
"""Share of its error that the part nearest to its tolerance may keep, where each part passes and pictures fail."""
_REPEATS = 15


@dataclass(frozen=True)
class Repair:
    """What it took to pass."""

    layers: Mapping[str, Mapping[str, str]]
    """Part -> layer that was put back -> its precision now."""
    whole: Mapping[str, str]
    """Part that was put back with all its layers -> its precision now."""
    bytes_before: int
    bytes_after: int
    """Of the weights of the parts that were repaired."""
    time_ratio: Mapping[str, float]
    """Part -> time of a run of its largest recorded case, to that before: medians of runs in turn, a rough figure."""

    def in_words(self) -> list[str]:
        more = self.bytes_after - self.bytes_before
        lines = [
            f"repaired {part}: {self._what(part)}: {ratio:.2f} × the time" for part, ratio in self.time_ratio.items()
        ]
        return [*lines, f"repairs took {more / 1e6:.2f} MB more of weights ({self.bytes_after / 1e6:.2f} MB)"]

    def _what(self, part: str) -> str:
        whole, layers = self.whole.get(part), self.layers.get(part, ())
        said = [f"all of it in {whole}"] if whole else []
        said += [f"{len(layers)} layer{'s' if len(layers) > 1 else ''} put back, {', '.join(layers)}"] if layers else []
        return "; ".join(said)


def export_repaired(
    model: str,
    output: str | Path,
    recipe: Recipe,
    *,
    gate: Gate | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,  # noqa: ANN401 - those of `export`
) -> tuple[Artifact, Repair | None]:
    """Export, and while it fails its gate, export it again with its worst layers in higher precision.

    Of which part: each that is beyond its tolerance; where none is and pictures fail, the one nearest to it. Which
    layers: the one that `explain` finds at fault, in parts of floats, or all that overflow; else those whose narrowness
    alone moves the part's output most, measured in eager float32 on the recorded cases. What overflows between layers has
    no layer to put back: then the whole part becomes bf16.

    Args:
        model: as for `export`.
        output: as for `export`.
        recipe: to start from.
        gate: that is to be passed.
        progress: called with a line at each step.
        options: all others of `export`.

    Raises:
        ParityError: no choice of layers heals it: what is wrong isn't precision.
    """
    gate, target = gate or Gate(), Path(output)
    check_target(target, replace_existing=bool(options.get("force")))
    with scratch(target) as work:
        attempt = partial(export, model, gate=replace(gate, allow_failing=True), progress=progress)
        first = artifact = attempt(work / "0", recipe, **options)
        if first.manifest.proof["status"] == UNPROVED:
            raise ParityError(first.manifest.proof["reason"], fix="leave out --repair")
        reuse = [*options.pop("reuse", ()), first.folder]
        aims: dict[str, float] = {}
        with source_of(first, model, options.get("config"), loras=options.get("loras", ())) as source:
            for number in range(1, _MOST_ROUNDS + 1):
                failing = _failing(artifact)
                if not failing:
                    break
                aims |= {name: _aim(allowed, aims.get(name), artifact, name) for name, allowed in failing.items()}
                found = {name: remedy(artifact, name, source, aims[name]) for name in failing}
                for name, each in found.items():
                    progress(f"{name} fails: {each.in_words()}")
                parts = {name: each.applied(recipe.parts.get(name, recipe.default)) for name, each in found.items()}
                recipe = replace(recipe, parts={**recipe.parts, **parts})
                artifact = attempt(work / str(number), recipe, reuse=reuse, **options)
                reuse = [artifact.folder, *reuse]
        repaired = _compare(first, artifact)
        if _failing(artifact):
            progress(
                f"{_MOST_ROUNDS} rounds of --repair weren't enough: give the part another precision, or a looser --budget"
            )
        final = export(model, target, recipe, gate=gate, progress=progress, reuse=reuse, **options)
    return final, repaired


def _failing(artifact: Artifact) -> dict[str, float]:
    """Return part -> error that it may come to, of the parts that have to err less.

    Raises:
        ParityError: pictures fail, and no part that they come through is narrower than float32.
    """
    proof = artifact.manifest.proof
    failing = {name: part["tolerance"] for name, part in proof["parts"].items() if part["problem"]}
    if failing or not proof["trajectory"].get("problem"):
        return failing
    narrow = [name for name, entry in artifact.manifest.parts.items() if name != NO_PICTURE and is_narrow(entry)]
    if not narrow:
        raise hopeless(proof["trajectory"]["problem"])
    nearest = max(narrow, key=lambda name: float(proof["parts"][name]["upper"] / proof["parts"][name]["tolerance"]))
    return {nearest: _LESS * reached(proof["parts"][nearest])}


def _aim(allowed: float, before: float | None, artifact: Artifact, part: str) -> float:
    """Return the error that a part is to be brought to: less than is allowed by as much as it missed what was aimed at before."""
    came_to = reached(artifact.manifest.proof["parts"][part])
    return allowed if before is None or not allowed < came_to < math.inf else before * allowed / came_to


def _compare(before: Artifact, after: Artifact) -> Repair | None:
    """Say what was put back, and what that costs; None if nothing was."""
    entries = {name: (before.manifest.parts[name], entry) for name, entry in after.manifest.parts.items()}
    whole = {name: new.precision for name, (old, new) in entries.items() if new.precision != old.precision}
    put_back = {
        name: {layer: each for layer, each in new.layers.items() if old.layers.get(layer) != each}
        for name, (old, new) in entries.items()
    }
    layers = {name: each for name, each in put_back.items() if each}
    changed = {*whole, *layers}
    if not changed:
        return None
    sizes = [sum(sum(each.manifest.parts[name].weight_bytes.values()) for name in changed) for each in (before, after)]
    return Repair(layers, whole, sizes[0], sizes[1], {name: _time_ratio(before, after, name) for name in changed})


def _time_ratio(before: Artifact, after: Artifact, part: str) -> float:
    """Run the largest recorded case of a part in both artifacts in turn; return the ratio of their medians."""
    cases = [given for given, _ in recorded(after, part).cases]
    inputs = max(cases, key=lambda case: sum(tensor.numel() for tensor in case.values()))
    times: tuple[list[float], list[float]] = ([], [])
    found = family_part(after, part)
    opened = [
        open_part(
            each.folder / part,
            found,
            each.manifest.parts[part],
            judged_on(each).of(part),
            vouched=each.vouched(part),
        )
        for each in (before, after)
    ]
    for turn in range(_REPEATS + 1):
        for runtime, taken in zip(opened, times, strict=True):
            started = time.perf_counter()
            runtime.run(fed(runtime, inputs))
            if turn:
                taken.append(time.perf_counter() - started)
    for runtime in opened:
        runtime.close()
    return median(times[1]) / median(times[0]) if median(times[0]) else math.nan
