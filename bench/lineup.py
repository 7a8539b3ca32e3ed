"""Who runs: the declared arms and those that the experiment adds, at every point of its sweep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import MANIFEST, Artifact
from ..recipe import read
from ..reports.record import ADDED, AGAIN, FLOOR_BF16, FLOOR_FP32, REFERENCE, entry_name
from .experiment import Arm

if TYPE_CHECKING:
    from .experiment import Experiment

UNTIMED = ADDED - {AGAIN}
"""Arms that are there for their pictures alone."""
_HALF = frozenset({"bf16", "fp16"})


@dataclass(frozen=True)
class Entry:
    """An arm at a point of the sweep."""

    name: str
    arm: Arm
    point: str
    experiment: Experiment
    shares: str | None = None
    """The entry whose pictures are this one's, too: it is the same arm under another name."""


def lineup(declared: Experiment) -> list[Arm]:
    """Return the declared arms and the added ones.

    Added are the baseline again, the reference, the reference again with other threads and batches (the floor of
    fp32), and torch's own bf16 where an arm has half precision.
    """
    named = {arm.name: arm for arm in declared.arms}
    reference = named.get(declared.reference) or Arm(declared.reference, recipe=declared.reference)
    added = [
        replace(named[declared.baseline], name=AGAIN),
        replace(reference, name=REFERENCE),
        replace(reference, name=FLOOR_FP32),
    ]
    if any(precisions(arm) & _HALF for arm in declared.arms):
        added.append(Arm(FLOOR_BF16, recipe="torch:bf16"))
    return [*declared.arms, *added]


def entries(declared: Experiment) -> list[Entry]:
    """Return every arm at every point."""
    same = {AGAIN: declared.baseline}
    if declared.reference in {arm.name for arm in declared.arms}:
        same[REFERENCE] = declared.reference
    return [
        Entry(
            entry_name(arm.name, point),
            arm,
            point,
            experiment,
            shares=entry_name(same[arm.name], point) if arm.name in same else None,
        )
        for point, experiment in declared.points().items()
        for arm in lineup(declared)
    ]


def precisions(arm: Arm) -> set[str]:
    """Return what an arm says it runs in; empty where it doesn't say."""
    if arm.precision:
        return {arm.precision}
    if arm.recipe:
        recipe, _ = read(arm.recipe)
        parts = (recipe.default, *recipe.parts.values())
        return {each for part in parts for each in (part.precision, *part.layers.values())}
    if arm.folder and not arm.adapter and (Path(arm.folder) / MANIFEST).is_file():
        baked = Artifact.open(Path(arm.folder)).manifest.parts.values()
        return {each for entry in baked for each in entry.precisions}
    return set()
