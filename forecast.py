"""What an export takes, and what running its artifact will: predicted from headers, before anything starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import footprint, plugins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .components.component import Component
    from .exporters.exporter import Cost
    from .recipe import PartRecipe
    from .weights import Checkpoint

_HOST_BYTES = 4_000_000
"""Disk for tokenizers, scheduler, configs and graphs."""
_START_S = 4.0
"""To import what exporting takes."""
_HASHED_BYTES_PER_S = 8e8


@dataclass(frozen=True)
class Forecast:
    """Predictions for one export and its artifact."""

    parts: Mapping[str, Cost]
    recipes: Mapping[str, PartRecipe]
    checkpoints: Mapping[str, Checkpoint]
    merged_bytes: int
    """Disk for modules with LoRAs merged in, while the export goes on."""

    @classmethod
    def of(
        cls,
        checkpoints: Mapping[str, Checkpoint],
        recipes: Mapping[str, PartRecipe],
        components: Mapping[str, Component],
        *,
        shared: bool,
        merged: Sequence[Checkpoint] = (),
    ) -> Forecast:
        """Ask each part's exporter.

        Args:
            checkpoints: part -> its module's.
            recipes: part -> what is baked.
            components: part -> what captures it.
            shared: whether bytes that needn't change come into the artifact without being copied.
            merged: checkpoints that are written once more, with LoRAs in them.
        """
        parts = {}
        for name, recipe in recipes.items():
            operations = round(components[name].operations * checkpoints[name].matrices)
            parts[name] = plugins.exporter(recipe.backend).cost(
                checkpoints[name],
                plugins.mixture(recipe.precision, recipe.layers),
                options=recipe.options,
                operations=operations,
                shared=shared,
            )
        return cls(parts, recipes, checkpoints, sum(each.nbytes for each in merged))

    @property
    def peak_anon_bytes(self) -> int:
        """Anonymous memory of capture, lowering and writing; the proof runs in another process and isn't counted."""
        return max(cost.anon_bytes for cost in self.parts.values())

    @property
    def disk_bytes(self) -> int:
        """Written bytes; what is linked to the source takes none."""
        return _HOST_BYTES + self.merged_bytes + sum(cost.disk_bytes for cost in self.parts.values())

    @property
    def seconds(self) -> float:
        """Time of the export on a core like the one that it was measured on, without the proof."""
        hashed = sum(sum(cost.weight_bytes.values()) for cost in self.parts.values())
        return _START_S + hashed / _HASHED_BYTES_PER_S + sum(cost.seconds for cost in self.parts.values())

    def running_bytes(self, *, mapped: bool = False) -> dict[str, int]:
        """Return part -> anonymous memory that its runtime holds once it is open, with mapped weights or without."""
        return {
            name: footprint.running_bytes(
                recipe.backend,
                recipe.precision,
                self.parts[name].weight_bytes,
                mapped=mapped,
                convolution_bytes=self.checkpoints[name].convolution_bytes,
            )
            for name, recipe in self.recipes.items()
        }

    def obstacles(self, memory_bytes: int, disk_bytes: int) -> list[str]:
        """Say what an export lacks where so much is free; nothing if it fits."""
        wanted = (("memory", self.peak_anon_bytes, memory_bytes), ("disk", self.disk_bytes, disk_bytes))
        return [
            f"this export takes up to {needed / 1e9:.1f} GB of {what}, {free / 1e9:.1f} GB are free"
            for what, needed, free in wanted
            if needed > free
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "peak_anon_bytes": self.peak_anon_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": round(self.seconds),
            "running_bytes": self.running_bytes(),
            "mapped_bytes": self.running_bytes(mapped=True),
            "parts": {name: asdict(cost) for name, cost in self.parts.items()},
        }


def table(forecast: Forecast, free: int) -> list[str]:
    """Return a forecast in lines to read, where so much memory is free, in bytes."""
    held = forecast.running_bytes()
    lines = [f"  {'part':16} {'recipe':16} {'source':>9} {'writes':>9} {'about':>7}   held when run"]
    for name, cost in forecast.parts.items():
        source = forecast.checkpoints[name].nbytes
        lines.append(
            f"  {name:16} {forecast.recipes[name]!s:16} {_size(source):>9} {_size(cost.disk_bytes):>9} "
            f"{_time(cost.seconds):>7}   {_size(held[name])}"
        )
    memory, disk, time = _size(forecast.peak_anon_bytes), _size(forecast.disk_bytes), _time(forecast.seconds)
    lines.append(f"export: peak memory {memory}, disk {disk}, about {time} (without the proof)")
    lines.append(f"running: {running(forecast, free)}")
    return lines


def running(forecast: Forecast, free: int) -> str:
    """Say how the artifact can run in so much free memory, in bytes."""
    held = forecast.running_bytes()
    total, largest = sum(held.values()), max(held, key=lambda name: held[name])
    if total <= free:
        return f"all parts at once take {_size(total)} for themselves; {_size(free)} are free"
    if held[largest] <= free:
        return (
            f"all parts at once would take {_size(total)}, {_size(free)} are free: parts take turns, "
            f"the largest ({largest}) with {_size(held[largest])}"
        )
    mapped = forecast.running_bytes(mapped=True)
    alone = f"{largest} alone takes {_size(held[largest])}, {_size(free)} are free"
    if max(mapped.values()) <= free:
        return (
            f"{alone}: its weights stay in their file, {_size(mapped[largest])} are held; slower where they don't fit"
        )
    return f"not here: {alone}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"  # noqa: PLR2004 - where GB reads better


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"  # noqa: PLR2004 - where minutes read better
