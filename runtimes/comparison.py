"""Two opened parts on the same tensors: how far apart their results lie, and what each takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .runtime import Runtime


@dataclass(frozen=True)
class Comparison:
    """What a part costs beside another one, such as a refittable engine beside a plain one."""

    seconds: tuple[float, float]
    """Of a run, the median of each."""
    ratio: float
    """Of the second's run to the first's, the median over rounds."""
    differences: Mapping[str, float]
    """Output -> the root mean square of what the second gives less what the first gives, for one of the first's own."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON."""
        return asdict(self)


def compare(first: Runtime, second: Runtime, inputs: Mapping[str, Tensor], rounds: int = 20) -> Comparison:
    """Run two parts in turn, each first in every other round; a round of each before isn't counted.

    Args:
        first: what is compared with.
        second: what is compared.
        inputs: of both, where they lie: on a GPU nothing crosses.
        rounds: runs of each.
    """
    results = [runtime.run(inputs) for runtime in (first, second)]
    taken: list[tuple[float, float]] = []
    for index in range(rounds):
        if index % 2:
            other, one = _seconds(second, inputs), _seconds(first, inputs)
        else:
            one, other = _seconds(first, inputs), _seconds(second, inputs)
        taken.append((one, other))
    return Comparison(
        (statistics.median(one for one, _ in taken), statistics.median(other for _, other in taken)),
        statistics.median(other / one for one, other in taken),
        {name: _difference(results[0][name], results[1][name]) for name in results[0]},
    )


def _seconds(runtime: Runtime, inputs: Mapping[str, Tensor]) -> float:
    runtime.synchronize()
    started = time.perf_counter()
    runtime.run(inputs)
    runtime.synchronize()
    return time.perf_counter() - started


def _difference(first: Tensor, second: Tensor) -> float:
    """Return how much of the first the difference is; infinite where the first is nothing."""
    apart, size = float((second - first).square().mean().sqrt()), float(first.square().mean().sqrt())
    return apart / size if size else apart and float("inf")
