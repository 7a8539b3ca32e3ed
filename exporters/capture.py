"""Capture a part with torch.export: one program, dynamic in batch, height, width and sequence."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ..components.component import CAPTURE_SIZES
from ..errors import LoweringError

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

    from ..components.component import Component, Config


def capture(part: str, component: Component, config: Config, folder: Path, dtype: str) -> ExportedProgram:
    """Capture a part whose weights stay mapped from `folder`.

    Example tensors are clones, because torch.export marks what it is given as dynamic, and no dynamic size is 1,
    which would be baked.

    Raises:
        LoweringError: the module can't be captured.
    """
    import torch

    flat = component.flat(component.load(folder, getattr(torch, dtype))).eval()
    example = component.example(config, component.limit(config, CAPTURE_SIZES), seed=0)
    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(port.dims) if isinstance(dim, str)}
        for port in component.inputs(config)
    )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = tuple(tensor.clone() for tensor in example.values())
            return torch.export.export(flat, arguments, dynamic_shapes=_named(flat, dynamic), strict=False)
    except Exception as error:
        message = f"torch.export couldn't capture {part} ({component.name}): {error}"
        raise LoweringError(message) from error


def _named(flat: object, dynamic: tuple[dict[int, object], ...]) -> dict[str, dict[int, object]]:
    import inspect

    names = list(inspect.signature(flat.forward).parameters)  # type: ignore[attr-defined]
    return dict(zip(names, dynamic, strict=True))
