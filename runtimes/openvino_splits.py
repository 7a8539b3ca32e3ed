"""Products whose outputs are split, as gated linear units do, made products of their own before a model is compiled."""

from __future__ import annotations

from typing import Any

from .openvino_slices import is_of_weights, sliced

_SPLITS = {"Split", "VariadicSplit"}


def split_weights(model: Any) -> int:  # noqa: ANN401 - openvino is untyped
    """Split weights instead of what they make; return of how many products.

    The CPU plugin copies what it splits, and computes an activation function by itself behind a copy but within a product.
    Each part's weight is a view of the whole one, which has to live as long as what is compiled: nothing is copied here.
    """
    found = [split for split in model.get_ordered_ops() if split.get_type_name() in _SPLITS and _is_of_outputs(split)]
    for split in found:
        end = 0
        for output in split.outputs():
            start, end = end, end + output.get_partial_shape()[-1].get_length()
            made = sliced(split.input_value(0), start, end).output(0)
            for target in output.get_target_inputs():
                target.replace_source_output(made)
    return len(found)


def _is_of_outputs(split: Any) -> bool:  # noqa: ANN401
    """Say whether a split is of a product with a weight, along its outputs, that nothing else takes."""
    made, axis = split.input_value(0), split.input_value(1).get_node()
    if axis.get_type_name() != "Constant" or len(made.get_target_inputs()) != 1 or not is_of_weights(made):
        return False
    rank = made.get_partial_shape().rank.get_length()
    lengths = [output.get_partial_shape()[-1] for output in split.outputs()]
    return axis.data.item() % rank == rank - 1 and all(length.is_static for length in lengths)
