"""`bakeoff export --repair`: put back as few layers as needed in higher precision for an export to pass its gate."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..artifact import Artifact, check_target, scratch
from ..bake import export
from ..errors import ParityError
from ..memory import in_child
from ..parity.budget import Gate
from ..parity.distance import measure
from ..parity.explain import explain
from ..parity.origin import folders_of, origin_of, source_of
from ..parity.proof import as_baked, eager, family_part, fed, mixture_of, names_in, recorded, scales_of
from ..parity.prover import UNPROVED
from ..parity.trajectory import NO_PICTURE
from ..quantize.mixture import replaced, rounded_layers
from ..runtimes.opening import judged_on, open_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import nn

    from ..artifact import PartEntry
    from ..parity.explain import Explanation
    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..recipe import PartRecipe, Recipe
    from ..sources.source import Source

_MOST_ROUNDS = 8
_MARGIN = 0.9
"""Share of the budget that a prediction may use."""
_NARROW = {"fp16": "float16", "bf16": "bfloat16"}
_LESS = 0.5
"""Share of its error that the part nearest to its tolerance may keep, where each part passes and pictures fail."""
_REPEATS = 15


@dataclass(frozen=True)
class Repair:
    """What it took to pass."""

    layers: Mapping[str, Mapping[str, str]]
    """Part -> layer that was put back -> its precision now."""
    bytes_before: int
    bytes_after: int
    """Of the weights of the parts that were repaired."""
    time_ratio: Mapping[str, float]
    """Part -> time of a run of its largest recorded case, to that before: medians of runs in turn, a rough figure."""

    def in_words(self) -> list[str]:
        more = self.bytes_after - self.bytes_before
        lines = [
            f"repaired {part}: {len(layers)} layer{'s' if len(layers) > 1 else ''} put back, {', '.join(layers)}: "
            f"{self.time_ratio[part]:.2f} × the time"
            for part, layers in self.layers.items()
        ]
        return [*lines, f"repairs took {more / 1e6:.2f} MB more of weights ({self.bytes_after / 1e6:.2f} MB)"]


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
    layers: the one that `explain` finds at fault, in parts of floats; else those whose narrowness alone moves the part's
    output most, measured in eager float32 on the recorded cases.

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
                wider = {name: _wider_layers(artifact, name, source, aims[name]) for name in failing}
                recipe = _with_layers(recipe, wider)
                for name, layers in wider.items():
                    progress(f"{name} fails: putting back {', '.join(layers)}")
                artifact = attempt(work / str(number), recipe, reuse=reuse, **options)
                reuse = [artifact.folder, *reuse]
        repaired = _compare(first, artifact)
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
    narrow = [name for name, entry in artifact.manifest.parts.items() if name != NO_PICTURE and _is_narrow(entry)]
    if not narrow:
        raise _hopeless(proof["trajectory"]["problem"])
    nearest = max(narrow, key=lambda name: float(proof["parts"][name]["upper"] / proof["parts"][name]["tolerance"]))
    return {nearest: _LESS * _largest_error(proof["parts"][nearest])}


def _aim(allowed: float, before: float | None, artifact: Artifact, part: str) -> float:
    """Return the error that a part is to be brought to: less than is allowed by as much as it missed what was aimed at before."""
    came_to = _largest_error(artifact.manifest.proof["parts"][part])
    return allowed if before is None or not allowed < came_to < math.inf else before * allowed / came_to


def _is_narrow(entry: PartEntry) -> bool:
    return entry.precision != "fp32" or not mixture_of(entry).is_plain


def _largest_error(proof: Mapping[str, Any]) -> float:
    return max((float(case["error"]) for case in proof["cases"]), default=math.inf)


def _hopeless(problem: str) -> ParityError:
    message = f"{problem}; no layer in higher precision would mend it"
    return ParityError(message, fix="export with --allow-failing, then bakeoff verify DIR --explain --source MODEL")


def _wider_layers(artifact: Artifact, part: str, source: Source, aim: float) -> dict[str, str]:
    """Choose layers to put back of a part that is to come to an error of `aim`.

    Raises:
        ParityError: none would help.
    """
    entry, proof = artifact.manifest.parts[part], artifact.manifest.proof["parts"][part]
    mixture = mixture_of(entry)
    blamed = _blamed(artifact, part, source) if proof["problem"] and not mixture.formats else []
    wider = {layer: "fp32" for layer in blamed if mixture.precision_of(layer) != "fp32"}
    if not wider and _is_narrow(entry):
        arguments = {"folder": str(artifact.folder), "part": part, **folders_of(source)}
        (errors, widths), _ = in_child("bakeoff.tuning.repair:rank_here", arguments)
        wider = {layer: widths[layer] for layer in _worst(errors, _largest_error(proof), aim)} if errors else {}
    if not wider:
        raise _hopeless(proof["problem"] or artifact.manifest.proof["trajectory"]["problem"])
    return wider


def _worst(errors: Mapping[str, float], measured: float, allowed: float) -> list[str]:
    """Return the fewest layers without whose errors the others stay within what is allowed, as far as can be predicted.

    If some break the part alone, these.

    Args:
        errors: layer -> relative error of the part's output with this layer alone rounded.
        measured: relative error of the part as it is.
        allowed: the part's budget.
    """
    broken = [name for name, error in errors.items() if not math.isfinite(error)]
    if broken:
        return broken
    squares = {name: error**2 for name, error in sorted(errors.items(), key=lambda item: -item[1])}
    total = sum(squares.values())
    left, scale = total, measured**2 / total if total else math.inf
    chosen: list[str] = []
    for name, square in squares.items():
        if chosen and left * scale <= (_MARGIN * allowed) ** 2:
            break
        chosen.append(name)
        left -= square
    return chosen


def _blamed(artifact: Artifact, part: str, source: Source) -> list[str]:
    """Return the layer that `explain` finds at fault; none where that lies between layers, which no recipe names."""
    found: list[Explanation] = explain(artifact, source)
    entries = source.checkpoint(family_part(artifact, part).module).entries
    return [
        each.layer
        for each in found
        if each.part == part and each.layer and each.fault and f"{each.layer}.weight" in entries
    ]


def rank_here(
    folder: str, source: str, part: str, elsewhere: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return what each narrow layer of a part costs, and what it would be put back in; in a child process.

    Returns:
        Layer -> relative error of the part's output with this layer alone as narrow as it is; layer -> bf16 where it has
        codes, fp32 where it is of two bytes. Layers for which the backend has no wider precision are left out.
    """
    import torch

    artifact = Artifact.open(Path(folder))
    origin = origin_of(artifact, source, elsewhere)
    found = family_part(artifact, part)
    flat = found.component.flat(found.component.load(origin.path(found.module), torch.float32))
    config, baked, entry = origin.config(found.module), artifact.folder / part, artifact.manifest.parts[part]
    mixture, scales = as_baked(entry, baked), scales_of(baked)
    possible = plugins.exporter(entry.backend).layer_precisions.get(entry.precision, ())
    cases = recorded(artifact, part).cases
    errors, widths = {}, {}
    for path, name in names_in(flat, origin.checkpoint(found.module)).items():
        alone, layer = _alone(flat, path, name, mixture, scales), flat.get_submodule(path)
        wide = "bf16" if _has_codes(layer, name, mixture) else "fp32"
        if alone and wide in possible and [*layer.parameters(recurse=False)]:
            widths[name] = wide
            with alone:
                errors[name] = max(
                    measure(eager(found.component, flat, config, given), expected, {}).error
                    for given, expected in cases
                )
    return errors, widths


def _has_codes(layer: Any, name: str, mixture: Mixture) -> bool:  # noqa: ANN401 - a layer, with a weight or without
    weight = getattr(layer, "weight", None)
    return weight is not None and bool(mixture.formats) and mixture.obstacle(name, weight.shape) is None


def _alone(
    module: nn.Module, path: str, name: str, mixture: Mixture, scales: Mapping[str, Grids]
) -> AbstractContextManager[None] | None:
    """Let one layer of a module be as narrow as it is to be, for the while; None where that isn't narrow."""
    if mixture.format_of(name):
        return rounded_layers(module, {path: name}, mixture, scales)
    dtype = _NARROW.get(mixture.precision_of(name))
    return replaced(module, {path: _in_dtype(module.get_submodule(path), dtype)}) if dtype else None


def _in_dtype(layer: nn.Module, dtype: str) -> nn.Module:
    """Return a copy of a layer that computes in a dtype, and takes and gives float32."""
    import torch

    def narrowed(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.to(getattr(torch, dtype)) if each.is_floating_point() else each for each in given)

    copied = copy.deepcopy(layer).to(getattr(torch, dtype))
    copied.register_forward_pre_hook(narrowed)
    copied.register_forward_hook(lambda *call: call[-1].float())
    return copied


def _with_layers(recipe: Recipe, wider: Mapping[str, Mapping[str, str]]) -> Recipe:
    parts: dict[str, PartRecipe] = dict(recipe.parts)
    for name, layers in wider.items():
        part = parts.get(name, recipe.default)
        parts[name] = replace(part, layers={**part.layers, **layers})
    return replace(recipe, parts=parts)


def _compare(before: Artifact, after: Artifact) -> Repair | None:
    """Say what was put back, and what that costs; None if nothing was."""
    put_back = {
        name: {k: v for k, v in entry.layers.items() if before.manifest.parts[name].layers.get(k) != v}
        for name, entry in after.manifest.parts.items()
    }
    layers = {name: each for name, each in put_back.items() if each}
    if not layers:
        return None
    sizes = [sum(sum(each.manifest.parts[name].weight_bytes.values()) for name in layers) for each in (before, after)]
    return Repair(layers, sizes[0], sizes[1], {name: _time_ratio(before, after, name) for name in layers})


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
