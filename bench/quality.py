"""What an arm's pictures are worth: near the reference's (T1), and showing what their prompts say (T2)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import UnavailableError
from ..pictures import drift, likeness, missing
from .metrics import open_metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8]


def figures_of_all(
    pairs: list[list[dict[str, str | None]]],
    prompts: list[str],
    scorer: bool,  # noqa: FBT001 - called by name, from JSON
    metrics: dict[str, str],
    threads: int,
) -> list[dict[str, Any]]:
    """Return the figures of each pair, reference and arm: files of pictures and of latents after each step.

    Runs in a child process. `metrics` are names and weights.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before what counts cores is imported
    import numpy as np

    opened = [open_metric(name, weights) for name, weights in metrics.items()]
    found = []
    for reference, arm in pairs:
        expected, got = (np.load(str(side["pictures"])) for side in (reference, arm))
        told = figures(expected, got, prompts, scorer=scorer)
        if "problem" not in told:
            told["metrics"] = {metric.name: metric.values(expected, got, prompts) for metric in opened}
        if reference["steps"] and arm["steps"]:
            told["trajectory"] = drift(np.load(reference["steps"]), np.load(arm["steps"]))
        found.append(told)
    return found


def check_metrics(metrics: dict[str, str]) -> None:
    """Open each metric's weights; raises what `open_metric` does. Runs in a child process."""
    for name, weights in metrics.items():
        open_metric(name, weights)


def figures(expected: Pictures, got: Pictures, prompts: list[str], *, scorer: bool) -> dict[str, Any]:
    """Return the figures of pictures (N, H, W, 3) against a reference's: in each list one entry a prompt."""
    lacking = missing()
    if lacking:
        raise UnavailableError("; ".join(f"{name}: {why}" for name, why in lacking.items()))
    told = likeness(expected, got)
    if scorer and "problem" not in told:
        told["right"] = _right(prompts, got)
    return told


def _right(prompts: list[str], pictures: Pictures) -> list[bool]:
    from ..models.scorer import score

    return [score(prompt, picture).right for prompt, picture in zip(prompts, pictures, strict=True)]
