"""`bakeoff plan`: what an export takes and what running it will, before anything starts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .bake import Plan
    from .forecast import Forecast


def show(planned: Plan, output: Path, *, as_json: bool) -> None:
    """Print the forecast of an export into `output`.

    Raises:
        ResourceError: it doesn't fit; the fix names recipes that would.
    """
    from .bake import check_room, existing_parent
    from .memory import available_bytes

    forecast = planned.forecast(existing_parent(output))
    free = available_bytes()
    if as_json:
        print(json.dumps({**forecast.as_dict(), "available_bytes": free, "running": running(forecast, free)}, indent=2))
    else:
        print("\n".join(_lines(planned, forecast, free)))
    check_room(planned, output)


def _lines(planned: Plan, forecast: Forecast, free: int) -> list[str]:
    held = forecast.running_bytes()
    lines = [f"{planned.source.family.name} from {planned.source.id}"]
    lines.append(f"  {'part':16} {'recipe':16} {'source':>9} {'writes':>9} {'about':>7}   held when run")
    for name, cost in forecast.parts.items():
        source = forecast.checkpoints[name].nbytes
        lines.append(
            f"  {name:16} {planned.parts[name]!s:16} {_size(source):>9} {_size(cost.disk_bytes):>9} "
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
