"""How much anonymous memory opened parts are predicted to take. Mapped weights are none: the kernel can drop their pages.

The factors are each runtime's own (`Runtime.held`), measured by `make bench-memory`; these are figures for a CPU. What
is predicted is weights and, for a VAE, activations; other parts' activations are covered by what `usable_bytes` keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import plugins
from .errors import SourceError
from .memory import available_bytes
from .weights import TORCH_DTYPES, Checkpoint, Entry, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .components.component import Activations
    from .recipe import Placement

KEPT_SHARE = 0.1
"""Share of the available memory that predictions may not use."""
DEVICE_KEPT_SHARE = 0.2
"""Share of a GPU's memory that weights may not use: activations have it. Not measured on a GPU yet."""
_CONVOLUTION = 4


def running_bytes(
    backend: str,
    precision: str,
    weight_bytes: Mapping[str, int],
    *,
    mapped: bool = False,
    convolution_bytes: int | None = None,
) -> int:
    """Predict the anonymous memory that one opened part holds.

    Args:
        backend: as in recipes, such as `onnx`.
        precision: as in recipes, such as `fp32`.
        weight_bytes: dtype as torch spells it -> bytes of weights in it, as the manifest has them.
        mapped: opened with `offload=mapped`, where the runtime can.
        convolution_bytes: how many of them are convolutions', which a runtime may lay out anew; None: maybe all.
    """
    runtime = plugins.runtime(backend)
    return runtime.held_bytes(precision, weight_bytes, mapped=mapped, convolution_bytes=convolution_bytes)


def activation_bytes(backend: str, precision: str, activations: Activations, placement: Placement) -> int:
    """Predict the peak that a run adds to what the part holds."""
    return plugins.runtime(backend).activation_bytes(precision, activations, placement)


def usable_bytes() -> int:
    """Return the memory that predictions may use now, in bytes."""
    return int(available_bytes() * (1 - KEPT_SHARE))


def device_usable_bytes(device: str) -> int | None:
    """Return the memory of a device that weights may use now, in bytes; None where nothing tells.

    What torch's allocator holds and doesn't use counts as free. A share is left for activations.
    """
    if device not in {"cuda", "rocm"}:
        return None
    import torch

    if not torch.cuda.is_available():  # ONNX Runtime's GPU beside a torch for CPUs
        return None
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free, total = torch.cuda.mem_get_info()
    return int(free + unused - total * DEVICE_KEPT_SHARE)


def weight_bytes(folder: Path) -> dict[str, int]:
    """Sum a part's weights on disk by dtype, for folders without a manifest; "" where the files don't tell the dtype."""
    entries = _entries(folder)
    if entries is None:
        return {"": sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.suffix != ".json")}
    totals: dict[str, int] = {}
    for entry in entries:
        dtype = TORCH_DTYPES.get(entry.dtype, entry.dtype.lower())
        totals[dtype] = totals.get(dtype, 0) + entry.length
    return totals


def convolution_bytes(folder: Path) -> int | None:
    """Sum the weights of four dimensions of a part on disk; None where no safetensors tell the shapes."""
    entries = _entries(folder)
    if entries is None:
        return None
    return sum(entry.length for entry in entries if len(entry.shape) == _CONVOLUTION)


def _entries(folder: Path) -> list[Entry] | None:
    """Return a checkpoint's tensors, or those of all safetensors where they are under other names; None without any."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    try:
        return list(Checkpoint.open(folder).entries.values())
    except SourceError:
        return [entry for file in files for entry in read_header(file)]
