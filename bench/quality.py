"""What an arm's pictures are worth: near the reference's (T1), and showing what their prompts say (T2).

PSNR and SSIM (Wang and others, 2004) from torchmetrics, ꟻLIP (Andersson and others, 2020) from flip-evaluator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..pictures import psnr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8]

_FLATTEST = 1.0
"""Least standard deviation, in levels, of a picture that shows anything."""


def figures_of_all(pairs: list[list[str]], prompts: list[str], scorer: bool) -> list[dict[str, Any]]:  # noqa: FBT001 - called by name, from JSON
    """Return the figures of each pair of files, reference and arm. Runs in a child process."""
    import numpy as np

    return [figures(np.load(reference), np.load(arm), prompts, scorer=scorer) for reference, arm in pairs]


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
