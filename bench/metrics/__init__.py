"""Metrics that need published weights, which the user names: a folder, or a Hugging Face hub id.

What is known of a metric before its weights are there stands in `METRICS`, without torch or transformers. A new metric
is one file with a `Metric`, named as the metric is, and one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from ...errors import UsageError, unknown

if TYPE_CHECKING:
    from .metric import Metric


@dataclass(frozen=True)
class Fact:
    """What a metric's figures mean.

    Attributes:
        title: its name, for people.
        kind: what a picture is held against: `paired` the reference's picture, `semantic` its prompt, `distribution`
            all of the reference's pictures, all at once.
        higher_is_better: whether more is better.
        class_name: the subclass of `Metric` in the file that is named as the metric is.
        fewest: pictures below which the figure means nothing.
        points: what a semantic score is multiplied by to speak in points, of which there are about 100.
    """

    title: str
    kind: Literal["paired", "semantic", "distribution"]
    higher_is_better: bool
    class_name: str
    fewest: int = 1
    points: float = 1.0


METRICS: dict[str, Fact] = {
    "lpips": Fact("LPIPS", "paired", higher_is_better=False, class_name="Lpips"),
    "clip_score": Fact("CLIPScore", "semantic", higher_is_better=True, class_name="ClipScore"),
    "hpsv2": Fact("HPS v2", "semantic", higher_is_better=True, class_name="HpsV2"),
    # Rewards are standardised: two standard deviations to either side are nearly all of its scale.
    "image_reward": Fact("ImageReward", "semantic", higher_is_better=True, class_name="ImageReward", points=25.0),
    "cmmd": Fact("CMMD", "distribution", higher_is_better=False, class_name="Cmmd", fewest=1000),
    "fid": Fact("FID", "distribution", higher_is_better=False, class_name="Fid", fewest=5000),
}


def known() -> list[str]:
    """Return the names of all metrics."""
    return list(METRICS)


def open_metric(name: str, weights: str) -> Metric:
    """Load a metric's weights.

    Args:
        name: one of `known()`.
        weights: the folder or the hub id that holds them; each metric's class says which.

    Raises:
        UsageError: there is no such metric, no such folder, or the folder lacks a file.
        SourceError: the hub can't be reached, or the weights aren't the metric's.
        PickleError: the weights are a pickle of more than tensors.
    """
    if name not in METRICS:
        raise UsageError(unknown("metric", name, METRICS))
    metric: type[Metric] = getattr(import_module(f".{name}", __name__), METRICS[name].class_name)
    return metric(weights)
