"""Pictures, (H, W, 3) uint8: written to files, and compared.

PSNR and SSIM (Wang and others, 2004) from torchmetrics, ꟻLIP (Andersson and others, 2020) from flip-evaluator.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from .errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8]

SAME_DB = 200.0
"""What is said of two pictures that are equal; uint8 ones that aren't stay below 100."""
_FLATTEST = 1.0
"""Least standard deviation, in levels, of a picture that shows anything."""


def decibels(value: float, digits: int = 1) -> str:
    """Write a PSNR or SQNR for people."""
    return "same bits" if value >= SAME_DB else f"{value:.{digits}f} dB"


def check_output(output: Path) -> None:
    """Refuse before the work is done what can't be written after it.

    Raises:
        UsageError: no picture format, or no such folder.
    """
    if output.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise UsageError(unknown("picture format", output.suffix, (".png", ".jpg", ".webp")))
    if not output.parent.is_dir():
        message = f"no folder {output.parent} to write {output.name} into"
        raise UsageError(message, fix=f"mkdir -p {output.parent}")


def save(images: Pictures, output: Path) -> list[Path]:
    """Write pictures (B, H, W, 3), each whole or not at all; several are numbered. Return the files."""
    from PIL import Image

    several = len(images) > 1
    files = [output.with_stem(f"{output.stem}-{i}") if several else output for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        partial = file.with_name(f".{file.name}.partial{file.suffix}")
        Image.fromarray(image).save(partial)
        partial.replace(file)
    return files


def psnr(expected: Pictures, got: Pictures) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; `SAME_DB` where they are equal."""
    import numpy as np

    error = float(np.mean((expected.astype(np.float64) - got.astype(np.float64)) ** 2))
    return SAME_DB if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(expected: Pictures, got: Pictures) -> float:
    """Structural similarity of two pictures: 1 equal."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity: Any = structural_similarity_index_measure(_planes(got), _planes(expected), data_range=1.0)
    return float(similarity)


def _planes(picture: Pictures) -> Any:  # noqa: ANN401 - a tensor (1, 3, H, W) in [0, 1]
    import torch

    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def flip(expected: Pictures, got: Pictures) -> float:
    """Return the mean ꟻLIP of two pictures: 0 equal, 1 as different as can be."""
    import flip_evaluator
    import numpy as np

    _, mean, _ = flip_evaluator.evaluate(
        expected.astype(np.float32) / 255, got.astype(np.float32) / 255, "LDR", inputsRGB=True, applyMagma=False
    )
    return float(mean)


_MEASURES: dict[str, tuple[Callable[[Pictures, Pictures], float], int, str | None]] = {
    "psnr_db": (psnr, 3, None),
    "ssim": (ssim, 5, "torchmetrics"),
    "flip": (flip, 5, "flip_evaluator"),
}
"""Figure -> what measures it, its digits, and the module that this takes."""


def missing() -> dict[str, str]:
    """Return figure -> why it can't be measured here, for each that can't."""
    return {
        name: f"{module.replace('_', '-')} isn't installed: pip install 'bakeoff[bench]'"
        for name, (_, _, module) in _MEASURES.items()
        if module and importlib.util.find_spec(module) is None
    }


def likeness(expected: Pictures, got: Pictures) -> dict[str, Any]:
    """Compare pictures (N, H, W, 3) with a reference's: in each list one entry a picture; what can't be measured is left out.

    `flat` says which show one colour alone; a `problem` is all there is where sizes differ.
    """
    if expected.shape != got.shape:
        return {"problem": f"pictures of {got.shape[1:3]}, expected {expected.shape[1:3]}"}
    able = {name: measure for name, measure in _MEASURES.items() if name not in missing()}
    told: dict[str, Any] = {
        name: [round(measure(a, b), digits) for a, b in zip(expected, got, strict=True)]
        for name, (measure, digits, _) in able.items()
    }
    return told | {"flat": [bool(picture.std() < _FLATTEST) for picture in got]}


def drift(expected: Any, got: Any) -> list[float]:  # noqa: ANN401 - float32 arrays
    """Return how far latents (steps, B, …) are from the reference's after each step: relative root mean square.

    A drift grows from rounding step by step; a part that is broken is far off from the first step. Empty where the
    shapes differ.
    """
    import numpy as np

    if expected.shape != got.shape:
        return []
    axes = tuple(range(1, expected.ndim))
    off, size = (np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=axes)) for x in (got - expected, expected))
    return [float(f"{value:.4g}") for value in off / size]
