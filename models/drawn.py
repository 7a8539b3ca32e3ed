"""Pipelines whose weights are drawn on the device that runs them: full size, with no file of that size and no copy.

The checkpoint is headers and holes (`fullsize.build(…, hollow=True)`). Modules are built from it by the same code as
from any other, then their tensors are drawn where they will be, and a denoiser's Linear layers become bitsandbytes' or
torchao's, quantized there by these libraries, each as soon as it is drawn: the device never holds the model in two
bytes. What runs is what an artifact of that precision runs; only values differ.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..components.component import Component
from ..errors import UnavailableError, UsageError, unknown
from ..quantize.fp8 import CAPABILITY, LEAST_RANGE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ..components.component import Activations, Config, Port, Runner, Sizes
    from ..runtimes.opening import Baked

DENOISERS = ("unet", "transformer", "controlnet")
PRECISIONS = ("fp32", "bf16", "fp16", "nf4", "int8", "w8a8-dynamic", "fp8")
_MULTIPLE = 16
"""Kernels of 8 bits take widths that are multiples of it."""


def drawn(baked: Baked, precision: str, device: str) -> Baked:
    """Return a hollow Diffusers folder as `Engine` takes it.

    Args:
        baked: `read_folder` of what `fullsize.build` wrote, whose weights' values are not looked at.
        precision: of the denoiser; all else is in bfloat16, or in the precision where that is a float.
        device: as torch spells it.

    Raises:
        UsageError: there is no such precision here.
    """
    if precision not in PRECISIONS:
        raise UsageError(unknown("precision", precision, PRECISIONS))
    plain = precision if precision in {"fp32", "fp16"} else "bf16"
    parts = {
        name: replace(entry, precision=precision if name in DENOISERS else plain) for name, entry in baked.parts.items()
    }
    own = tuple(
        replace(part, component=Drawn(part.component, device, precision if part.name in DENOISERS else plain))
        for part in baked.family.parts
    )
    return replace(baked, parts=parts, family=replace(baked.family, parts=own), recipe=f"torch:{precision}, drawn")


class Drawn(Component):
    """A component whose modules' weights are drawn on a device; all else is the component's own."""

    def __init__(self, own: Component, device: str, precision: str) -> None:
        self._own, self._device, self._precision = own, device, precision

    def inputs(self, config: Config) -> tuple[Port, ...]:
        return self._own.inputs(config)

    def outputs(self, config: Config) -> tuple[Port, ...]:
        return self._own.outputs(config)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        return draw(self._own.load(folder, dtype), self._device, self._precision)

    def flat(self, module: nn.Module) -> nn.Module:
        return self._own.flat(module)

    def example(self, config: Config, sizes: Sizes, seed: int) -> dict[str, Tensor]:
        return self._own.example(config, sizes, seed)

    def stand_in(self, runners: Mapping[str, Runner], config: Config) -> object:
        return self._own.stand_in(runners, config)

    def limit(self, config: Config, sizes: Sizes) -> Sizes:
        return self._own.limit(config, sizes)

    def activations(self, config: Config, rows: int, height: int, width: int) -> Activations | None:
        return self._own.activations(config, rows, height, width)


def draw(module: nn.Module, device: str, precision: str, seed: int = 0) -> nn.Module:
    """Give a module weights that keep activations near unit size, on a device; in place, it is returned.

    Layer by layer: a Linear layer is turned into that of a low-bit precision before the next one is drawn.

    Raises:
        UnavailableError: the device has no such precision.
    """
    import torch

    _refuse_fp8(precision, torch.device(device))
    generator = torch.Generator(device).manual_seed(seed)
    stored = set(module.state_dict(keep_vars=True))
    for path in [path for path, _ in module.named_modules()]:  # no list of layers, which would keep them all
        layer = module.get_submodule(path)
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            known = f"{path}.{name}" if path else name
            tensor.data = _values(known, tensor, generator) if known in stored else tensor.data.to(device)
        if _fits(layer):
            _quantize(module, path, precision)
    return module


def _values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor's new values, on the generator's device."""
    import torch

    if not tensor.is_floating_point():
        return tensor.data.to(generator.device)
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
    if tensor.ndim > 1:
        return fresh.normal_(0, 1 / math.sqrt(math.prod(tensor.shape[1:])), generator=generator)
    return fresh.fill_(1) if name.endswith("weight") else fresh.normal_(0, 0.02, generator=generator)


def _quantize(module: nn.Module, path: str, precision: str) -> None:
    """Turn a module's Linear layer into that of a low-bit precision, on the device where it is."""
    layer = module.get_submodule(path)
    if precision in {"w8a8-dynamic", "fp8"}:
        from torchao.quantization import quantize_

        quantize_(layer, _torchao(precision), filter_fn=lambda *_: True)
    elif precision in {"nf4", "int8"}:
        module.set_submodule(path, _bitsandbytes(layer, precision))


def _refuse_fp8(precision: str, device: torch.device) -> None:
    """Refuse products of 8-bit floats where the device has none.

    Raises:
        UnavailableError: with what it is.
    """
    import torch

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if precision == "fp8" and (capability is None or capability < CAPABILITY):
        found = f"compute capability {capability[0]}.{capability[1]}" if capability else f"{device.type}"
        message = f"fp8 takes a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell), here is {found}"
        raise UnavailableError(message, fix="w8a8-dynamic computes in 8 bits on other devices")


def _fits(layer: Any) -> bool:  # noqa: ANN401 - a module
    from torch import nn

    return type(layer) is nn.Linear and not (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE)


def _torchao(precision: str) -> Any:  # noqa: ANN401 - a torchao configuration
    """Return what torchao is asked for; its settings of torch's compiler stay off, as in an artifact: they try every kernel out."""
    from torchao import quantization

    if precision == "fp8":
        return quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), activation_value_lb=LEAST_RANGE, set_inductor_config=False
        )
    return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _bitsandbytes(layer: Any, precision: str) -> nn.Module:  # noqa: ANN401 - nn.Linear
    import bitsandbytes
    import torch

    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    layers: Any = bitsandbytes.nn
    device = layer.weight.device
    with torch.device("meta"):
        made: Any = (
            layers.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
            if precision == "int8"
            else layers.Linear4bit(*sizes, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
        )
    if precision == "int8":
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(layer.weight.data.half())
        made.weight = layers.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        made.weight = layers.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made).to(
            device
        )
        made.support_avx512bf16_for_cpu = False
    made.bias = layer.bias
    return made.eval()
