"""What exports take, fitted to what `make bench-full-size` measures."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from .exporter import SCALES, Cost
from .packing import storage

if TYPE_CHECKING:
    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint

BYTES_PER_S = 4e8
"""Weights that are written, or converted on the way."""
PACKED_TIMES = 4
"""How many times as long a byte of codes takes."""
_GRAPH_BYTES, _OPERATION_BYTES, _PACKING_BYTES = 530_000_000, 45_000, 80_000_000
"""Memory of the process with a small graph, for each operation, and while weights are packed."""
_OPERATION_S = 0.03


def graph_cost(weights: dict[str, int], written: int, operations: int, *, packs: bool) -> Cost:
    """Predict what capturing, lowering and writing a graph of so many operations takes.

    Args:
        weights: dtype -> bytes.
        written: bytes that aren't shared with the checkpoint.
        operations: of the captured graph.
        packs: whether weights become codes.
    """
    packing, times = (_PACKING_BYTES, PACKED_TIMES) if packs else (0, 1)
    return Cost(
        anon_bytes=_GRAPH_BYTES + _OPERATION_BYTES * operations + packing,
        disk_bytes=written,
        seconds=_OPERATION_S * operations + written * times / BYTES_PER_S,
        weight_bytes=weights,
    )


def stored_bytes(checkpoint: Checkpoint, mixture: Mixture) -> dict[str, int]:
    """Return dtype -> bytes that a checkpoint takes, with codes wherever a format has them."""
    totals: dict[str, int] = defaultdict(int)
    for entry in checkpoint.entries.values():
        weight_format = mixture.format_of(entry.name)
        if weight_format is None or weight_format.obstacle(entry.shape):
            dtype = storage(mixture.precision_of(entry.name))
            totals[dtype] += entry.bytes_in(dtype)
        else:
            codes, scales = weight_format.stored_bytes(entry.shape)
            totals[weight_format.name] += codes
            totals[SCALES] += scales
    return dict(totals)
