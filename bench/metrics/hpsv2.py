"""HPS v2 (Wu and others, 2023: "Human Preference Score v2")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clip import Clip
from .metric import Metric

if TYPE_CHECKING:
    from ...pictures import Pictures


class HpsV2(Metric):
    """100 · cos of picture and prompt in a CLIP that was tuned on what people prefer: mostly 20 to 35.

    Weights: `HPS_v2_compressed.pt` or `HPS_v2.1_compressed.pt` of xswu/HPSv2, converted from OpenCLIP's ViT-H-14 to
    transformers' CLIPModel (`hidden_act` "gelu"), such as adams-story/HPSv2-hf, with the tokenizer and the image
    processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K. Figures of v2 and v2.1 don't compare.
    """

    name = "hpsv2"

    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        self._clip = Clip(self.folder)

    def _values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:  # noqa: ARG002 - no reference counts
        return [100 * cosine for cosine in self._clip.cosines(_square(got), prompts)]


def _square(pictures: Pictures) -> Pictures:
    """Put black bars on either side of oblong pictures: the original sees all of a picture, where CLIP crops it."""
    import numpy as np

    side = max(pictures.shape[1:3])
    bars = [((side - length) // 2, (side - length + 1) // 2) for length in pictures.shape[1:3]]
    return np.pad(pictures, [(0, 0), *bars, (0, 0)])
