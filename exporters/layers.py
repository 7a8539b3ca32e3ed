"""Which lowered nodes came from which module, under the names that the checkpoint has for it: `layers.json`."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ..weights import Checkpoint

FILE = "layers.json"
_WRAPPER = "module"
"""Name that a component's wrapper gives to the module that it wraps."""


def write_layers(nodes: Iterable[tuple[str, str]], checkpoint: Checkpoint, folder: Path) -> dict[str, list[str]]:
    """Write what `by_layer` makes of the same pairs; return that."""
    named = by_layer(nodes, checkpoint)
    (folder / FILE).write_text(json.dumps(named, indent=1) + "\n")
    return named


def by_layer(nodes: Iterable[tuple[str, str]], checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return module path -> node names, from pairs of (path in the captured module, node name)."""
    layers: dict[str, list[str]] = defaultdict(list)
    for path, name in nodes:
        layers[_unwrapped(path)].append(name)
    layers.pop("", None)  # what belongs to no module
    prefix = _prefix(layers, {key.rpartition(".")[0] for key in checkpoint.entries})
    return {prefix + path: names for path, names in layers.items()}


def _unwrapped(path: str) -> str:
    if path.startswith("_"):
        return ""
    return path.removeprefix(_WRAPPER).removeprefix(".") if path.partition(".")[0] == _WRAPPER else path


def _prefix(paths: Iterable[str], modules: set[str]) -> str:
    """Return what the checkpoint's keys have before the module's own names, such as CLIP's `text_model.`."""
    for path in paths:
        if path in modules:
            return ""
        found = next((module for module in modules if module.endswith(f".{path}")), None)
        if found:
            return found.removesuffix(path)
    return ""
