"""Pictures, (H, W, 3) uint8: written to files, and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UsageError, unknown

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8]

SAME_DB = 200.0
"""What is said of two pictures that are equal; uint8 ones that aren't stay below 100."""


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
