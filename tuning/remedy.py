"""What to put back in higher precision of a part that fails its gate: layers, or all of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..artifact import Artifact
from ..errors import ParityError, UnavailableError
from ..exporters.exporter import BoundExporter
from ..exporters.torch import CODES
from ..memory import in_child
from ..parity.causes import LARGEST_FLOAT16, NOT_FINITE, OVERFLOW
from ..parity.distance import measure
from ..parity.explain import explain
from ..parity.origin import folders_of, origin_of
from ..parity.proof import as_baked, eager, family_part, mixture_of, names_in, recorded, scales_of
from ..parity.traces import Eager
from ..quantize.mixture import replaced, rounded_layers

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from contextlib import AbstractContextManager

    from torch import nn

    from ..artifact import PartEntry
    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..recipe import PartRecipe
    from ..sources.source import Source

_MARGIN = 0.9
"""Share of the budget that a prediction may use."""
_NARROW = {"fp16": "float16", "bf16": "bfloat16"}
_AS_FAR_AS_FLOAT32 = ("bf16", "fp32")
"""What overflows no sooner than float32, the smaller first."""
_HALF = "half"
_COMPUTE = "compute"
"""The option that says what a part computes in, beside its precision."""


@dataclass(frozen=True)
class Remedy:
    """What is put back of one part."""

    layers: Mapping[str, str] = field(default_factory=dict)
    """Layer -> its precision from now on."""
    whole: str | None = None
    """The part's precision from now on, where what overflows belongs to no layer, or no layer with codes is left: the others
    have it, too."""

    def applied(self, recipe: PartRecipe) -> PartRecipe:
        if self.whole is None:
            others = {name: each for name, each in recipe.layers.items() if name not in self.layers}
            return replace(recipe, layers={**others, **self.layers})  # behind patterns, of which the last one counts
        options = {name: value for name, value in recipe.options.items() if name not in {_COMPUTE, CODES}}
        wide = {name: each for name, each in {**recipe.layers, **self.layers}.items() if each == "fp32" != self.whole}
        return replace(recipe, precision=self.whole, layers=wide, options=options)

    def in_words(self) -> str:
        if self.whole is None:
            return f"putting back {', '.join(self.layers)}"
        if self.layers:
            return f"{self.whole} for all of it, since the last layers with codes would be put back"
        return f"{self.whole} for all of it, since what lies between its layers overflows in float16"


def remedy(artifact: Artifact, part: str, source: Source, aim: float) -> Remedy:
    """Choose what to put back of a part that is to come to an error of `aim`.

    What `explain` finds at fault in a part of floats; else the layers whose narrowness alone moves the part's output most.

    Raises:
        ParityError: nothing would help.
    """
    entry, proof = artifact.manifest.parts[part], artifact.manifest.proof["parts"][part]
    found = _blamed(artifact, part, source) if proof["problem"] and not mixture_of(entry).formats else None
    if not found and is_narrow(entry):
        arguments = {"folder": str(artifact.folder), "part": part, **folders_of(source)}
        (errors, widths, coded), _ = in_child("bakeoff.tuning.remedy:rank_here", arguments)
        worst = _worst(errors, reached(proof), aim)
        found = _put_back({layer: widths[layer] for layer in worst}, coded) if worst else None
    if not found and entry.precision == "fp16" and not math.isfinite(largest_error(proof)):
        found = Remedy(whole=_as_far_as_float32(entry))  # what overflows can't be seen, or is no layer's
    if not found:
        raise hopeless(proof["problem"] or artifact.manifest.proof["trajectory"]["problem"])
    return found


def _put_back(layers: Mapping[str, str], coded: Collection[str]) -> Remedy:
    """Put layers back -> in what; of a part in which none of those with codes is left then, all."""
    last = bool(coded) and layers.keys() >= {*coded}
    return Remedy(layers, layers[next(iter(coded))] if last else None)


def hopeless(problem: str) -> ParityError:
    message = f"{problem}; no layer in higher precision would mend it"
    return ParityError(message, fix="export with --allow-failing, then bakeoff verify DIR --explain --source MODEL")


def largest_error(proof: Mapping[str, Any]) -> float:
    """Return the largest relative error of a part's cases, from its proof; infinity if it has none."""
    return max((float(case["error"]) for case in proof["cases"]), default=math.inf)


def reached(proof: Mapping[str, Any]) -> float:
    """Return what is held against a part's tolerance: its largest error or the end of its rows' interval, whichever is more."""
    largest, upper = largest_error(proof), float(proof["upper"])
    return max(largest, upper) if math.isfinite(upper) else largest


def is_narrow(entry: PartEntry) -> bool:
    return entry.precision != "fp32" or not mixture_of(entry).is_plain


def _worst(errors: Mapping[str, float], measured: float, allowed: float) -> list[str]:
    """Return the fewest layers without whose errors the others stay within what is allowed, as far as can be predicted.

    If some break the part alone, these; none, if the part is broken and no layer breaks it alone, or none errs at all.

    Args:
        errors: layer -> relative error of the part's output with this layer alone rounded.
        measured: relative error of the part as it is.
        allowed: the part's budget.
    """
    broken = [name for name, error in errors.items() if not math.isfinite(error)]
    if broken or not math.isfinite(measured) or not any(errors.values()):
        return broken
    squares = {name: error**2 for name, error in sorted(errors.items(), key=lambda item: -item[1])}
    total = sum(squares.values())
    left, scale = total, measured**2 / total
    chosen: list[str] = []
    for name, square in squares.items():
        if chosen and left * scale <= (_MARGIN * allowed) ** 2:
            break
        chosen.append(name)
        left -= square
    return chosen


def _blamed(artifact: Artifact, part: str, source: Source) -> Remedy | None:
    """Put back the layer that `explain` finds at fault; if it overflows, all that do; all of the part, if no layer does."""
    found = next((each for each in explain(artifact, source) if each.part == part and each.fault and each.layer), None)
    if found is None:
        return None
    entry = artifact.manifest.parts[part]
    overflows = found.cause in {OVERFLOW, NOT_FINITE} and entry.precision == "fp16"
    entries, mixture = source.checkpoint(family_part(artifact, part).module).entries, mixture_of(entry)
    if f"{found.layer}.weight" in entries:
        layers = {str(found.layer), *(_beyond_float16(artifact, part, source) if overflows else ())}
        wider = {layer: "fp32" for layer in sorted(layers) if mixture.precision_of(layer) != "fp32"}
        if wider:
            return Remedy(wider)
    return Remedy(whole=_as_far_as_float32(entry)) if overflows else None


def _beyond_float16(artifact: Artifact, part: str, source: Source) -> set[str]:
    """Return the layers that take or make more in eager float32 than float16 holds, in any recorded case."""
    seen = Eager(family_part(artifact, part), source)
    peaks = [seen.peaks(given) for given, _ in recorded(artifact, part).cases]
    return {layer for each in peaks for layer, peak in each.items() if peak > LARGEST_FLOAT16}


def _as_far_as_float32(entry: PartEntry) -> str:
    """Return the least precision of the part's backend whose numbers go as far as float32's, that it has here."""
    exporter = plugins.exporter(entry.backend)
    for precision in _AS_FAR_AS_FLOAT32:
        try:
            if isinstance(exporter, BoundExporter):
                exporter.check(precision, {})
        except UnavailableError:
            continue
        if precision in exporter.precisions:
            return precision
    return "fp32"


def rank_here(
    folder: str, source: str, part: str, elsewhere: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, str], list[str]]:
    """Return what each narrow layer of a part costs, and what it would be put back in; in a child process.

    Returns:
        Layer -> relative error of the part's output with this layer alone as narrow as it is; layer -> bf16, or what else
        the part computes in, where it has codes, fp32 where it is of two bytes, be it beside codes. Layers for which the
        backend has no wider precision are left out, and norms that it computes in float32 anyway. And those with codes.
    """
    import torch

    artifact = Artifact.open(Path(folder))
    origin = origin_of(artifact, source, elsewhere)
    found = family_part(artifact, part)
    flat = found.component.flat(found.component.load(origin.path(found.module), torch.float32))
    config, baked, entry = origin.config(found.module), artifact.folder / part, artifact.manifest.parts[part]
    mixture, scales = as_baked(entry, baked), scales_of(baked)
    exporter = plugins.exporter(entry.backend)
    possible, wide_norms = exporter.layer_precisions.get(entry.precision, ()), getattr(exporter, "wide_norms", False)
    computed = entry.key_fields["recipe"].get("options", {}).get(_COMPUTE)
    beside = computed if computed in possible else "bf16"
    stored = plugins.runtime(entry.backend).widens and computed != _HALF
    cases = recorded(artifact, part).cases
    errors, widths, coded = {}, {}, []
    for path, name in names_in(flat, origin.checkpoint(found.module)).items():
        layer = flat.get_submodule(path)
        has_codes = _has_codes(layer, name, mixture)
        wide = beside if has_codes else "fp32"
        shapes = [weight.shape for weight in layer.parameters(recurse=False)]
        is_norm = all(len(shape) == 1 for shape in shapes)
        if wide not in possible or not shapes or (is_norm and wide_norms):
            continue
        alone = _alone(flat, path, name, mixture, scales, beside=beside, stored=stored)
        if alone is None:
            continue
        widths[name] = wide
        coded += [name] if has_codes else []
        with alone:
            errors[name] = max(
                measure(eager(found.component, flat, config, given), expected, {}).error for given, expected in cases
            )
    return errors, widths, coded


def _has_codes(layer: Any, name: str, mixture: Mixture) -> bool:  # noqa: ANN401 - a layer, with a weight or without
    weight = getattr(layer, "weight", None)
    return weight is not None and bool(mixture.formats) and mixture.obstacle(name, weight.shape) is None


def _alone(
    module: nn.Module,
    path: str,
    name: str,
    mixture: Mixture,
    scales: Mapping[str, Grids],
    *,
    beside: str = "bf16",
    stored: bool = False,
) -> AbstractContextManager[None] | None:
    """Let one layer of a module be as narrow as it is to be, for the while; None where that isn't narrow.

    Args:
        module: in float32.
        path: of the layer.
        name: its, in the checkpoint.
        mixture: as it was baked.
        scales: of activations.
        beside: what layers without codes are in, in a part that has codes.
        stored: whether two bytes are what weights lie in alone.
    """
    layer, precision = module.get_submodule(path), mixture.precision_of(name)
    if _has_codes(layer, name, mixture):
        return rounded_layers(module, {path: name}, mixture, scales)
    dtype = _NARROW.get(beside if precision in mixture.formats else precision)
    return replaced(module, {path: _in_dtype(layer, dtype, stored=stored)}) if dtype else None


def _in_dtype(layer: nn.Module, dtype: str, *, stored: bool) -> nn.Module:
    """Return a copy of a layer that computes in a dtype, or has its weights stored in it; it takes and gives float32."""
    import torch

    def narrowed(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.to(getattr(torch, dtype)) if each.is_floating_point() else each for each in given)

    copied = copy.deepcopy(layer).to(getattr(torch, dtype))
    if stored:
        return copied.float()
    copied.register_forward_pre_hook(narrowed)
    copied.register_forward_hook(lambda *call: call[-1].float())
    return copied
