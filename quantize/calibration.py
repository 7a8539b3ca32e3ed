"""What activations take on in real runs, layer by layer, and the scales for 8 bits that follow from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CorruptError, InputError, UsageError
from ..naming import layer_names
from ..weights import save_tensors, sha256
from .channels import Channels
from .grid import Grid, Grids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..weights import Checkpoint
    from .mixture import Mixture

BINS = 2048
EVEN = ("mse", "percentile", "max")
"""How one step for all values of a tensor is chosen: that errs least, keeps nearly all values, or keeps all."""
METHODS = ("channels", *EVEN)
"""How steps are chosen: each channel's of a convolution by its ends, others as `mse` does; or as `EVEN` says."""
_PERCENTILE = 0.9999
_MOST = 127
_CONVOLUTION = 4
"""Dimensions of its weight."""
_SIDES = ("input", "output")
_LEAST_TOP = 1e-12
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
        import numpy as np
        import torch

        magnitudes = values.detach().float().abs().flatten()
        most = float(magnitudes.max()) if magnitudes.numel() else 0.0
        if not torch.isfinite(torch.tensor(most)):
            message = "activations are NaN or infinite"
            raise InputError(message)
        if self.counts is None:
            self.counts, self.top = torch.zeros(BINS, dtype=torch.float64), max(most, _LEAST_TOP)
        while most > self.top:  # pairs of bins become one, and the upper half is free
            halves = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([halves, torch.zeros(BINS - len(halves), dtype=torch.float64)])
            self.top *= 2
        bins = (magnitudes * (BINS / self.top)).clamp_(max=BINS - 1).to(torch.int32)
        self.counts += torch.from_numpy(np.bincount(bins.numpy(), minlength=BINS))  # a third of torch.histc's time

    @property
    def is_nought(self) -> bool:
        """Whether nothing but noughts came."""
        return self.top <= _LEAST_TOP

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
class Seen:
    """What one side of a layer took on: all values together, and each channel."""

    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    channels: Channels = field(default_factory=Channels)

    def see(self, values: Tensor, axis: int) -> None:
        """Count values whose channels are along `axis`.

        Raises:
            InputError: some aren't finite.
        """
        self.magnitudes.see(values)
        self.channels.see(values, axis)


@dataclass
class Calibration:
    """Part -> layer -> what its input and its output took on; `info` says of which model, prompts and steps."""

    info: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, tuple[Seen, Seen]]] = field(default_factory=dict)

    def see(self, part: str, layer: str, given: Tensor, made: Tensor, axis: int = -1) -> None:
        """Count what a layer was given and what it made of it; `axis` is that of the channels of both.

        Raises:
            InputError: that isn't finite.
        """
        before, after = self.parts.setdefault(part, {}).setdefault(layer, (Seen(), Seen()))
        try:
            before.see(given, axis)
            after.see(made, axis)
        except InputError as error:
            message = f"{layer} of {part}: {error.message}"
            raise InputError(message, fix="calibrate on a model that draws: try it with bakeoff generate") from error

    def reached(self, part: str) -> dict[str, tuple[Seen, Seen]]:
        """Return the layers of a part that were given anything but noughts, which say nothing of how large a step has to be."""
        layers = self.parts.get(part, {})
        return {layer: both for layer, both in layers.items() if not both[0].magnitudes.is_nought}

    def grids(self, part: str, shapes: Mapping[str, Sequence[int]], method: str = METHODS[0]) -> dict[str, Grids]:
        """Return layer -> what its input and its output are rounded to.

        Args:
            part: of the pipeline.
            shapes: layer -> shape of its weight; those that weren't reached are left out.
            method: one of `METHODS`.

        Raises:
            InputError: the file is of a version that kept no statistics of channels, and `method` needs them.
        """
        layers = self.reached(part)
        return {
            layer: self._grids(layer, *layers[layer], shape, method)
            for layer, shape in shapes.items()
            if layer in layers
        }

    def _grids(self, layer: str, before: Seen, after: Seen, shape: Sequence[int], method: str) -> Grids:
        if method != METHODS[0] or len(shape) != _CONVOLUTION:
            scale = "mse" if method == METHODS[0] else method
            return Grid((before.magnitudes.scale(scale),)), Grid((after.magnitudes.scale(scale),))
        self.need_channels(layer, before, after)
        whole = before.channels.least is not None and len(before.channels.least) == shape[1]
        given = before.channels.given() if whole else Grid((before.magnitudes.scale(),))  # else: groups
        return given, after.channels.made()

    def grids_of(
        self,
        part: str,
        mixture: Mixture,
        checkpoint: Checkpoint,
        *,
        asked: str = "",
        usual: str = METHODS[0],
        outputs: bool = False,
    ) -> dict[str, Grids]:
        """Return layer, by its name in the checkpoint -> what a part's precisions round its activations to.

        Args:
            part: of the pipeline.
            mixture: the precision of each layer.
            checkpoint: of the part.
            asked: one of `METHODS`, whatever the formats need.
            usual: the one for formats that need no other.
            outputs: convolutions round what they give, too.

        Raises:
            InputError: as `grids`.
        """
        names = layer_names(self.reached(part), checkpoint)
        shapes = {path: checkpoint.entries[f"{name}.weight"].shape for path, name in names.items()}
        own = next((each.activations_method for each in mixture.formats.values() if each.activations_method), None)
        found = {
            names[path]: mixture.calibrated(names[path], shapes[path], both)
            for path, both in self.grids(part, shapes, asked or own or usual).items()
        }
        convolutions = {names[path] for path, shape in shapes.items() if len(shape) == _CONVOLUTION}
        return {
            name: (both[0], None) if name in convolutions and not outputs else both
            for name, both in found.items()
            if both
        }

    def need_channels(self, layer: str, *sides: Seen) -> None:
        """Raise if single channels of a layer weren't kept.

        Raises:
            InputError: with the command that keeps them.
        """
        if any(side.channels.least is None for side in sides):
            message = f"the calibration keeps nothing of the single channels of {layer}: an older version made it"
            fix = f"bakeoff calibrate {self.info.get('model', 'MODEL')} -o FILE, once more; or +activations=mse in the recipe"
            raise InputError(message, fix=fix)

    def save(self, file: Path) -> None:
        """Write a safetensors file: `part/layer/input` and `…/output`, the histogram's top before its counts.

        Beside each, `…/channels`: ends, means and mean squares of the channels, (4, C).
        """
        import torch

        tensors: dict[str, Tensor] = {}
        for part, layers in self.parts.items():
            for layer, both in layers.items():
                for side, seen in zip(_SIDES, both, strict=True):
                    name, histogram = f"{part}/{layer}/{side}", seen.magnitudes
                    if histogram.counts is not None:
                        top = torch.tensor([histogram.top], dtype=torch.float64)
                        tensors[name] = torch.cat([top, histogram.counts])
                    if seen.channels.least is not None:
                        tensors[f"{name}/channels"] = seen.channels.as_tensor()
        partial = file.with_name(f".{file.name}.partial")
        about = {"bakeoff": json.dumps(self.info), "tensors_sha256": _digest(tensors)}
        save_tensors(tensors, partial, about)
        partial.replace(file)

    @staticmethod
    def check_target(file: Path) -> None:
        """Refuse to write over a file that is something else.

        Raises:
            UsageError: it is.
        """
        from safetensors import SafetensorError, safe_open

        if not file.exists() or not file.stat().st_size:
            return
        try:
            with safe_open(file, "pt") as stream:
                if "bakeoff" in (stream.metadata() or {}):
                    return
        except (SafetensorError, OSError):
            pass
        message = f"{file} exists, and is no calibration"
        raise UsageError(message, fix="give another file with -o, or delete this one")

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
                about = stream.metadata() or {}
                info = dict(json.loads(about["bakeoff"]))
                tensors: Mapping[str, Tensor] = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            _refuse_changed(tensors, about.get("tensors_sha256"))
            calibration = cls({**info, "sha256": sha256(file)})
            for name in sorted(tensors):
                calibration._put(name, tensors[name])
            calibration._refuse_halves()
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            message = f"{file} is not a calibration: {error}"
            raise CorruptError(
                message, fix="calibrate again, into another file: bakeoff calibrate MODEL -o FILE"
            ) from error
        return calibration

    def _put(self, name: str, values: Tensor) -> None:
        part, layer, side, *kind = name.split("/")
        both = self.parts.setdefault(part, {}).setdefault(layer, (Seen(), Seen()))
        seen = both[_SIDES.index(side)]
        if kind == ["channels"]:
            seen.channels = Channels.read(values)
            return
        sound = not kind and values.shape == (BINS + 1,) and bool(values.isfinite().all()) and bool((values >= 0).all())
        if not sound or float(values[0]) <= 0 or float(values[1:].sum()) <= 0:
            message = f"{name} holds no histogram"
            raise ValueError(message)
        seen.magnitudes = Magnitudes(float(values[0]), values[1:])

    def _refuse_halves(self) -> None:
        for part, layers in self.parts.items():
            for layer, both in layers.items():
                if any(seen.magnitudes.counts is None for seen in both):
                    message = f"{layer} of {part} has no histogram of its input or of its output"
                    raise ValueError(message)


def _refuse_changed(tensors: Mapping[str, Tensor], written: str | None) -> None:
    """Raise if numbers aren't those that were written; of older versions' files it isn't known."""
    if written not in {None, _digest(tensors)}:
        message = "its numbers aren't those that were written"
        raise ValueError(message)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names and numbers."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
