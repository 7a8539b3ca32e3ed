"""Pictures beside their reference's, with the difference between the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .record import REFERENCE, entry_name

if TYPE_CHECKING:
    from pathlib import Path

    from .summary import Summary

_AMPLIFIED = 8


@dataclass(frozen=True)
class Pair:
    """One picture of an arm: reference, arm and difference side by side."""

    arm: str
    prompt: str
    psnr_db: float
    picture: Any
    """A PIL image."""


def worst_pairs(summary: Summary, folder: Path, count: int = 8) -> list[Pair]:
    """Return the pictures of passing and failing arms that are farthest from eager fp32's, worst first.

    Empty where the pictures aren't beside the record.
    """
    ranked = sorted(
        (psnr_db, row.name, number, row)
        for row in summary.rows
        if row.figures and "psnr_db" in row.figures
        for number, psnr_db in enumerate(row.figures["psnr_db"])
    )
    pairs = []
    for psnr_db, name, number, row in ranked[:count]:
        files = [picture_file(summary.record, folder, each) for each in (entry_name(REFERENCE, row.point), name)]
        if not all(files):
            continue
        expected, got = (np.load(file, mmap_mode="r")[number] for file in files if file)
        pairs.append(Pair(name, summary.record["prompts"][number]["text"], psnr_db, _side_by_side(expected, got)))
    return pairs


def picture_file(record: dict[str, Any], folder: Path, entry: str) -> Path | None:
    """Return the file of an entry's judged pictures, (N, H, W, 3) uint8, or None where it isn't in the folder."""
    name = next(
        (
            about["entries"][entry]["quality"]["pictures"]
            for about in record["arms"].values()
            if "quality" in about["entries"].get(entry, {})
        ),
        None,
    )
    if name is None:
        return None
    file = (folder / name).resolve()
    return file if file.is_relative_to(folder.resolve()) and file.is_file() else None


def _side_by_side(expected: Any, got: Any) -> Any:  # noqa: ANN401 - arrays (H, W, 3) uint8, a PIL image
    from PIL import Image

    difference = np.abs(expected.astype(int) - got.astype(int)) * _AMPLIFIED
    return Image.fromarray(np.concatenate([expected, got, difference.clip(0, 255).astype(np.uint8)], axis=1))
