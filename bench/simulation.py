"""Simulated experiments whose truth is known: what the verdicts are held to, without running anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..verdict import Verdict, paired_ratio, verdicts

if TYPE_CHECKING:
    from collections.abc import Mapping

REPETITIONS = 5
_PROCESS, _REPETITION, _DRIFT = 0.01, 0.01, 0.01
"""Noise as on real machines: of a process, of a repetition (Student's t, 3 degrees), and of a random walk, a slot."""
_STALL_SHARE, _STALLS = 0.03, (3, 10)


def experiment(
    rng: np.random.Generator, ratios: Mapping[str, float], blocks: int, *, stalls: bool = False
) -> dict[str, list[list[float]]]:
    """Return {arm: blocks of seconds}: each block runs every arm once in random order, on one drifting clock."""
    level = 0.0
    timed: dict[str, list[list[float]]] = {arm: [] for arm in ratios}
    for _ in range(blocks):
        for arm in rng.permutation(list(ratios)):
            level += rng.normal(0, _DRIFT)
            base = np.log(ratios[arm]) + level + rng.normal(0, _PROCESS)
            samples = np.exp(base + _REPETITION * rng.standard_t(3, REPETITIONS))
            if stalls:
                stalled = rng.random(REPETITIONS) < _STALL_SHARE
                samples = np.where(stalled, samples * rng.uniform(*_STALLS, REPETITIONS), samples)
            timed[str(arm)].append(samples.tolist())
    return timed


def outcomes(ratio: float, blocks: int, *, experiments: int, stalls: bool = False, seed: int = 0) -> list[Verdict]:
    """Simulate many experiments with an arm of a known ratio, and the baseline twice; return the arm's verdicts."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(experiments):
        timed = experiment(rng, {"base": 1.0, "again": 1.0, "arm": ratio}, blocks, stalls=stalls)
        floor = paired_ratio(timed["base"], timed["again"])
        found.append(verdicts({"arm": paired_ratio(timed["base"], timed["arm"])}, floor)["arm"])
    return found
