"""CLIPScore (Hessel and others, 2021: "CLIPScore: A Reference-free Evaluation Metric for Image Captioning")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clip import Clip
from .metric import Metric

if TYPE_CHECKING:
    from ...pictures import Pictures


class ClipScore(Metric):
    """100 · max(cos, 0) of picture and prompt, as torchmetrics scales it; the paper has 2.5 in place of 100.

    The prompt stands for itself; the paper puts "A photo depicts" before a caption.

    Weights: a CLIPModel folder, such as openai/clip-vit-large-patch14. Figures of different models don't compare.
    """

    name = "clip_score"

    def __init__(self, weights: str) -> None:
        super().__init__(weights)
        self._clip = Clip(self.folder)

    def _values(self, expected: Pictures, got: Pictures, prompts: list[str]) -> list[float]:  # noqa: ARG002 - no reference counts
        return [100 * max(cosine, 0.0) for cosine in self._clip.cosines(got, prompts)]
