"""Layers of a torch part that stay in float32 among layers of two bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..naming import meant
from ..weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn


def keep_wide(module: nn.Module, folder: Path, dtype: torch.dtype) -> list[str]:
    """Give layers back the float32 that their file has, in a module of another dtype; return their paths.

    From then on each layer takes what it is given in its own dtype. What a wide one makes goes on in `dtype`, but for what
    that can't hold: it goes on in float32.

    Args:
        module: of the part, in `dtype`.
        folder: with its safetensors.
        dtype: of all other layers.
    """
    import torch

    entries = Checkpoint.open(folder).entries
    wide = {name for name, entry in entries.items() if entry.dtype == "F32"}
    if dtype == torch.float32 or not wide:
        return []
    owners: dict[str, Any] = {}
    for path, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            stored = meant(f"{path}.{name}", entries)
            if stored in wide:
                parameter.data = _read(folder, stored).to(parameter.device)
                owners[path] = layer
    for layer in module.modules():
        first = next(layer.parameters(recurse=False), None)
        is_leaf = (
            next(layer.children(), None) is None
        )  # what has layers may be given a timestep, which is to stay exact
        if is_leaf and first is not None and first.is_floating_point():
            layer.register_forward_pre_hook(_taken_in(first.dtype))
    for layer in owners.values():
        layer.register_forward_hook(_given_in(dtype))
    return sorted(owners)


def _read(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(Checkpoint.open(folder).entries[name].file, "pt") as stream:
        return stream.get_tensor(name)


def _taken_in(dtype: torch.dtype) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    import torch

    def cast(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401 - a layer
        return tuple(
            each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in given
        )

    return cast


def _given_in(dtype: torch.dtype) -> Callable[[Any, Any, Any], Any]:
    import torch

    most = torch.finfo(dtype).max

    def cast(_: Any, given: Any, made: Any) -> Any:  # noqa: ANN401, ARG001 - a layer's
        fits = isinstance(made, torch.Tensor) and float(made.abs().max()) <= most
        return made.to(dtype) if fits else made

    return cast
