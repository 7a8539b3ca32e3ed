"""Which precision each weight of a part has: one for all, and layers that differ."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from .channels import Channels
    from .format import Format
    from .grid import Grids


@dataclass(frozen=True)
class Mixture:
    """A part's precision, and that of each layer which has another."""

    precision: str
    formats: Mapping[str, Format]
    """Each precision of low-bit weights that occurs -> its format."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Layer, as the checkpoint's keys name it -> precision, where it isn't the part's."""

    known: Mapping[str, Channels] = field(default_factory=dict)
    """Layer -> what the channels of its input took on, where that was calibrated: weights are rounded for it."""
    kept: Collection[str] = frozenset()
    """Weights, as the checkpoint names them, that a backend left as floats after all."""

    def importance(self, weight: str) -> Tensor | None:
        """Return the mean squares of the inputs of a layer, by its weight's name in the checkpoint, if they are known."""
        channels = self.known.get(weight.removesuffix(".weight"))
        return channels.mean_square if channels else None

    def corrected(self, layer: str, shape: Sequence[int]) -> Format | None:
        """Return the format whose loss a layer's bias makes up for, if it does."""
        weight_format, channels = self.format_of(layer), self.known.get(layer)
        if weight_format is None or channels is None or not weight_format.uses_inputs or weight_format.obstacle(shape):
            return None
        return weight_format if channels.size == shape[1] else None

    @property
    def is_plain(self) -> bool:
        """Whether all weights stay floats, of one dtype."""
        return not self.formats and not self.layers

    def precision_of(self, weight: str) -> str:
        """Return the precision of a layer's tensor, by its name in the checkpoint."""
        return self.layers.get(weight.removesuffix(".weight").removesuffix(".bias"), self.precision)

    def format_of(self, weight: str) -> Format | None:
        """Return what a weight is rounded to, by its or its layer's name in the checkpoint; None where it stays a float."""
        if weight in self.kept or f"{weight}.weight" in self.kept:
            return None
        return self.formats.get(self.precision_of(weight))

    def calibrated(self, layer: str, shape: Sequence[int], grids: Grids) -> Grids | None:
        """Return what a layer's activations are rounded to, if they are: where its weight (of that shape) becomes codes."""
        return grids if self.rounds_activations(layer, shape) else None

    def rounds_activations(self, layer: str, shape: Sequence[int]) -> bool:
        """Say whether a layer with a weight of that shape is to round its activations as they were calibrated."""
        weight_format = self.format_of(layer)
        return bool(weight_format and weight_format.calibrated and not weight_format.obstacle(shape))

    def obstacle(self, weight: str, shape: Sequence[int]) -> str | None:
        """Say why a weight, by its name in the checkpoint, stays a float where the part's format would have codes of it."""
        weight_format = self.format_of(weight)
        if weight_format:
            return weight_format.obstacle(shape)
        return f"the recipe keeps it in {self.precision_of(weight)}" if self.formats else None

    def round_module(
        self, module: nn.Module, names: Mapping[str, str], activations: Mapping[str, Grids] | None = None
    ) -> nn.Module:
        """Let a module compute with the weights, and the activations, that it will have; in place, it is returned.

        Args:
            module: any.
            names: path of a layer in it -> the layer's name in the checkpoint.
            activations: layer, by that name -> what it rounds to, where that is calibrated.
        """
        import torch

        done = self._kept_in(module, names)
        for path, layer in module.named_modules():
            name = names.get(path, path)
            weight_format = self.format_of(name)
            if weight_format is None:
                continue
            grids = (activations or {}).get(name)
            weight = getattr(layer, "weight", None)
            grids = self.calibrated(name, weight.shape, grids) if grids and weight is not None else None
            columns = grids[0].steps if grids and grids[0].by_channel else None
            if isinstance(weight, torch.Tensor) and id(weight) not in done:
                self._correct_bias(layer, name)
            for parameter in layer.parameters(recurse=False):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    weight_format.round_weight(
                        parameter, columns if parameter.ndim > 1 else None, self.importance(name)
                    )
            weight_format.watch(layer, grids)
        return module

    def _kept_in(self, module: nn.Module, names: Mapping[str, str]) -> set[int]:
        """Return the ids of a module's parameters that stay floats; tied ones under whichever name they are kept."""
        return {
            id(parameter)
            for path, layer in (module.named_modules(remove_duplicate=False) if self.kept else ())
            for own, parameter in layer.named_parameters(recurse=False)
            if f"{names.get(path, path)}.{own}".removeprefix(".") in self.kept
        }

    def _correct_bias(self, layer: Any, name: str) -> None:  # noqa: ANN401 - a layer with a weight
        """Let a layer's bias make up for what its weight will lose."""
        import torch

        weight_format = self.corrected(name, layer.weight.shape)
        if weight_format and getattr(layer, "bias", None) is not None:
            with torch.no_grad():
                layer.bias += weight_format.lost(layer.weight, self.known[name].mean, self.importance(name))


@contextlib.contextmanager
def rounded_layers(
    module: nn.Module, names: Mapping[str, str], mixture: Mixture, activations: Mapping[str, Grids]
) -> Iterator[None]:
    """Put rounded copies in the place of layers, for the while.

    Args:
        module: any; other layers of it stay as they are.
        names: path of each layer -> its name in the checkpoint.
        mixture: what they are rounded to.
        activations: layer, by that name -> what it rounds to, where that is calibrated.
    """
    rounded = {
        path: mixture.round_module(copy.deepcopy(module.get_submodule(path)), {"": name}, activations)
        for path, name in names.items()
    }
    with replaced(module, rounded):
        yield


@contextlib.contextmanager
def replaced(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put others, by their paths, in the place of a module's layers, for the while."""
    before = {path: module.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            _put(module, path, layer)
        yield
    finally:
        for path, layer in before.items():
            _put(module, path, layer)


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, layer)
