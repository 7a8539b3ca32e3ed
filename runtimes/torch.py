"""Run a part as the eager module that Diffusers or Transformers builds, from mapped safetensors."""

from __future__ import annotations

import contextlib
import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ..components.component import WRAPPER
from ..components.low_bit import SCALE, move
from ..errors import InputError, UsageError
from ..hardware import OVERFLOWS, Availability, choose_device, has_instructions, overflows_bytes, usable_cores
from ..naming import layer_names, meant
from ..sources.lora import added
from ..weights import Checkpoint
from . import acceleration, aoti, attention, few_rows, float8, float32
from .blocks import Blocks
from .crossing import Crossing
from .islands import keep_wide
from .runtime import PartFiles, Runtime
from .torch_graph import Recording, layers_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ..recipe import Placement
    from ..sources.lora import Delta
    from .runtime import Operation

_DTYPES = {"fp32": "float32", "fp16": "float16"}
"""Precision -> what is computed in, bfloat16 unless said: low-bit precisions are what weights are stored in."""
_LIBRARIES = {
    "int8": "bitsandbytes",
    "nf4": "bitsandbytes",
    "int4": "torchao",
    "w8a8-dynamic": "torchao",
    "fp8": "torchao",
}
"""Precision -> what runs its codes."""
_WIDENED = f"{OVERFLOWS}: layers of w8a8 are multiplied in floats"
_HALF = {"bf16", "fp16"}
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_TORCH_NAMES = {"rocm": "cuda"}
_HOMES = {"cuda", "rocm"}
"""Devices on which a pipeline's tensors may lie; the others may lack float64, which some schedulers use."""
_CODED = (".SCB", ".absmax", "._weight_qdata", SCALE)
"""What some names of tensors end in where there are codes of bitsandbytes, torchao or our own."""
_WITHOUT_BFLOAT16 = {"w8a8": 0.2, "int8": 0.74, "w8a8-dynamic": 2.0}
"""Precision -> seconds of a step for one in bf16, on a processor that has no instructions for that."""


class TorchRuntime(Runtime):
    """bf16 parts compute in bfloat16 and channels-last; inputs and outputs stay float32 like everywhere.

    Inputs that lie on its GPU stay there, and so do results.

    What is float32 is multiplied as such, TF32 is off.

    Weights stay mapped from the safetensors, but for convolutions that are laid out channels-last; with
    `offload=mapped` these, too.
    """

    options: ClassVar[frozenset[str]] = frozenset(
        {"compile", "cuda_graphs", "attention", "channels_last", "attention_slicing", "blocks"}
    )
    held: ClassVar[Mapping[str, float]] = dict.fromkeys(("float32", "bfloat16", "float16"), 0.02)
    held_mapped: ClassVar[Mapping[str, float] | None] = held
    live_maps: ClassVar[Mapping[str, float]] = {"fp32": 16, "bf16": 10}
    devices: ClassVar[tuple[str, ...]] = ("cuda", "rocm", "xpu", "mps", "cpu")

    @classmethod
    def relative_time(cls, precision: str) -> float:
        return 1.0 if has_instructions("avx512_bf16", "amx_bf16") else _WITHOUT_BFLOAT16.get(precision, 1.0)

    @classmethod
    def fuses_attention(cls, placement: Placement) -> bool:
        return placement.attention != "math"

    @classmethod
    def serves(cls, option: str, config: Mapping[str, Any]) -> bool:
        if option == "token_merging":
            return attention.can_merge(config)
        return super().serves(option, config)

    @classmethod
    def option_obstacle(cls, option: str, placement: Placement) -> tuple[str, str] | None:
        device = cls.device_for(placement)
        if option == "compile":
            return acceleration.compiler_obstacle(device)
        if option == "attention":
            return acceleration.attention_obstacle(str(placement.attention), device)
        if option == "cuda_graphs" and device not in {"cuda", "rocm"}:
            return f"it would run on {device}, CUDA graphs are NVIDIA's and AMD's", "leave out cuda_graphs"
        if option == "blocks" and device == "cpu":
            return "it would run on cpu, where weights are already", "offload=mapped"
        return None

    @classmethod
    def home_for(cls, placement: Placement) -> str:
        device = cls.device_for(placement)
        return _TORCH_NAMES.get(device, device) if device in _HOMES else "cpu"

    @classmethod
    def shapes(cls, folder: Path) -> dict[str, tuple[int, ...]]:
        entries = Checkpoint.open(folder).entries
        if any(name.endswith(_CODED) for name in entries):
            message = f"LoRAs can't be added to {folder}: its weights are codes of a few bits"
            raise InputError(message, fix="bake it in: bakeoff export MODEL -o DIR --recipe … --lora FILE:SCALE")
        return {name: entry.shape for name, entry in entries.items()}

    @classmethod
    def held_bytes(
        cls,
        precision: str,
        weight_bytes: Mapping[str, int],
        *,
        mapped: bool = False,
        convolution_bytes: int | None = None,
    ) -> int:
        """Count what is copied: weights of another float dtype, and convolutions where they are laid out anew."""
        target = _DTYPES.get(precision, "bfloat16")
        kept = sum(size for dtype, size in weight_bytes.items() if dtype == target or dtype not in _WIDTHS)
        converted = [
            size * _WIDTHS[target] // _WIDTHS[dtype]
            for dtype, size in weight_bytes.items()
            if dtype != target and dtype in _WIDTHS
        ]
        laid_out = 0
        if precision != "fp32" and not mapped:
            laid_out = kept if convolution_bytes is None else min(kept, convolution_bytes)
        return super().held_bytes(precision, weight_bytes, mapped=mapped) + laid_out + sum(converted)

    @classmethod
    def probe(cls) -> Availability:
        try:
            import torch
        except ImportError:
            return Availability(ok=False, reason="torch is not installed", fix="pip install torch")
        return Availability(ok=True, reason=f"torch {torch.__version__}")

    @classmethod
    def obstacle(cls, precision: str) -> Availability | None:
        library = _LIBRARIES.get(precision)
        if library and importlib.util.find_spec(library) is None:
            return Availability(ok=False, reason=f"{library} is not installed", fix=f"pip install 'bakeoff[{library}]'")
        if precision == "w8a8" and overflows_bytes():
            return Availability(ok=True, reason=_WIDENED)
        if precision == "fp8" and not float8.has_cpu():
            return Availability(
                ok=False, reason="this torch doesn't multiply 8-bit floats on a CPU", fix="pip install 'torch>=2.13'"
            )
        if precision == "fp8":
            return Availability(
                ok=True, reason="a CPU multiplies 8-bit floats slower than float32; GPUs have them from 8.9 on"
            )
        return None

    @classmethod
    def proves_on(cls, precision: str) -> str:
        return "cuda" if precision == "fp8" and not float8.has_cpu() and float8.has_gpu() else "cpu"

    def __init__(self, part: PartFiles, placement: Placement) -> None:
        import torch

        super().__init__(part, placement)
        device, fallback = choose_device(placement.device, self.devices, "torch")
        self._threads = placement.threads or usable_cores()
        computed = _DTYPES.get(part.precision, "bfloat16")
        self._dtype: torch.dtype = getattr(torch, computed)
        self._device = torch.device(_TORCH_NAMES.get(device, device))
        self.home = self.home_for(placement)
        float8.refuse(part, self._device)
        mapped, in_blocks = placement.offload == "mapped", placement.offload == "blocks"
        self._channels_last = _channels_last(placement, part.precision) and not aoti.is_compiled(part.folder)
        self._crossing = Crossing(self._device)
        module = part.build(computed)
        module = module if in_blocks else move(module, self._device)
        wide = keep_wide(module, part.folder, self._dtype) if part.precision in _HALF and part.islands else []
        _adapt(module, part.deltas)
        if self._device.type == "cuda":
            few_rows.fill_up(module)
        merged = attention.merge_tokens(module, placement.token_merging)
        self._slicing: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if placement.attention_slicing is not None:
            self._slicing = attention.SlicedAttention(placement.attention_slicing)
        if self._channels_last:
            _lay_out(module)
        blocks = Blocks(part.name, module, self._device) if in_blocks else None
        if placement.attention:
            self._slicing = acceleration.ChosenAttention(placement.attention)
        compiling = None if acceleration.compiler_obstacle(device) else placement.compile
        self._module: Any
        self._module, compiled = acceleration.compile_module(module, compiling or False)
        self._call: Any = self._module
        if aoti.is_compiled(part.folder):
            self._call, compiled = self._ahead(module, placement, device), "aoti"
        graphs = placement.cuda_graphs and self.option_obstacle("cuda_graphs", placement) is None
        if graphs:
            self._call = self._graphs(wide, blocks)
        self.configuration = {
            "device": device,
            "threads": self._threads,
            "precision": _precision(module, computed),
            "float32": float32.read_back(),
            "float32_layers": wide,
            "compile": compiled,
            "cuda_graphs": graphs,
            "attention": getattr(self._slicing, "counts", None),
            "channels_last": self._channels_last,
            "blocks": blocks.count if blocks else None,
            "mapped": mapped,
            "attention_slicing": placement.attention_slicing,
            "lossy": [f"token_merging={placement.token_merging}"] if merged else [],
            "fallback": "; ".join(filter(None, (fallback, _widened(module, device)))) or None,
        }

    def _ahead(self, module: nn.Module, placement: Placement, device: str) -> aoti.Compiled:
        """Return code that was compiled ahead of time; it has been decided what it does.

        Raises:
            UsageError: with an option that would change it.
        """
        asked = {
            "compile": placement.compile,
            "attention": placement.attention,
            "attention_slicing": placement.attention_slicing,
            "token_merging": placement.token_merging,
            "offload=blocks": placement.offload == "blocks",
            "channels_last": placement.channels_last == "on",
        }
        for option in [name for name, value in asked.items() if value]:
            message = f"{self.part.name} was compiled ahead of time: {option} can't change it"
            raise UsageError(message, fix=f"leave out {option}, or use an artifact without +aoti")
        return aoti.Compiled(self.part, module, device)

    def _graphs(self, wide: list[str], blocks: Blocks | None) -> acceleration.Graphs:
        """Return what records and replays the module.

        Raises:
            UsageError: it waits for the device, or moves weights, while it runs.
        """
        reason = "some layers stay in float32 and look at their values" if wide else None
        reason = "its weights come and go" if blocks else reason
        if reason:
            message = f"{self.part.name} can't be recorded as a CUDA graph: {reason}"
            raise UsageError(message, fix="leave out cuda_graphs")
        return acceleration.Graphs(self.part.name, self._call)

    def _run(self, inputs: dict[str, Tensor], outputs: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        import torch

        assert self._module is not None, "closed"  # noqa: S101
        arguments = self._arguments(inputs)
        with torch.no_grad(), float32.plain(), _threads(self._threads), self._slicing:
            results = acceleration.heal(lambda: self._call(*arguments))
        return dict(zip(outputs, self._crossing.bring_home(results, inputs), strict=True))

    def _arguments(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        return [
            self._crossing.to_device(port.name, inputs[port.name], partial(self._prepare, exact=port.exact))
            for port in self.inputs
        ]

    def _prepare(self, tensor: Tensor, *, exact: bool) -> Tensor:
        import torch

        if tensor.is_floating_point() and not exact:
            tensor = tensor.to(self._dtype)
        if self._channels_last and tensor.ndim == 4:  # noqa: PLR2004 - pictures and latents
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def module(self) -> nn.Module:
        assert self._module is not None, "closed"  # noqa: S101
        return self._module

    def operations(self, inputs: Mapping[str, Tensor]) -> list[Operation]:
        fed, _ = self._checked(inputs)
        return self._recorded(fed).operations

    def _tap(self, inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        return self._recorded(inputs, names).kept

    def _recorded(self, inputs: dict[str, Tensor], wanted: Sequence[str] = ()) -> Recording:
        import torch

        names = layer_names(layers_of(self._module), Checkpoint.open(self.part.folder))
        recording = Recording(self._module, names, wanted)
        given = dict(zip((port.name for port in self.inputs), self._arguments(inputs), strict=True))
        with torch.no_grad(), float32.plain(), _threads(self._threads), self._slicing:
            recording.run(given, [port.name for port in self.outputs])
        return recording

    def synchronize(self) -> None:
        self._crossing.finish()

    def between_runs(self, *, same: bool) -> None:
        self._crossing.same.forget()
        self._crossing.same.active = same

    def close(self) -> None:
        self._module = self._call = None
        self._crossing.same.forget()


def _channels_last(placement: Placement, precision: str) -> bool:
    if placement.channels_last == "auto":
        return precision != "fp32" and placement.offload != "mapped"
    return placement.channels_last == "on"


def _lay_out(module: nn.Module) -> None:
    """Lay weights of convolutions out channels-last; those over three dimensions stay, which `Module.to` refuses."""
    import torch

    for parameter in module.parameters():
        if parameter.ndim == 4:  # noqa: PLR2004 - of two dimensions
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _adapt(module: nn.Module, deltas: Mapping[str, Sequence[Delta]]) -> None:
    """Add LoRAs to weights; these become tensors of their own, what is mapped from the file stays as it is."""
    parameters = {name.removeprefix(WRAPPER): parameter for name, parameter in module.named_parameters()}
    for name, additions in deltas.items():
        own = meant(name, parameters)
        if own is None:
            message = f"no weight is called {name}, to which a LoRA is added"
            raise InputError(message)
        parameters[own].data = added(parameters[own].data, additions)


def _precision(module: nn.Module, dtype: str) -> str | dict[str, int]:
    """Name what is computed in; where there are products of integers or 8-bit floats, count the layers of each kind."""
    from torch import nn

    from ..components.byte_layers import ByteLayer

    kinds = (nn.Linear, nn.Conv2d, ByteLayer)
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, kinds)]
    floats = sum(type(layer.weight).__name__ == "Float8Tensor" for layer in layers)
    if floats:
        return {"float8_e4m3fn": floats, dtype: len(layers) - floats}
    integer = sum(
        layer.rounds and layer.integers
        if isinstance(layer, ByteLayer)
        else getattr(layer.weight, "act_quant_kwargs", None) is not None
        for layer in layers
    )
    return {"int8": integer, dtype: len(layers) - integer} if integer else dtype


def _widened(module: nn.Module, device: str) -> str | None:
    """Say that codes are multiplied in floats, where they are: what comes out is the same."""
    from ..components.byte_layers import ByteLayer

    layers = [layer for layer in module.modules() if isinstance(layer, ByteLayer) and layer.rounds]
    if device == "cpu" and any(not layer.integers for layer in layers):
        return _WIDENED
    return f"on {device} layers of w8a8 are multiplied in floats" if layers and device != "cpu" else None


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with so many CPU threads: torch's number is the process's, and another engine may have set its own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
