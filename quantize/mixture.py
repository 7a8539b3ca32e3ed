"""Which precision each weight of a part has: one for all, and layers that differ."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from .format import Format

Scales = tuple[float, float]
"""Of a layer's input and output."""


@dataclass(frozen=True)
class Mixture:
    """A part's precision, and that of each layer which has another."""

    precision: str
    formats: Mapping[str, Format]
    """Each precision of low-bit weights that occurs -> its format."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Layer, as the checkpoint's keys name it -> precision, where it isn't the part's."""

    @property
    def is_plain(self) -> bool:
        """Whether all weights stay floats, of one dtype."""
        return not self.formats and not self.layers

    def precision_of(self, weight: str) -> str:
        """Return the precision of a layer's tensor, by its name in the checkpoint."""
        return self.layers.get(weight.removesuffix(".weight").removesuffix(".bias"), self.precision)

    def format_of(self, weight: str) -> Format | None:
        """Return what a weight is rounded to, by its name in the checkpoint; None where it stays a float."""
        return self.formats.get(self.precision_of(weight))

    def obstacle(self, weight: str, shape: Sequence[int]) -> str | None:
        """Say why a weight, by its name in the checkpoint, stays a float where the part's format would have codes of it."""
        weight_format = self.format_of(weight)
        if weight_format:
            return weight_format.obstacle(shape)
        return f"the recipe keeps it in {self.precision_of(weight)}" if self.formats else None

    def round_module(
        self, module: nn.Module, names: Mapping[str, str], activations: Mapping[str, Scales] | None = None
    ) -> nn.Module:
        """Let a module compute with the weights, and the activations, that it will have; in place, it is returned.

        Args:
            module: any.
            names: path of a layer in it -> the layer's name in the checkpoint.
            activations: layer, by that name -> its scales, where they are calibrated.
        """
        done: set[int] = set()
        for path, layer in module.named_modules():
            name = names.get(path, path)
            weight_format = self.format_of(name)
            if weight_format is None:
                continue
            for parameter in layer.parameters(recurse=False):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    weight_format.round_weight(parameter)
            weight_format.watch(layer, (activations or {}).get(name))
        return module


@contextlib.contextmanager
def rounded_layers(
    module: nn.Module, names: Mapping[str, str], mixture: Mixture, activations: Mapping[str, Scales]
) -> Iterator[None]:
    """Put rounded copies in the place of layers, for the while.

    Args:
        module: any; other layers of it stay as they are.
        names: path of each layer -> its name in the checkpoint.
        mixture: what they are rounded to.
        activations: layer, by that name -> its scales, where they are calibrated.
    """
    before = {path: module.get_submodule(path) for path in names}
    try:
        for path, layer in before.items():
            _put(module, path, mixture.round_module(copy.deepcopy(layer), {"": names[path]}, activations))
        yield
    finally:
        for path, layer in before.items():
            _put(module, path, layer)


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, layer)
