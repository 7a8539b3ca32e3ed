"""What pictures of an artifact show of their prompts, against eager float32's: the embedded model's scorer over many prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import Artifact
from ..errors import UnavailableError, UsageError
from ..memory import in_child
from ..models.prompts import read_prompts
from ..reports.gates import LOST_POINTS, LOST_PROMPTS
from ..runtimes.engine import Engine
from ..runtimes.opening import judged_on, of_artifact
from ..sources.source import EMBEDDED
from . import trajectory
from .drawing import open_source
from .origin import folders_of, origin_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..sources.source import Source

PROMPTS = "shapes-1024"
STEPS = 8
_BATCH = 16
_FEWEST = 2


def judge(artifact: Artifact, source: Source, count: int) -> dict[str, Any]:
    """Draw prompts of `shapes-1024` with an artifact and with eager float32, and score both, in a child process.

    Args:
        artifact: of the embedded model.
        source: the embedded model, with LoRAs where the artifact has them.
        count: how many prompts.

    Returns:
        Shares that are right, the paired difference in points with its 95 % interval, the gate's limit and whether it
        `holds`: None where the recipe has no such gate, or below 1,024 prompts.

    Raises:
        UnavailableError: there is no scorer for this model.
        UsageError: too few prompts for an interval.
    """
    if artifact.manifest.source["id"] not in EMBEDDED:
        message = f"there is a scorer for {', '.join(EMBEDDED)} alone, and this is {artifact.manifest.source['id']}"
        raise UnavailableError(message, fix="bakeoff bench takes semantic metrics for other models")
    if count < _FEWEST:
        message = f"got {count} prompts for the scorer, expected {_FEWEST} at least, and {LOST_PROMPTS} for the gate"
        raise UsageError(message)
    arguments = {"folder": str(artifact.folder), **folders_of(source), "count": count}
    found, _ = in_child("bakeoff.parity.meaning:judge_here", arguments)
    return {**found, **_gate(trajectory.precisions(artifact), found, count)}


def _gate(kinds: set[str], found: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the limit on lost points of low bits, and whether the interval keeps it; over enough prompts."""
    limits = [LOST_POINTS[kind] for kind in kinds if kind in LOST_POINTS]
    if not limits:
        return {"limit": None, "holds": None}
    return {"limit": -max(limits), "holds": found["low"] >= -max(limits) if count >= LOST_PROMPTS else None}


def judge_here(folder: str, source: str, elsewhere: Mapping[str, str], count: int) -> dict[str, Any]:
    """Draw and score in this process; runs in the child of `judge`."""
    import numpy as np
    import torch

    from ..verdict import mean_interval

    texts = [prompt.text for prompt in read_prompts(PROMPTS, count)]
    artifact = Artifact.open(Path(folder))
    with open_source(origin_of(artifact, source, elsewhere)) as engine:
        theirs = _right(engine, texts)
    with Engine(of_artifact(artifact), judged_on(artifact, torch.get_num_threads())) as engine:
        mine = _right(engine, texts)
    difference = np.subtract(mine, theirs, dtype=float) * 100
    mean, low, high = mean_interval(list(difference))
    return {
        "prompts": count,
        "steps": STEPS,
        "right": float(np.mean(mine)),
        "right_fp32": float(np.mean(theirs)),
        "difference": mean,
        "low": low,
        "high": high,
    }


def _right(engine: Engine, texts: list[str]) -> list[bool]:
    """Draw each prompt on noise of its own, and say which pictures show all of it."""
    from ..models.scorer import score

    found = []
    for first in range(0, len(texts), _BATCH):
        some = texts[first : first + _BATCH]
        drawn = engine.generate(some, seeds=first, steps=STEPS, max_batch=_BATCH).images
        found += [score(text, picture).right for text, picture in zip(some, drawn, strict=True)]
    return found


def problem_of(told: Mapping[str, Any]) -> str | None:
    """Say by how much pictures lose what they are to show, if that fails the gate."""
    if told["holds"] is not False:
        return None
    return f"the scorer's points: {_interval(told)}, at least {told['limit']:g} is asked for"


def in_words(told: Mapping[str, Any]) -> str:
    """Return the scorer's verdict as a line of text."""
    line = (
        f"scorer: {told['right']:.1%} right, eager fp32 {told['right_fp32']:.1%}, over {told['prompts']} prompts of "
        f"{PROMPTS}: {_interval(told)}"
    )
    if told["limit"] is None:
        return f"{line}; no gate for this recipe"
    if told["holds"] is None:
        return f"{line}; the gate ({told['limit']:g}, at the lower bound) needs {LOST_PROMPTS} prompts"
    return f"{line}; gate {told['limit']:g}, at the lower bound: {'passes' if told['holds'] else 'fails'}"


def _interval(told: Mapping[str, Any]) -> str:
    return f"{told['difference']:+.2f} points [{told['low']:+.2f}, {told['high']:+.2f}]"
