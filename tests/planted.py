"""Experiments whose truth is known: timings as real machines give them, with a planted ratio."""

from __future__ import annotations

import numpy as np

REPETITIONS = 5


def experiment(rng, ratios, blocks, *, stalls=False, process=0.01, repetition=0.01, drift=0.01):
    """Return {arm: blocks of repetitions}: each block runs every arm once in random order, on one drifting clock."""
    arms = list(ratios)
    level = 0.0
    timed = {arm: [] for arm in arms}
    for _ in range(blocks):
        for arm in rng.permutation(arms):
            level += rng.normal(0, drift)
            base = np.log(ratios[arm]) + level + rng.normal(0, process)
            samples = np.exp(base + repetition * rng.standard_t(3, REPETITIONS))
            if stalls:
                samples = np.where(rng.random(REPETITIONS) < 0.03, samples * rng.uniform(3, 10, REPETITIONS), samples)
            timed[arm].append(samples.tolist())
    return timed
