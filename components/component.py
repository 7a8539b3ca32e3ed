"""The seam between a pipeline's modules and the backends: named tensors in, named tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    Config = Mapping[str, Any]

Dim = int | str
"""A fixed size, a name such as `height`, a multiple such as `8*height`, or a fraction such as `height/2`."""


@dataclass(frozen=True)
class Port:
    """A named tensor of a part's interface: dtype as torch spells it, and its dimensions."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    exact: bool = False
    """Keeps its dtype in a part of lower precision: a timestep or a position in bfloat16 would be another one."""

    @property
    def rank(self) -> int:
        return len(self.dims)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape at given sizes, such as `{"batch": 2, "height": 8, …}`."""
        return tuple(dim if isinstance(dim, int) else _size(dim, sizes) for dim in self.dims)


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    name, times, over = _terms(dim)
    return times * sizes[name] // over


def _terms(dim: str) -> tuple[str, int, int]:
    """Return name, multiple and divisor."""
    times, _, rest = dim.rpartition("*")
    name, _, over = rest.partition("/")
    return name, int(times or 1), int(over or 1)


def solve_sizes(part: str, ports: tuple[Port, ...], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Check inputs against ports and return the size of each named dimension.

    Raises:
        InputError: a tensor is missing or unknown, or its rank or shape doesn't fit.
    """
    expected = {port.name for port in ports}
    if set(inputs) != expected:
        message = f"{part} got tensors {sorted(inputs)}, expected {sorted(expected)}"
        raise InputError(message)
    sizes: dict[str, int] = {}
    for port in ports:
        shape = tuple(inputs[port.name].shape)
        if len(shape) != port.rank or not all(
            _fits(dim, size, sizes) for dim, size in zip(port.dims, shape, strict=True)
        ):
            wanted = ", ".join(str(dim) for dim in port.dims)
            message = f"{part} got {port.name} of shape {shape}, expected ({wanted}) with {sizes or 'free sizes'}"
            raise InputError(message)
    return sizes


def _fits(dim: Dim, size: int, sizes: dict[str, int]) -> bool:
    if isinstance(dim, int):
        return size == dim
    name, times, over = _terms(dim)
    whole, rest = divmod(size * over, times)
    return rest == 0 and sizes.setdefault(name, whole) == whole


@dataclass(frozen=True)
class Sizes:
    """Sizes of the named dimensions for an example: rows, latent height and width, tokens."""

    batch: int
    height: int
    width: int
    sequence: int

    def as_dict(self) -> dict[str, int]:
        """Return all named dimensions; `tokens` are patches of 2x2 latents, for models that take them packed."""
        return {
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "sequence": self.sequence,
            "tokens": self.height * self.width // 4,
        }


@dataclass(frozen=True)
class Activations:
    """What a run needs besides weights: elements of its largest feature map, and of its largest attention matrix."""

    map_elements: int
    score_elements: int = 0


WRAPPER = "module."
"""What the names of a module's layers have before them in what `Component.flat` makes of it."""
CAPTURE_SIZES = Sizes(batch=2, height=16, width=24, sequence=12)
PROOF_SIZES = (Sizes(2, 8, 16, 12), Sizes(1, 16, 8, 77), Sizes(3, 8, 8, 5))
"""Another batch, a non-square picture, another length of text; never 1 where the capture could bake it."""


class Runner(Protocol):
    """What a stand-in needs of a runtime."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class Component(ABC):
    """One part of a pipeline as backends see it. Stateless: what depends on a model comes from its `config`."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when a change here changes what is lowered: part of an artifact's key."""
    operations: ClassVar[float] = 5.0
    """Operations of the captured graph for each matrix of the checkpoint, about: what an export costs goes by them."""

    @abstractmethod
    def inputs(self, config: Config) -> tuple[Port, ...]: ...

    @abstractmethod
    def outputs(self, config: Config) -> tuple[Port, ...]: ...

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Open the eager module from config and safetensors; weights stay mapped where the file has `dtype`."""

    @abstractmethod
    def flat(self, module: nn.Module) -> nn.Module:
        """Wrap the module so that it takes `inputs` and returns `outputs` as positional tensors, in that order."""

    @abstractmethod
    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        """Return inputs as they occur in a pipeline. `seed` also picks the timestep, from first to last."""

    @abstractmethod
    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        """Return what the Diffusers pipeline holds in the module's place.

        `runners` has all parts that come from the same module (`vae_encoder`, `vae_decoder`), by part name.
        """

    def conventions(self, backend: str) -> Mapping[str, Port]:  # noqa: ARG002 - most components have none
        """Return inputs that a backend's other readers feed in another dtype or rank, by name."""
        return {}

    def limit(self, config: Config, sizes: Sizes) -> Sizes:  # noqa: ARG002 - most components have no limits
        """Bring sizes within what the model can take, such as a longest text."""
        return sizes

    def activations(self, config: Config, rows: int, height: int, width: int) -> Activations | None:  # noqa: ARG002 - most aren't known
        """Return what a run on pictures of this size in pixels needs, where activations and not weights decide; else None."""
        return None
