"""Products whose outputs are split, as gated linear units do, made products of their own before a model is compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

_SPLITS = {"Split", "VariadicSplit"}
_MARKS = {"decompression_0"}
"""What a conversion to float32 is marked with that compiling leaves to the kernels."""
_TOKENS = 3
"""Rank of the activations that it pays for; splitting a vector costs nothing."""


def split_weights(model: Any) -> int:  # noqa: ANN401 - openvino is untyped
    """Split weights instead of what they make; return of how many products.

    The CPU plugin copies what it splits, and computes an activation function by itself behind a copy but within a product.
    Each part's weight is a view of the whole one: nothing is copied here.
    """
    found = [split for split in model.get_ordered_ops() if split.get_type_name() in _SPLITS and _is_of_weights(split)]
    for split in found:
        end = 0
        for output in split.outputs():
            start, end = end, end + output.get_partial_shape()[-1].get_length()
            part = _part(split.input_value(0), start, end).output(0)
            for target in output.get_target_inputs():
                target.replace_source_output(part)
    return len(found)


def _is_of_weights(split: Any) -> bool:  # noqa: ANN401
    """Say whether a split is of a product with a weight, along its outputs, that nothing else takes."""
    made = split.input_value(0)
    rank = made.get_partial_shape().rank
    if (
        rank.is_dynamic
        or rank.get_length() != _TOKENS
        or int(split.input_value(1).get_node().data) % _TOKENS != _TOKENS - 1
    ):
        return False
    product, biases = made.get_node(), []
    if product.get_type_name() == "Add":
        if len(made.get_target_inputs()) != 1:
            return False
        product, biases = product.input_value(0).get_node(), [product.input_value(1)]
    alone = product.get_output_size() == 1 and len(product.output(0).get_target_inputs()) == 1
    if product.get_type_name() != "MatMul" or not alone or not product.get_attributes()["transpose_b"]:
        return False
    return all(map(_is_stored, (product.input_value(1), *biases)))


def _is_stored(value: Any) -> bool:  # noqa: ANN401
    """Say whether a value is a constant, perhaps widened and scaled, of which some outputs can be taken."""
    node = value.get_node()
    if node.get_type_name() == "Constant":
        return bool(node.get_element_type().bitwidth >= 8)  # noqa: PLR2004 - of a byte
    return node.get_type_name() in {"Convert", "Multiply"} and all(map(_is_stored, node.input_values()))


def _part(value: Any, start: int, end: int) -> Any:  # noqa: ANN401
    """Return a product, and the bias added to it, of these outputs alone."""
    from openvino import opset13

    node = value.get_node()
    if node.get_type_name() == "Add":
        return opset13.add(_part(node.input_value(0), start, end), _taken(node.input_value(1), start, end, -1))
    weight = _taken(node.input_value(1), start, end, 0)
    made = opset13.matmul(node.input_value(0), weight, transpose_a=False, transpose_b=True)
    made.set_friendly_name(f"{node.get_friendly_name()} of {start} to {end}")
    return made


def _taken(value: Any, start: int, end: int, axis: int) -> Any:  # noqa: ANN401
    """Return what a stored value has at these places of an axis."""
    import openvino
    from openvino import opset13

    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Multiply":
        return opset13.multiply(*(_taken(each, start, end, axis) for each in node.input_values()))
    if kind == "Convert":
        widened = opset13.convert(_taken(node.input_value(0), start, end, axis), node.get_element_type().to_string())
        for mark in _MARKS & set(node.get_rt_info()):
            widened.get_rt_info()[mark] = ""
        return widened
    data = node.data
    if data.ndim == 0 or data.shape[axis] == 1:
        return node
    part = data[start:end] if axis == 0 else np.ascontiguousarray(data[..., start:end])
    return openvino.op.Constant(openvino.Tensor(part, part.shape, node.get_element_type()), shared_memory=True)
