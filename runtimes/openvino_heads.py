"""Rounding around attention, moved to where processors with AMX are quickest: before a model is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ATTENTION = "ScaledDotProductAttention"
_LAYOUT = {"Reshape", "Transpose"}
_LARGE = 64
"""Channels of heads from which AMX multiplies bfloat16 as quickly within attention, where softmax takes most of the time."""


def leave_large_heads(model: Any) -> int:  # noqa: ANN401 - openvino is untyped
    """Take the rounding from queries and keys of large heads; return from how many values it was taken.

    With AMX, attention of 4,096 tokens and heads of 64 channels took 1.07 times bfloat16's time with rounded queries and keys,
    of 40 channels 0.83; without it 0.67 and 0.76. So an export rounds them, and what opens it for AMX doesn't.
    """
    taken = 0
    for attention in model.get_ordered_ops():
        if attention.get_type_name() == _ATTENTION and _has_large_heads(attention):
            taken += sum(_take_rounding_from(attention.input(position)) for position in (0, 1))
    return taken


def round_within_attention(model: Any) -> int:  # noqa: ANN401
    """Round what attention makes before its heads are put together, rather than behind; return how often.

    It is rounded within the attention then, and bytes are laid out. What comes out is the same, and not rounded to bfloat16
    in between: 0.98 of the step of SDXL's UNet in w8a8 with AMX; without it 1.04.
    """
    found = [each for each in model.get_ordered_ops() if each.get_type_name() == "FakeQuantize" and _is_of_tensor(each)]
    return sum(_round_before_layout(rounding) for rounding in found)


def _has_large_heads(attention: Any) -> bool:  # noqa: ANN401
    channels = attention.input_value(1).get_partial_shape()[-1]
    return bool(channels.is_static) and channels.get_length() >= _LARGE


def _take_rounding_from(taker: Any) -> bool:  # noqa: ANN401
    """Let a place take what was rounded for it alone, before it was laid out by heads."""
    taker = _before_layout(taker)
    rounding = taker.get_source_output().get_node()
    if rounding.get_type_name() != "FakeQuantize" or not _keeps_scale(rounding):
        return False
    taker.replace_source_output(rounding.input_value(0))
    return True


def _round_before_layout(rounding: Any) -> bool:  # noqa: ANN401
    """Move a rounding over the layout of what attention makes, unless something else takes that, too."""
    from openvino import opset13

    last = rounding.input_value(0)
    place = _before_layout(rounding.input(0))
    made = place.get_source_output()
    if (
        place == rounding.input(0)
        or made.get_node().get_type_name() != _ATTENTION
        or len(made.get_target_inputs()) != 1
    ):
        return False
    takers = rounding.output(0).get_target_inputs()
    levels = rounding.get_attributes()["levels"]
    moved = opset13.fake_quantize(made, *rounding.input_values()[1:], levels=levels)
    moved.set_friendly_name(f"{made.get_node().get_friendly_name()} rounded")
    place.replace_source_output(moved.output(0))
    for taker in takers:
        taker.replace_source_output(last)
    return True


def _before_layout(taker: Any) -> Any:  # noqa: ANN401
    """Go back from where a value is taken over reshapes and transpositions that nothing else takes."""
    while True:
        made = taker.get_source_output()
        if made.get_node().get_type_name() not in _LAYOUT or len(made.get_target_inputs()) != 1:
            return taker
        taker = made.get_node().input(0)


def _is_of_tensor(rounding: Any) -> bool:  # noqa: ANN401
    """Say whether a rounding has one step for all values."""
    ends = _ends(rounding)
    return bool(ends) and all(end.size == 1 for end in ends)


def _keeps_scale(rounding: Any) -> bool:  # noqa: ANN401
    """Say whether a rounding gives values in the units that it is given."""
    ends = _ends(rounding)
    return bool(ends) and all(map(np.array_equal, ends[:2], ends[2:]))


def _ends(rounding: Any) -> list[NDArray[np.float32]]:  # noqa: ANN401
    """Return from and to where a rounding takes values and gives them; nothing, if that isn't stored."""
    nodes = [end.get_node() for end in rounding.input_values()[1:]]
    return [node.data for node in nodes] if all(node.get_type_name() == "Constant" for node in nodes) else []
