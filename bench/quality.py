"""What an arm's pictures are worth: near the reference's (T1), and showing what their prompts say (T2).

PSNR and SSIM (Wang and others, 2004) from torchmetrics, ꟻLIP (Andersson and others, 2020) from flip-evaluator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..pictures import psnr
from .metrics import open_metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8]

_FLATTEST = 1.0
"""Least standard deviation, in levels, of a picture that shows anything."""


def figures_of_all(
    pairs: list[list[dict[str, str | None]]],
    prompts: list[str],
    scorer: bool,  # noqa: FBT001 - called by name, from JSON
    metrics: dict[str, str],
) -> list[dict[str, Any]]:
    """Return the figures of each pair, reference and arm: files of pictures and of latents after each step.

    Runs in a child process. `metrics` are names and weights.
    """
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


def drift(expected: NDArray[np.float32], got: NDArray[np.float32]) -> list[float]:
    """Return how far latents (steps, B, …) are from the reference's after each step: relative root mean square.

    A drift grows from rounding step by step; a part that is broken is far off from the first step.
    """
    import numpy as np

    if expected.shape != got.shape:
        return []
    axes = tuple(range(1, expected.ndim))
    off, size = (np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=axes)) for x in (got - expected, expected))
    return [float(f"{value:.4g}") for value in off / size]


def figures(expected: Pictures, got: Pictures, prompts: list[str], *, scorer: bool) -> dict[str, Any]:
    """Return the figures of pictures (N, H, W, 3) against a reference's: in each list one entry a prompt."""
    if expected.shape != got.shape:
        return {"problem": f"pictures of {got.shape[1:3]}, expected {expected.shape[1:3]}"}
    told: dict[str, Any] = {
        "psnr_db": [round(psnr(a, b), 3) for a, b in zip(expected, got, strict=True)],
        "ssim": [round(_ssim(a, b), 5) for a, b in zip(expected, got, strict=True)],
        "flip": [round(_flip(a, b), 5) for a, b in zip(expected, got, strict=True)],
        "flat": [bool(picture.std() < _FLATTEST) for picture in got],
    }
    if scorer:
        told["right"] = _right(prompts, got)
    return told


def _right(prompts: list[str], pictures: Pictures) -> list[bool]:
    from ..models.scorer import score

    return [score(prompt, picture).right for prompt, picture in zip(prompts, pictures, strict=True)]


def _ssim(expected: Pictures, got: Pictures) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity: Any = structural_similarity_index_measure(_planes(got), _planes(expected), data_range=1.0)
    return float(similarity)


def _planes(picture: Pictures) -> Any:  # noqa: ANN401 - a tensor (1, 3, H, W) in [0, 1]
    import torch

    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def _flip(expected: Pictures, got: Pictures) -> float:
    """Return the mean ꟻLIP of two pictures: 0 equal, 1 as different as can be."""
    import flip_evaluator
    import numpy as np

    _, mean, _ = flip_evaluator.evaluate(
        expected.astype(np.float32) / 255, got.astype(np.float32) / 255, "LDR", inputsRGB=True, applyMagma=False
    )
    return float(mean)
