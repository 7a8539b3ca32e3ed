"""Which module a lowered operation came from: what the exporters wrote into `layers.json`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_FILE = "layers.json"


def read_layers(folder: Path) -> dict[str, str]:
    """Return name of an operation -> module that it came from, by its name in the checkpoint; empty without the file."""
    file = folder / _FILE
    if not file.is_file():
        return {}
    return {name: layer for layer, names in json.loads(file.read_text()).items() for name in names}
