"""The seam of a runtime: named tensors in, named tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..components.component import solve_sizes
from ..errors import ArtifactError, InputError, UsageError
from ..hardware import choose_device
from .crossing import home_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ..components.component import Activations, Port
    from ..hardware import Availability
    from ..recipe import Placement
    from ..sources.lora import Delta


_LIVE_MAPS = 16.0
_LIVE_SCORES = 8.0
"""Bytes at the peak of a run for an element of the largest attention matrix."""
_SOURCE_WIDTH = 2
"""Bytes of an element in the checkpoints that int8 is usually made from: bfloat16 or float16."""


@dataclass(frozen=True)
class PartFiles:
    """A baked part on disk, as a runtime opens it."""

    name: str
    folder: Path
    precision: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    build: Callable[[str], nn.Module]
    """Build the eager module, with flat tensors, in a dtype: for the torch runtime."""
    deltas: Mapping[str, Sequence[Delta]] = field(default_factory=dict)
    """What LoRAs add to weights, by their names in `Runtime.shapes`."""
    vouched: Mapping[str, str] = field(default_factory=dict)
    """File of the folder -> its sha256 in a manifest that was verified. What is native code is opened only with that."""
    islands: bool = True
    """Whether layers stored in float32 keep it in a part of two bytes: not where a model is run as it is in another dtype."""


@dataclass(frozen=True)
class Operation:
    """One operation of an opened part, as its backend names and calls it."""

    name: str
    kind: str
    """The backend's own type: Conv, MatMul, Softmax…"""
    inputs: tuple[str, ...]
    """Tensors that it takes, constants too."""
    outputs: tuple[str, ...]
    layer: str | None
    """The module that it came from, by its name in the checkpoint; None where that isn't known."""


class Runtime(ABC):
    """One opened part. Registered under the entry points `bakeoff.runtimes`.

    What it takes of memory (`held`, `live_maps`…) is measured by `make bench-memory`, on a CPU.

    `run` promises that the returned tensors are the caller's (no later run changes them), that inputs are never
    written, that floats come back as float32, and that results lie on the device that an input lies on, if one does.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """Devices of `bakeoff.hardware` that it can run on, best first."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Options of `Placement` that it has besides device and threads, such as `compile`, `provider`."""
    reads_ports: ClassVar[bool] = False
    """Whether a file of others may have other dtypes and ranks than the component declares: see `_adopt`."""
    held: ClassVar[Mapping[str, float]] = {}
    """Torch dtype, or weight format -> bytes of anonymous memory that an opened part holds for a byte of weights in it, at
    the peak of opening on a CPU; 1 unless said."""
    held_mapped: ClassVar[Mapping[str, float] | None] = None
    """The same for `offload=mapped`, where weights stay in their files; None: the runtime always copies them."""
    held_int8_convolutions: ClassVar[float | None] = None
    """The same for int8 weights of convolutions, where these take another share."""
    live_maps: ClassVar[Mapping[str, float]] = {}
    """Precision -> bytes at the peak of a run for an element of a convolutional part's largest feature map; 16 unless said."""
    widens: ClassVar[bool] = False
    """Whether weights of two bytes are widened, and float32 is computed with them."""

    @classmethod
    def relative_time(cls, precision: str) -> float:  # noqa: ARG003
        """Return seconds of a layer's multiplications on this CPU for one that they take in bf16; 1 where it isn't known.

        From the profiles of docs/precisions.md.
        """
        return 1.0

    @classmethod
    def serves(cls, option: str, config: Mapping[str, Any]) -> bool:  # noqa: ARG003 - some options are for some modules
        """Say whether an option of `Placement` does anything for a part with this `config.json`."""
        return option in cls.options or (option == "mapped" and cls.held_mapped is not None)

    @classmethod
    def option_obstacle(cls, option: str, placement: Placement) -> tuple[str, str] | None:  # noqa: ARG003 - most have none
        """Say why an option that the runtime has can't be had where a part would run, and the fix; None if it can."""
        return None

    @classmethod
    def obstacle(cls, precision: str) -> Availability | None:  # noqa: ARG003 - most run all that they can open
        """Say what keeps a precision from running on this machine's CPU, or from running as it is meant to; else None."""
        return None

    @classmethod
    def proves_on(cls, precision: str) -> str:  # noqa: ARG003 - a CPU runs what most have
        """Return the device on which a part is proved: the CPU, unless that can't run what a device here can."""
        return "cpu"

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:  # noqa: ARG003 - not all can
        """Return the shapes of a part's weights that LoRAs can be added to, by their names in the checkpoint."""
        return {}

    @classmethod
    def device_for(cls, placement: Placement) -> str:
        """Return the device that a part would run on."""
        return choose_device(placement.device, cls.devices, cls.__name__)[0]

    @classmethod
    def home_for(cls, placement: Placement) -> str:  # noqa: ARG003 - most take the host's
        """Return torch's name of the device whose tensors a part would take where they lie; `cpu`: the host's alone."""
        return "cpu"

    @classmethod
    def held_bytes(
        cls,
        precision: str,  # noqa: ARG003 - some compute in another dtype than weights have
        weight_bytes: Mapping[str, int],
        *,
        mapped: bool = False,
        convolution_bytes: int | None = None,
    ) -> int:
        """Predict the anonymous memory that an opened part holds; arguments as of `footprint.running_bytes`."""
        factors = cls.held_mapped if mapped and cls.held_mapped is not None else cls.held
        total = sum(factors.get(dtype, 1.0) * size for dtype, size in weight_bytes.items())
        if cls.held_int8_convolutions is not None and convolution_bytes is not None:
            codes = min(weight_bytes.get("int8", 0), convolution_bytes // _SOURCE_WIDTH)
            total += (cls.held_int8_convolutions - factors.get("int8", 1.0)) * codes
        return round(total)

    @classmethod
    def fuses_attention(cls, placement: Placement) -> bool:  # noqa: ARG003 - most can't say
        """Say whether attention keeps no matrix of scores where a part would run."""
        return False

    @classmethod
    def activation_bytes(cls, precision: str, activations: Activations, placement: Placement) -> int:
        """Predict what a run adds at its peak."""
        maps = cls.live_maps.get(precision, _LIVE_MAPS) * activations.map_elements
        scores = 0 if cls.fuses_attention(placement) else _LIVE_SCORES * activations.score_elements
        return round(maps + scores)

    def __init__(self, part: PartFiles, placement: Placement) -> None:
        self.part = part
        self.placement = placement
        self.inputs = part.inputs
        self.outputs = part.outputs
        self.home = "cpu"
        """The device whose tensors it takes where they lie, once it is open: see `home_for`."""
        self.configuration: dict[str, Any] = {}
        """What was read back after loading: device, threads, precision, fallback…"""

    @classmethod
    @abstractmethod
    def probe(cls) -> Availability:
        """Say whether the backend can be used here, without opening anything."""

    @abstractmethod
    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Execute with checked, contiguous inputs in the ports' dtypes; `outputs` gives the shapes to expect.

        Inputs lie in host memory, unless the runtime has a home elsewhere: then they lie where the caller's do.
        """

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute the part.

        Raises:
            InputError: a tensor's name, rank, shape or dtype doesn't fit the ports.
        """
        fed, sizes = self._checked(inputs)
        results = self._run(fed, {port.name: port.shape(sizes) for port in self.outputs})
        home = home_of(inputs.values())
        return {name: _as_float(tensor).to(home) for name, tensor in results.items()}

    def module(self) -> nn.Module:
        """Return the module that runs, with flat tensors.

        Raises:
            UsageError: the runtime has none.
        """
        message = f"{type(self).__name__} runs a graph: layers can be looked at in torch alone"
        raise UsageError(message, fix="take an artifact of torch:fp32, or the model itself")

    def operations(self, inputs: Mapping[str, Tensor]) -> list[Operation]:  # noqa: ARG002 - graphs are known beforehand
        """Return what the part consists of, in the order in which it runs.

        Args:
            inputs: as of `run`: those that it is run with, where that is how it is found out.

        Raises:
            InputError: as `run`.
            UsageError: the runtime can't look inside its parts.
        """
        message = f"{type(self).__name__} can't look inside its parts"
        raise UsageError(message, fix="export the part for torch, ONNX or OpenVINO to look inside")

    def tap(self, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Execute the part and return tensors inside of it, in their own dtypes.

        What is returned isn't fused away, so a backend may compute in another order, or in another dtype, than in `run`.

        Args:
            inputs: as of `run`. What is returned lies in host memory wherever they lie.
            names: of `Operation.inputs` or `Operation.outputs`, constants apart.

        Raises:
            InputError: as `run`.
            UsageError: as `operations`.
        """
        fed, _ = self._checked({name: tensor.cpu() for name, tensor in inputs.items()})
        wanted = [name for name in dict.fromkeys(names) if name not in fed]
        return {name: fed[name] for name in names if name in fed} | (self._tap(fed, wanted) if wanted else {})

    def _checked(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return inputs in the ports' dtypes, where `_run` takes them, and the sizes of their dimensions by name.

        Raises:
            InputError: as `run`.
        """
        sizes = solve_sizes(self.part.name, self.inputs, inputs)
        where = "cpu" if self.home == "cpu" else None
        return {port.name: _as_port(self.part.name, port, inputs[port.name], where) for port in self.inputs}, sizes

    def _tap(self, inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:  # noqa: ARG002
        """Execute with checked inputs; `names` are none of theirs."""
        self.operations(inputs)
        raise NotImplementedError

    def between_runs(self, *, same: bool) -> None:  # noqa: B027 - most keep nothing
        """Forget the tensors of earlier runs; with `same`, those that are the same in the next ones needn't cross again.

        What is the same: the same memory, which nothing but torch writes.
        """

    def adapt(self, deltas: Mapping[str, Sequence[Delta]]) -> bool:  # noqa: ARG002 - most can't
        """Exchange what LoRAs add while the part is open, if that can be done; else it is opened anew."""
        return False

    def synchronize(self) -> None:  # noqa: B027 - most have nothing to do
        """Wait until the device has finished; nothing to do where `run` returns finished tensors."""

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Release what the runtime holds; it can't run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _adopt(self, actual: Mapping[str, tuple[str, int]], outputs: set[str]) -> None:
        """Bring the declared ports in line with the file's own: dtype and rank by name.

        Raises:
            ArtifactError: the file's interface isn't this component's.
        """
        declared = {port.name for port in self.inputs}
        missing = {port.name for port in self.outputs} - outputs
        if declared != set(actual) or (missing and len(missing) == len(self.outputs)):
            message = (
                f"{self.part.name} in {self.part.folder} takes {sorted(actual)} and gives {sorted(outputs)}; "
                f"expected {sorted(declared)} and {[port.name for port in self.outputs]}"
            )
            raise ArtifactError(message)
        self.inputs = tuple(_as_in_file(port, *actual[port.name]) for port in self.inputs)
        self.outputs = tuple(port for port in self.outputs if port.name in outputs)


def _as_in_file(port: Port, dtype: str, rank: int) -> Port:
    dims = port.dims if rank == port.rank else ("steps",) * rank
    return replace(port, dtype=dtype, dims=dims)


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _as_port(part: str, port: Port, tensor: Tensor, device: str | None) -> Tensor:
    """Return a tensor in a port's dtype, contiguous; None: on the device that it lies on.

    Raises:
        InputError: it would lose values.
    """
    import torch

    wanted: torch.dtype = getattr(torch, port.dtype)
    if tensor.dtype != wanted and not _converts(tensor, wanted):
        message = f"{part} got {port.name} as {tensor.dtype}, expected {wanted}: converting would lose values"
        raise InputError(message)
    return tensor.detach().to(device, wanted).contiguous()


def _converts(tensor: Tensor, wanted: torch.dtype) -> bool:
    """Whether a tensor can become another dtype: floats any floats, integers what holds each of their values."""
    if tensor.is_floating_point() or wanted.is_floating_point:
        return tensor.is_floating_point() and wanted.is_floating_point
    return bool((tensor.to(wanted) == tensor).all())
