"""Whether an arm's pictures are good enough for its speed to count: limits on intervals, not on points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pictures import decibels
from ..verdict import mean_interval

if TYPE_CHECKING:
    from collections.abc import Iterable

FP32_PSNR_DB = 45.0
HALF_GATE, MEANING_GATE = "half precision", "meaning"
HALF_FLIP = 1.5
"""Most mean ꟻLIP of a bf16 or fp16 arm, as a multiple of torch's own bf16."""
LOST_POINTS = {"int8": 2.0, "fp8": 2.5, "w8a8": 2.5, "w8a8-dynamic": 2.5, "nf4": 5.0, "int4": 8.0}
"""Most points of the scorer that a quantized arm may lose, at the lower bound of the paired difference."""
LOST_PROMPTS = 1024
"""Fewest prompts for that bound to be meant."""
_HALF = {"bf16", "fp16"}
SAMPLE_DB = 50.0
"""Least PSNR of a timed picture to the same prompt's in the quality run."""
CACHED_RATIO = 0.9
"""A prompt given again that surely takes less than this share of a new prompt's time comes from a cache."""


@dataclass(frozen=True)
class Gate:
    """One condition: what it is, whether it holds (None: can't be said), and the figures."""

    name: str
    holds: bool | None
    detail: str


def gates(
    precisions: Iterable[str],
    figures: dict[str, Any],
    reference: dict[str, Any] | None,
    floor: dict[str, Any] | None,
    runs: list[dict[str, Any]],
    semantic: tuple[str, float] | None = None,
) -> list[Gate]:
    """Judge an entry by its figures, those of eager fp32 and of torch's bf16, and its timed runs.

    `semantic` names the metric that says what pictures mean where the scorer can't, and what makes its values points.
    """
    if "problem" in figures:
        return [Gate("size", holds=False, detail=figures["problem"])]
    flat = sum(figures["flat"])
    found = [Gate("pictures", holds=not flat, detail=f"{flat} of {len(figures['flat'])} are of one colour")]
    found += _by_precision(set(precisions), figures, reference, floor, semantic)
    return found + _by_runs(runs)


def _by_precision(
    precisions: set[str],
    figures: dict[str, Any],
    reference: dict[str, Any] | None,
    floor: dict[str, Any] | None,
    semantic: tuple[str, float] | None,
) -> list[Gate]:
    quantized = precisions & set(LOST_POINTS)
    if quantized:
        return [_lost_points(max(LOST_POINTS[name] for name in quantized), figures, reference, semantic)]
    if precisions & _HALF:
        return [_near_floor(figures, floor)]
    worst = min(figures["psnr_db"])
    return [
        Gate("fp32", holds=worst >= FP32_PSNR_DB, detail=f"worst PSNR {decibels(worst)}, at least {FP32_PSNR_DB:g} dB")
    ]


def _near_floor(figures: dict[str, Any], floor: dict[str, Any] | None) -> Gate:
    """Judge the mean ꟻLIP by torch's own of the same pictures: paired, since pictures differ more than what drew them."""
    if floor is None or len(figures["flip"]) < 2:  # noqa: PLR2004
        return Gate(HALF_GATE, holds=None, detail="torch's own bf16 wasn't measured on two or more prompts")
    mine, theirs = np.asarray(figures["flip"]), np.asarray(floor["flip"])
    mean, most = float(mine.mean()), HALF_FLIP * float(theirs.mean())
    if figures["flip"] == floor["flip"]:
        return Gate(HALF_GATE, holds=True, detail=f"the same as torch's own bf16 (mean ꟻLIP {mean:.4f})")
    _, _, high = mean_interval(list(mine - HALF_FLIP * theirs))
    detail = f"mean ꟻLIP {mean:.4f}, at most {most + high:.4f} with 95 % confidence; limit {most:.4f}"
    return Gate(HALF_GATE, holds=high <= 0, detail=detail)


def _lost_points(
    most: float, figures: dict[str, Any], reference: dict[str, Any] | None, semantic: tuple[str, float] | None
) -> Gate:
    mine, theirs = (_points(each, semantic) for each in (figures, reference or {}))
    if mine is None or theirs is None:
        return Gate(MEANING_GATE, holds=None, detail="no scorer for this model: name a semantic metric and its weights")
    lost = np.subtract(mine, theirs)
    if len(lost) < LOST_PROMPTS:
        detail = f"{len(lost)} prompts, at least {LOST_PROMPTS} needed (difference {lost.mean():+.1f} points)"
        return Gate(MEANING_GATE, holds=None, detail=detail)
    mean, low, _ = mean_interval(list(lost))
    detail = f"{mean:+.2f} points, at least {low:+.2f}; limit {-most:g}"
    if low > most:
        return Gate(MEANING_GATE, holds=None, detail=f"{detail}: better than what it was made from, by more than that")
    return Gate(MEANING_GATE, holds=low >= -most, detail=detail)


def _points(figures: dict[str, Any], semantic: tuple[str, float] | None) -> list[float] | None:
    if "right" in figures:
        return [100.0 * right for right in figures["right"]]
    if semantic and semantic[0] in figures.get("metrics", {}):
        return [semantic[1] * value for value in figures["metrics"][semantic[0]]]
    return None


def _by_runs(runs: list[dict[str, Any]]) -> list[Gate]:
    near = [run["sample_db"] for run in runs if run["sample_db"] is not None]
    found = []
    if near:
        detail = f"timed pictures against the judged ones: {decibels(min(near))}"
        found.append(Gate("same artifact", holds=min(near) >= SAMPLE_DB, detail=detail))
    ratios = [float(np.median(run["same_prompt_s"]) / np.median(run["samples_s"])) for run in runs]
    if ratios:
        high = _highest(ratios)  # a cache answers in every block, noise doesn't
        detail = f"the same prompt again takes {np.mean(ratios):.2f} of another's time, at most {high:.2f}"
        found.append(Gate("no prompt cache", holds=high >= CACHED_RATIO, detail=detail))
    return found


def _highest(ratios: list[float]) -> float:
    """Return the upper end of the 95 % interval of blocks' ratios; of one block, its ratio.

    Not of their logarithms: an answer from a cache takes next to nothing, and next to nothing varies severalfold.
    """
    return mean_interval(ratios)[2] if len(ratios) > 1 else ratios[0]
