"""What repeated timings of several arms say: ratios with intervals, verdicts, and how many images pay for an export.

An experiment is a series of blocks; each block runs every arm once, in a process of its own, in random order, so that
what drifts hits all arms alike. A block's figure for an arm is the median of its repetitions; the comparison pairs
blocks. Method: t-intervals on log-ratios of paired block medians, Holm's correction (Holm, 1979) over several arms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95
LEAST_EFFECT = 0.02
"""No smaller change is called faster or slower, however sure."""
FEWEST_BLOCKS = 2
_MAD_TO_SIGMA = 1.4826
_OUTLYING = 3.5
"""Robust z-score beyond which a repetition is labelled (Iglewicz and Hoaglin, 1993)."""
PERCENTILE_SAMPLES = {90: 29, 95: 59, 99: 299}
"""Fewest samples with which a percentile is exceeded by at least one of them, with 95 % confidence."""


@dataclass(frozen=True)
class Ratio:
    """A geometric-mean ratio of paired block medians (arm / baseline), and its two-sided interval."""

    ratio: float
    low: float
    high: float
    blocks: int
    p: float
    """Of a two-sided t-test that the ratio is 1."""

    @property
    def half_width(self) -> float:
        """Half of the interval, as a share of the ratio."""
        return (self.high / self.low) ** 0.5 - 1

    @property
    def effect(self) -> float:
        """How far the ratio is from 1, either way, as a share."""
        return max(self.ratio, 1 / self.ratio) - 1


@dataclass(frozen=True)
class Verdict:
    """What may be said of an arm against the baseline."""

    ratio: Ratio
    word: str
    """`faster`, `slower` or `no difference shown`."""
    smallest_effect: float
    """The smallest change, as a share, that this experiment could have called."""


def paired_ratio(baseline: Sequence[Sequence[float]], arm: Sequence[Sequence[float]]) -> Ratio:
    """Compare two arms of one experiment: a sequence of blocks, each a sequence of repetitions in seconds.

    Raises:
        InputError: the arms have different numbers of blocks, fewer than two, or a time that isn't positive.
    """
    if len(baseline) != len(arm) or len(arm) < FEWEST_BLOCKS:
        message = f"got {len(baseline)} and {len(arm)} blocks, expected as many of both, and at least {FEWEST_BLOCKS}"
        raise InputError(message)
    return ratio_of(log_medians(arm) - log_medians(baseline))


def log_medians(blocks: Sequence[Sequence[float]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the logarithm of each block's median repetition.

    Raises:
        InputError: a block is empty, or has a time that isn't positive and finite.
    """
    if not all(len(block) and all(0 < value < math.inf for value in block) for block in blocks):
        message = "got a block without repetitions, or a time that isn't positive and finite"
        raise InputError(message)
    return np.log([float(np.median(block)) for block in blocks])


def ratio_of(differences: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Ratio:
    """Turn paired differences of logarithms into a ratio with its interval."""
    from scipy import stats

    count = len(differences)
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    score = abs(mean) / error if error else math.inf if mean else 0.0
    p = float(2 * stats.t.sf(score, count - 1))
    return Ratio(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), count, p)


def verdicts(ratios: Mapping[str, Ratio], floor: Ratio | None) -> dict[str, Verdict]:
    """Say of each arm what its ratio shows, corrected for how many arms are judged.

    `faster` or `slower` needs three things: Holm's test rejects equality, the interval excludes 1, and the effect
    exceeds 2 %, and both half of the interval of the baseline against itself (`floor`, where it was run) and how far that
    is from 1: as much comes of a process's luck, which resident ones keep.
    """
    least = max(LEAST_EFFECT, floor.half_width, floor.effect) if floor else LEAST_EFFECT
    rejected = _holm({name: ratio.p for name, ratio in ratios.items()})
    return {name: _verdict(ratio, least, certain=name in rejected) for name, ratio in ratios.items()}


def _verdict(ratio: Ratio, least: float, *, certain: bool) -> Verdict:
    excludes = not ratio.low <= 1 <= ratio.high
    called = certain and excludes and ratio.effect > least
    word = ("faster" if ratio.ratio < 1 else "slower") if called else "no difference shown"
    return Verdict(ratio, word, max(least, ratio.half_width))


def _holm(p_values: Mapping[str, float]) -> set[str]:
    """Return the hypotheses that Holm's step-down procedure rejects."""
    rejected: set[str] = set()
    for name in sorted(p_values, key=lambda name: p_values[name]):
        if p_values[name] > (1 - CONFIDENCE) / (len(p_values) - len(rejected)):
            break
        rejected.add(name)
    return rejected


def outliers(samples: Sequence[float]) -> list[bool]:
    """Label samples far from their median, by the median absolute deviation. They are labelled, never deleted."""
    values = np.asarray(samples, dtype=float)
    distance = np.abs(values - np.median(values))
    spread = _MAD_TO_SIGMA * float(np.median(distance))
    return [bool(far) for far in (distance > _OUTLYING * spread if spread else distance > 0)]


def percentile(samples: Sequence[float], percent: int) -> float | None:
    """Return a percentile, or None where there are too few samples to speak of it."""
    if len(samples) < PERCENTILE_SAMPLES[percent]:
        return None
    return float(np.percentile(samples, percent))


def break_even_images(
    baseline_setup_s: float, baseline_image_s: float, arm_setup_s: float, arm_image_s: float
) -> float | None:
    """Return after how many images an arm's setup has paid for itself: 0 if at once, None if never."""
    gain = baseline_image_s - arm_image_s
    cost = arm_setup_s - baseline_setup_s
    if cost <= 0 and gain >= 0:
        return 0.0
    return cost / gain if gain > 0 else None


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a share, of which `count` of `total` were seen (Wilson, 1927)."""
    from scipy import stats

    found = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of values and its two-sided 95 % t-interval.

    Raises:
        InputError: fewer than two values.
    """
    from scipy import stats

    if len(values) < FEWEST_BLOCKS:
        message = f"got {len(values)} values, expected at least {FEWEST_BLOCKS} for an interval"
        raise InputError(message)
    data = np.asarray(values, dtype=float)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(data) - 1) * data.std(ddof=1)) / math.sqrt(len(data))
    mean = float(data.mean())
    return mean, mean - reach, mean + reach
