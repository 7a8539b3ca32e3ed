"""What each layer adds to the pictures' error when it alone is rounded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CorruptError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA = 3
_READ = (2, SCHEMA)
"""1 had no shapes of weights, without which what a backend makes of a layer can't be told; 2 not what bfloat16 itself errs, which
can be measured later."""

_INFO = ("model", "prompts", "steps", "size", "calibration")
"""What is always said of a measurement."""


@dataclass
class Layer:
    """What is known of one layer."""

    shape: tuple[int, ...]
    """Of its weight, output channels first."""
    macs: int
    """Multiplications and additions in one picture."""
    errors: dict[str, float] = field(default_factory=dict)
    """Precision -> mean squared error of the pictures, of pixels from 0 to 1, with this layer alone in it."""


@dataclass
class Sensitivity:
    """Part -> layer -> what it adds to the pictures' error; `info` says of which model, prompts and steps."""

    info: dict[str, Any]
    parts: dict[str, dict[str, Layer]] = field(default_factory=dict)
    together: dict[str, dict[str, float]] = field(default_factory=dict)
    """Part -> precision -> error with all of the part's layers in it at once."""
    wide: dict[str, float] = field(default_factory=dict)
    """`computed`: error with everything in bfloat16; `stored`: with weights of bfloat16 that float32 is computed with."""

    def save(self, file: Path) -> None:
        """Write JSON, atomically."""
        parts = {
            part: {name: {**vars(layer), "errors": _to_json(layer.errors)} for name, layer in layers.items()}
            for part, layers in self.parts.items()
        }
        together = {part: _to_json(errors) for part, errors in self.together.items()}
        found = {"schema": SCHEMA, "info": self.info, "wide": _to_json(self.wide), "together": together, "parts": parts}
        text = json.dumps(found, indent=1)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text + "\n")
        partial.replace(file)

    @classmethod
    def open(cls, file: Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            CorruptError: it isn't a sensitivity.
        """
        if not file.is_file():
            message = f"no file {file}"
            raise InputError(message, fix=f"bakeoff sensitivity MODEL -o {file}")
        try:
            data = json.loads(file.read_text())
            if data["schema"] not in _READ:
                message = f"{file} is of schema {data['schema']}, expected {SCHEMA}"
                raise CorruptError(message, fix="measure again, into another file: bakeoff sensitivity MODEL -o FILE")
            parts = {
                part: {name: _layer(layer) for name, layer in layers.items()} for part, layers in data["parts"].items()
            }
            info = data["info"]
            lacking = [name for name in _INFO if name not in info]
            if lacking:
                message = f"it doesn't say with which {', '.join(lacking)} it was measured"
                raise ValueError(message)  # noqa: TRY301 - one of several that damage makes
            together = {part: _from_json(each) for part, each in data["together"].items()}
            wide = _from_json(data.get("wide", {}))
            if wide and wide.keys() != {"computed", "stored"}:
                message = f"got {', '.join(wide)} of bfloat16, expected computed and stored"
                raise ValueError(message)  # noqa: TRY301
            return cls(info, parts, together, wide)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            message = f"{file} doesn't say what layers add to the error: {error}"
            raise CorruptError(
                message, fix="measure again, into another file: bakeoff sensitivity MODEL -o FILE"
            ) from error


def _layer(data: Mapping[str, Any]) -> Layer:
    shape, macs = tuple(data["shape"]), data["macs"]
    if not shape or not all(_is_count(size) and size for size in shape) or not _is_count(macs):
        message = f"got a shape of {shape} and {macs} multiplications, expected whole numbers"
        raise ValueError(message)
    return Layer(shape, macs, _from_json(data["errors"]))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _to_json(errors: dict[str, float]) -> dict[str, float | None]:
    """Return null for errors that are infinite, which JSON hasn't."""
    return {name: error if math.isfinite(error) else None for name, error in errors.items()}


def _from_json(errors: dict[str, float | None]) -> dict[str, float]:
    found = {name: math.inf if error is None else float(error) for name, error in errors.items()}
    if any(not error >= 0 for error in found.values()):
        message = f"got errors {errors}, expected none below 0"
        raise ValueError(message)
    return found
