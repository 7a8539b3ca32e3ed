"""What activations take on in real runs, layer by layer, and the scales for 8 bits that follow from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CorruptError, InputError
from ..weights import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

BINS = 2048
METHODS = ("mse", "percentile", "max")
_PERCENTILE = 0.9999
_MOST = 127
_TRIED = 100
"""Ends of the range that `mse` tries."""


@dataclass
class Magnitudes:
    """A histogram of magnitudes from 0 to `top`, which widens as larger ones come: 8 KB, however many it has seen."""

    top: float = 0.0
    counts: Tensor | None = None

    def see(self, values: Tensor) -> None:
        """Count the magnitudes of a tensor.

        Raises:
            InputError: some aren't finite.
        """
        import torch

        magnitudes = values.detach().float().abs().flatten()
        most = float(magnitudes.max()) if magnitudes.numel() else 0.0
        if not torch.isfinite(torch.tensor(most)):
            message = "activations are NaN or infinite"
            raise InputError(message)
        if self.counts is None:
            self.counts, self.top = torch.zeros(BINS, dtype=torch.float64), most or 1e-12
        while most > self.top:  # pairs of bins become one, and the upper half is free
            halves = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([halves, torch.zeros(BINS - len(halves), dtype=torch.float64)])
            self.top *= 2
        self.counts += torch.histc(magnitudes, BINS, 0.0, self.top).double()

    def scale(self, method: str = "mse") -> float:
        """Return the size of a step of 8 bits: of the range that errs least, of nearly all values, or of all.

        Clipping widens no step; `mse` weighs what it loses against the steps' own error, taken as uniform.
        """
        import torch

        assert self.counts is not None  # noqa: S101 - made by `see`
        width = self.top / BINS
        ends = (torch.arange(BINS, dtype=torch.float64) + 1) * width
        seen = self.counts.nonzero()
        most = float(ends[int(seen[-1])]) if len(seen) else width
        if method == "max":
            return most / _MOST
        share = self.counts.cumsum(0) / self.counts.sum().clamp_min(1)
        if method == "percentile":
            return float(ends[int((share < _PERCENTILE).sum())]) / _MOST
        middles = ends - width / 2
        tried = most * torch.arange(1, _TRIED + 1, dtype=torch.float64) / _TRIED
        lost = (middles[None] - tried[:, None]).clamp_min(0).square()
        steps = ((tried / _MOST).square() / 12)[:, None].expand_as(lost)
        errors = (torch.where(lost > 0, lost, steps) * self.counts).sum(1)
        return float(tried[int(errors.argmin())]) / _MOST


@dataclass
class Calibration:
    """Part -> layer -> what its input and its output took on; `info` says of which model, prompts and steps."""

    info: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, tuple[Magnitudes, Magnitudes]]] = field(default_factory=dict)

    def see(self, part: str, layer: str, given: Tensor, made: Tensor) -> None:
        """Count what a layer was given and what it made of it.

        Raises:
            InputError: that isn't finite.
        """
        before, after = self.parts.setdefault(part, {}).setdefault(layer, (Magnitudes(), Magnitudes()))
        try:
            before.see(given)
            after.see(made)
        except InputError as error:
            message = f"{layer} of {part}: {error.message}"
            raise InputError(message, fix="calibrate on a model that draws: try it with bakeoff generate") from error

    def scales(self, part: str, method: str = "mse") -> dict[str, tuple[float, float]]:
        """Return layer -> scales of its input and its output."""
        layers = self.parts.get(part, {})
        return {layer: (before.scale(method), after.scale(method)) for layer, (before, after) in layers.items()}

    def save(self, file: Path) -> None:
        """Write a safetensors file: `part/layer/input` and `…/output`, the histogram's top before its counts."""
        import torch
        from safetensors.torch import save_file

        tensors = {
            f"{part}/{layer}/{side}": torch.cat([torch.tensor([seen.top], dtype=torch.float64), seen.counts])
            for part, layers in self.parts.items()
            for layer, both in layers.items()
            for side, seen in zip(("input", "output"), both, strict=True)
            if seen.counts is not None
        }
        partial = file.with_name(f".{file.name}.partial")
        save_file(tensors, partial, metadata={"bakeoff": json.dumps(self.info)})
        partial.replace(file)

    @classmethod
    def open(cls, file: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            CorruptError: it isn't a calibration, or one that was damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            message = f"no calibration {file}"
            raise InputError(message, fix=f"bakeoff calibrate MODEL -o {file}")
        try:
            with safe_open(file, "pt") as stream:
                info = json.loads((stream.metadata() or {})["bakeoff"])
                tensors: Mapping[str, Tensor] = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            calibration = cls({**info, "sha256": sha256(file)})
            for name in sorted(tensors):
                calibration._put(name, tensors[name])
        except (SafetensorError, KeyError, ValueError) as error:
            message = f"{file} is not a calibration: {error}"
            raise CorruptError(message, fix=f"bakeoff calibrate MODEL -o {file}") from error
        return calibration

    def _put(self, name: str, values: Tensor) -> None:
        part, layer, side = name.split("/")
        if values.shape != (BINS + 1,) or not bool(values.isfinite().all()) or float(values[1:].sum()) <= 0:
            message = f"{name} holds no histogram"
            raise ValueError(message)
        both = self.parts.setdefault(part, {}).setdefault(layer, (Magnitudes(), Magnitudes()))
        seen = both[("input", "output").index(side)]
        seen.top, seen.counts = float(values[0]), values[1:]
