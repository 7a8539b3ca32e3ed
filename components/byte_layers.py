"""Layers of w8a8 in torch: codes of weights and of activations, multiplied as what they are, integers.

Weights of int8, whose activations stay floats, are widened as they run. Every integer up to 256 is a bfloat16, so products of codes in floats are exact: they are rounded once, behind the sum. Where
the CPU multiplies bytes exactly, torch's oneDNN does it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..hardware import overflows_bytes
from ..naming import layer_names
from .low_bit import SCALE, STEP

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ..weights import Checkpoint

_LEAST, _MOST, _NOUGHT = -128, 127, 128
_PIECE = 1 << 17
"""Activations that a thread rounds at a time: half a MiB of float32."""


class ByteLayer(nn.Module):
    """A Linear layer or a convolution whose weights are codes; without a step activations stay as they are."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, codes: Tensor, scales: Tensor, step: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.input_scale = nn.Parameter(step, requires_grad=False) if step is not None else None
        self.bias: nn.Parameter | None = None
        self._step = float(step) if step is not None else None
        self._convolution = (
            (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else None
        )
        self.integers = not overflows_bytes()
        """Whether products are of integers, on a CPU."""
        self._packed: Any = None

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded, too."""
        return self._step is not None

    def forward(self, given: Tensor) -> Tensor:
        """Multiply (…, K), or (B, C, H, W), of any float dtype; return the same dtype."""
        if self._step is None:
            weight = (self.weight * self._along(self.weight_scale, 0)).to(given.dtype)
            return self._with_bias(self._multiply(given, weight))
        if self.integers and given.device.type == "cpu":
            return self._multiply_integers(given)
        codes = _codes(given, self._step)
        dtype = _product_dtype(given)
        made = self._multiply(codes.to(dtype), self.weight.to(dtype)).float()
        return self._with_bias(made.mul_(self._along(self.weight_scale * self._step, 1, made.ndim))).to(given.dtype)

    def _multiply(self, given: Tensor, weight: Tensor) -> Tensor:
        if self._convolution is None:
            return nn.functional.linear(given, weight)
        stride, padding, dilation, groups = self._convolution
        return nn.functional.conv2d(given, weight, None, stride, padding, dilation, groups)

    def _with_bias(self, made: Tensor) -> Tensor:
        return made if self.bias is None else made + self._along(self.bias, 1, made.ndim).to(made.dtype)

    def _along(self, channels: Tensor, axis: int, rank: int | None = None) -> Tensor:
        """Give a number for each output channel as many axes as weights, or activations, have."""
        rank = rank or self.weight.ndim
        behind = rank - 1 - axis if self._convolution is not None or axis == 0 else 0
        return channels[(..., *[None] * behind)]

    def _multiply_integers(self, given: Tensor) -> Tensor:
        """Multiply unsigned codes, around 128, by signed ones: oneDNN's own kernels, of weights packed once."""
        import torch

        assert self._step is not None  # noqa: S101 - asked of layers that round
        if self._packed is None:
            self._packed = self._pack(given), torch.zeros(len(self.weight), dtype=torch.int64)
        packed, zeros = self._packed
        unsigned = unsigned_codes(given, self._step)
        bias = None if self.bias is None else self.bias.float()
        ending: tuple[Any, ...] = (1.0, 0, given.dtype, "none", [], "")
        common = (packed, self.weight_scale.flatten(), zeros, bias)
        if self._convolution is None:
            made: Tensor = torch.ops.onednn.qlinear_pointwise(unsigned, self._step, _NOUGHT, *common, *ending)
            return made
        places = [*map(list, self._places()), self._convolution[3]]
        unsigned = unsigned.contiguous(memory_format=torch.channels_last)
        convolved: Tensor = torch.ops.onednn.qconv_pointwise(unsigned, self._step, _NOUGHT, *common, *places, *ending)
        return convolved

    def _pack(self, given: Tensor) -> Any:  # noqa: ANN401 - an opaque tensor of oneDNN's
        import torch

        if self._convolution is None:
            return torch.ops.onednn.qlinear_prepack(self.weight, None)
        scales = self.weight_scale.flatten()
        places = [*map(list, self._places()), self._convolution[3]]
        return torch.ops.onednn.qconv_prepack(self.weight, scales, self._step, _NOUGHT, *places, list(given.shape))

    def _places(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return stride, padding and dilation."""
        assert self._convolution is not None  # noqa: S101 - asked of convolutions alone
        stride, padding, dilation, _ = self._convolution
        assert not isinstance(padding, str)  # noqa: S101 - `takes` leaves these out
        return stride, padding, dilation


def _codes(given: Tensor, step: float) -> Tensor:
    """Round to multiples of a step, all at once; return float32."""
    return (given.float() / step).round_().clamp_(_LEAST, _MOST)


def unsigned_codes(given: Tensor, step: float) -> Tensor:
    """Round to multiples of a step, from -128 to 127 of them; return uint8 around 128, laid out as what is given if that is dense.

    A piece at a time, which stays in a core's cache from one pass to the next: twice to six times as fast as all at once.
    """
    import torch

    if torch.compiler.is_compiling():  # which makes one pass of it
        return (_codes(given, step) + _NOUGHT).to(torch.uint8)
    codes = torch.empty_like(given, dtype=torch.uint8)
    if codes.stride() != given.stride():  # not dense: a piece of something else
        given = given.contiguous()
        codes = torch.empty_like(given, dtype=torch.uint8)
    order = sorted(range(given.ndim), key=given.stride, reverse=True)
    source, target = given.permute(order).view(-1), codes.permute(order).view(-1)
    size = _PIECE * torch.get_num_threads()
    wide = torch.empty(min(size, source.numel()), dtype=torch.float32)
    for start in range(0, source.numel(), size):
        piece = source[start : start + size]
        rounded = wide[: len(piece)].copy_(piece).div_(step).round_().clamp_(_LEAST, _MOST).add_(_NOUGHT)
        target[start : start + size] = rounded
    return codes


def _product_dtype(given: Tensor) -> torch.dtype:
    """Return a dtype that products of codes are exact in, and that the device is quick with."""
    import torch

    if given.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():  # noqa: SLF001 - torch has no other
        return torch.float32
    return torch.bfloat16


def takes(layer: nn.Module) -> bool:
    """Say whether a layer can hold codes."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def put(module: nn.Module, tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """Put byte layers in the place of those that have codes, whose tensors are taken out."""
    coded = {name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)}
    for path, name in _named(module, checkpoint).items():
        if name not in coded:
            continue
        layer: Any = module.get_submodule(path)
        step = tensors.pop(name + STEP, None)
        made = ByteLayer(layer, tensors.pop(f"{name}.weight").squeeze(-1), tensors.pop(name + SCALE), step)
        if layer.bias is not None:
            made.bias = nn.Parameter(tensors.pop(f"{name}.bias"), requires_grad=False)
        owner, _, own = path.rpartition(".")
        setattr(module.get_submodule(owner), own, made)


def _named(module: nn.Module, checkpoint: Checkpoint) -> Mapping[str, str]:
    return layer_names([path for path, layer in module.named_modules() if takes(layer)], checkpoint)


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a module without codes has, in bfloat16."""
    import torch

    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((SCALE, STEP))}
    for name, tensor in found.items():
        scales = tensors.get(name.removesuffix(".weight") + SCALE)
        if scales is not None:
            found[name] = torch.empty_like(tensor.squeeze(-1), dtype=torch.bfloat16)
    return found
