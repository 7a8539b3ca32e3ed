"""The likely cause of a departure, from what was computed and what eager float32 makes of the same input."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .distance import relative_error
from .evidence import EXPLAINED, Evidence, principal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn

    from ..runtimes.runtime import Operation
    from .evidence import Rounding

LARGEST_FLOAT16 = 65504.0
CANNOT_RUN = "can't run at these shapes"
OVERFLOW = "overflow in float16"
NOT_FINITE = "not finite"
SATURATED = "saturated activations"
ATTENTION = "saturated attention"
TRANSPOSED = "transposed weight"
SCALE = "wrong scale"
OFFSET = "wrong bias"
NORM = "lost precision in a norm"
LOW_PRECISION = "low precision"
ROUNDED = "rounded weights"
UNKNOWN = "not recognised"
HARMLESS = frozenset({LOW_PRECISION, ROUNDED})
"""What a recipe asks for: no faults."""

_LIKE = (0.3, 3.0)
"""An error is of a kind if it is within these multiples of what that kind makes."""
_LEAST_CHANGE = 0.01
"""A factor is this far from 1, at least, to be a wrong one."""
_LOST = 4.0
"""A norm loses precision if it errs more than this many times what rounding its result to the dtype does."""
_HALF_BYTES = 2
_CLIPPED = 0.01
"""A scale that was calibrated for the least error clips less of its activations than this."""
_MOST_OF = 0.5
"""Rounding, or clipping, is to blame if an error is at most this share of itself beside it."""
_ONE_HOT = 0.99
_LEAST_VALUES = 8
"""A factor of its own for each channel says nothing about fewer values than this in each."""


@dataclass(frozen=True)
class Cause:
    name: str
    """One of this module's constants."""
    operation: Operation | None
    figures: Mapping[str, float | str] = field(default_factory=dict)


def find_cause(evidence: Evidence) -> Cause:
    """Name the first cause that the evidence bears out; `UNKNOWN`, with figures, where none is."""
    if not bool(evidence.made.isfinite().all()):
        return _not_finite(evidence)
    rules = (_overflow, _saturated, _rounded, _attention, _transposed, _scale, _offset, _low_precision)
    for rule in rules:
        cause = rule(evidence)
        if cause:
            return cause
    largest = float((evidence.made.double() - evidence.expected.double()).abs().max())
    return Cause(UNKNOWN, principal(evidence.unproved), {"largest difference": largest})


def _not_finite(evidence: Evidence) -> Cause:
    broken = [(op, tensor) for op, tensor in evidence.inner if not bool(tensor.isfinite().all())]
    peak = float(evidence.expected.abs().max())
    operation, tensor = broken[0] if broken else (principal(evidence.unproved), evidence.made)
    figures: dict[str, float | str] = {"largest in eager": peak, "not finite": _share(~tensor.isfinite())}
    narrow = str(tensor.dtype) == "torch.float16" or evidence.precision == "fp16"
    return Cause(OVERFLOW if narrow and peak > LARGEST_FLOAT16 else NOT_FINITE, operation, figures)


def _overflow(evidence: Evidence) -> Cause | None:
    """Recognise values that were held at float16's largest one."""
    peak, highest = float(evidence.expected.abs().max()), float(evidence.made.abs().max())
    if peak <= LARGEST_FLOAT16 or not math.isclose(highest, LARGEST_FLOAT16, rel_tol=1e-3):
        return None
    return Cause(OVERFLOW, principal(evidence.unproved), {"largest in eager": peak, "largest": highest})


def _rounded(evidence: Evidence) -> Cause | None:
    if evidence.rounded is None:
        return None
    left = relative_error(evidence.made, evidence.rounded)
    if left > _MOST_OF * evidence.error:
        return None
    return Cause(ROUNDED, principal(evidence.unproved), {"error beside the rounding": left})


def _saturated(evidence: Evidence) -> Cause | None:
    """Recognise grids that don't reach as far as what they round, where most of the error comes of that."""
    for rounding in evidence.roundings:
        share = _share(rounding.clipped)
        if share > _CLIPPED and _left_by_clipping(evidence, rounding) <= _MOST_OF * evidence.error:
            return Cause(SATURATED, rounding.operation, {"beyond the range": share})
    return None


def _left_by_clipping(evidence: Evidence, rounding: Rounding) -> float:
    """Return the relative error that is left if eager clips as well; where an output is clipped, that of what isn't."""
    import torch

    if evidence.module is not None and evidence.given is not None and torch.equal(rounding.given, evidence.given):
        with torch.no_grad():
            return relative_error(evidence.made, evidence.module(evidence.given.clamp(rounding.low, rounding.high)))
    if rounding.given.shape != evidence.made.shape:
        return math.inf
    return relative_error(evidence.made.where(~rounding.clipped, evidence.expected), evidence.expected)


def _attention(evidence: Evidence) -> Cause | None:
    """Recognise attention that looks at one token where eager looks at many."""
    values = {name: tensor for operation, tensor in evidence.inner for name in operation.outputs[:1]}
    softmaxes = [operation for operation, _ in evidence.inner if operation.kind == "Softmax"]
    for operation, attended in zip(softmaxes, evidence.attended, strict=False):
        got, expected = values[operation.outputs[0]].float(), attended.shares
        if got.numel() != expected.numel() or operation.inputs[0] not in values:
            continue
        got = got.reshape(expected.shape)
        factor, left = _factor(
            _centred(values[operation.inputs[0]].float().reshape(expected.shape)), _centred(attended.scores)
        )
        figures: dict[str, float | str] = {
            "rows on one token": _share(got.amax(-1) > _ONE_HOT),
            "rows on one token in eager": _share(expected.amax(-1) > _ONE_HOT),
        }
        if left < EXPLAINED and abs(factor - 1) > _LEAST_CHANGE:
            return Cause(ATTENTION if factor > 1 else SCALE, operation, figures | {"scores times": factor})
        if _entropy(got) < 0.5 * _entropy(expected):
            return Cause(ATTENTION, operation, figures)
    return None


def _centred(scores: Tensor) -> Tensor:
    """Take off each row's mean, which softmax doesn't see; what is masked becomes nought."""
    seen = scores > -1e30  # noqa: PLR2004 - masks are the least float, or minus infinity
    kept = scores.where(seen, scores.new_zeros(()))
    mean = kept.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    return (kept - mean).where(seen, scores.new_zeros(()))


def _entropy(shares: Tensor) -> float:
    return float(-(shares * shares.clamp_min(1e-30).log()).sum(-1).mean())


def _transposed(evidence: Evidence) -> Cause | None:
    """Recognise a weight with two axes exchanged."""
    weight = getattr(evidence.module, "weight", None)
    if weight is None or evidence.given is None or weight.ndim < 2:  # noqa: PLR2004 - a matrix
        return None
    for axes in ((0, 1), (2, 3)):
        if weight.ndim > max(axes) and weight.shape[axes[0]] == weight.shape[axes[1]] > 1:
            turned = run_with(evidence.module, evidence.given, weight.transpose(*axes))
            left = relative_error(evidence.made, turned)
            if left < EXPLAINED * evidence.error:
                return Cause(TRANSPOSED, principal(evidence.unproved), {"error once transposed": left})
    return None


def run_with(module: nn.Module | None, given: Tensor, weight: Tensor) -> Tensor:
    """Return what a layer makes with another weight."""
    import torch

    assert module is not None  # noqa: S101 - it had a weight
    with torch.no_grad():
        made: Tensor = torch.func.functional_call(module, {"weight": weight}, (given,))
    return made


def _scale(evidence: Evidence) -> Cause | None:
    """Recognise a factor, of all or of each channel; a bias may have been added after it.

    Where a channel is nearly the same all over, a constant explains a factor and the other way round: the better one counts.
    """
    operation, by_offset = principal(evidence.unproved), _left_by_offset(evidence)
    for offset in _offsets(evidence):
        got, expected = evidence.made - offset, evidence.expected - offset
        factor, left = _factor(got, expected)
        if left < min(EXPLAINED * evidence.error, by_offset) and abs(factor - 1) > _LEAST_CHANGE:
            return Cause(SCALE, operation, {"factor": factor})
        factors, left = _channel_factors(got, expected, _channels(evidence))
        if got.numel() >= _LEAST_VALUES * len(factors) and left < min(EXPLAINED * evidence.error, by_offset):
            wrong = (factors - 1).abs() > _LEAST_CHANGE
            figures = {"factor, least": float(factors.min()), "factor, most": float(factors.max())}
            return Cause(SCALE, operation, {**figures, "channels": f"{int(wrong.sum())} of {len(factors)}"})
    return None


def _left_by_offset(evidence: Evidence) -> float:
    """Return the relative error that a constant for each channel leaves."""
    difference, constant = _constants(evidence)
    return float((difference - constant).norm() / evidence.made.double().norm().clamp_min(1e-30))


def _constants(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Return what was made too much in each channel (C, …), and its mean (C, 1)."""
    difference = (evidence.made - evidence.expected).movedim(_channels(evidence), 0).flatten(1).double()
    return difference, difference.mean(1, keepdim=True)


def _offset(evidence: Evidence) -> Cause | None:
    """Recognise a constant that was added to each channel."""
    difference, constant = _constants(evidence)
    if difference.shape[1] < _LEAST_VALUES:
        return None
    if float((difference - constant).norm()) > EXPLAINED * float(difference.norm()):
        return None
    return Cause(OFFSET, principal(evidence.unproved), {"largest difference": float(constant.abs().max())})


def _low_precision(evidence: Evidence) -> Cause | None:
    """Recognise the error that the layer has in bfloat16 or float16, or that rounding between layers makes."""
    import torch

    if evidence.module is None or evidence.given is None:
        return _rounded_between(evidence)
    for dtype in (torch.bfloat16, torch.float16):
        usual = relative_error(_computed_in(evidence.module, evidence.given, dtype), evidence.expected)
        if _LIKE[0] * usual < evidence.error < _LIKE[1] * usual:
            loses = "Norm" in type(evidence.module).__name__ and usual > _LOST * _rounding(evidence.expected, dtype)
            name = NORM if loses else LOW_PRECISION
            figures: dict[str, float | str] = {"dtype": str(dtype).removeprefix("torch."), "error of that": usual}
            if name == NORM:
                figures["mean over deviation"] = _mean_over_deviation(evidence.given)
            return Cause(name, principal(evidence.unproved), figures)
    return None


def _rounded_between(evidence: Evidence) -> Cause | None:
    """Recognise operations in a narrow dtype that err as much as rounding after each of them may."""
    floats = {tensor.dtype for _, tensor in evidence.inner if tensor.is_floating_point()}
    for dtype in (each for each in floats if each.itemsize == _HALF_BYTES):
        usual = _rounding(evidence.expected, dtype)
        if evidence.error < _LOST * math.sqrt(len(evidence.inner)) * usual:
            figures: dict[str, float | str] = {"dtype": str(dtype).removeprefix("torch."), "error of that": usual}
            return Cause(LOW_PRECISION, principal(evidence.unproved), figures)
    return None


def _rounding(tensor: Tensor, dtype: torch.dtype) -> float:
    """Return the relative error that a dtype has of a tensor."""
    return relative_error(tensor.to(dtype).float(), tensor)


def _computed_in(module: nn.Module, given: Tensor, dtype: torch.dtype) -> Tensor:
    import torch

    fed = given.to(dtype) if given.is_floating_point() else given
    with torch.no_grad():
        made: Tensor = copy.deepcopy(module).to(dtype)(fed)
    return made.float()


def _mean_over_deviation(given: Tensor) -> float:
    rows = given.double().flatten(1)
    return float((rows.mean(1).abs() / rows.std(1).clamp_min(1e-30)).max())


def _offsets(evidence: Evidence) -> list[Tensor]:
    """Return what may have been added after a factor: nothing, or the layer's bias."""
    nothing = evidence.made.new_zeros(())
    bias = getattr(evidence.module, "bias", None)
    if bias is None:
        return [nothing]
    shape = [1] * evidence.made.ndim
    shape[_channels(evidence)] = -1
    return [bias.detach().reshape(shape), nothing]


def _channels(evidence: Evidence) -> int:
    """Return the axis of channels: the second one of feature maps, of pictures or films, the last one of tokens."""
    return 1 if evidence.made.ndim >= 4 else -1  # noqa: PLR2004 - batch, channels, (frames,) height, width


def _factor(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the factor of the least squared error, and the relative error that it leaves."""
    factors, left = _factors(got.flatten()[None], expected.flatten()[None])
    return float(factors[0]), left


def _channel_factors(got: Tensor, expected: Tensor, axis: int) -> tuple[Tensor, float]:
    return _factors(got.movedim(axis, 0).flatten(1), expected.movedim(axis, 0).flatten(1))


def _factors(got: Tensor, expected: Tensor) -> tuple[Tensor, float]:
    got, expected = got.double(), expected.double()
    factors = (got * expected).sum(1) / expected.square().sum(1).clamp_min(1e-30)
    left = (got - factors[:, None] * expected).norm() / got.norm().clamp_min(1e-30)
    return factors, float(left)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
