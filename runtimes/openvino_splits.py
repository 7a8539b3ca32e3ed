"""Products whose outputs are split, as gated linear units do, made products of their own before a model is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_SPLITS = {"Split", "VariadicSplit"}
_MARKS = {"decompression_0"}
"""What a conversion to float32 is marked with that compiling leaves to the kernels."""
_WIDE = {"precise_0", "DisablePrecisionConversion_0"}
"""What a product is marked with that is to stay in float32, as it is set and as it is read: a new one can't be marked."""
_TOKENS = 3
"""Rank of the activations that it pays for; splitting a vector costs nothing."""


def split_weights(model: Any) -> int:  # noqa: ANN401 - openvino is untyped
    """Split weights instead of what they make; return of how many products.

    The CPU plugin copies what it splits, and computes an activation function by itself behind a copy but within a product.
    Each part's weight is a view of the whole one, which has to live as long as what is compiled: nothing is copied here.
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
    made, axis = split.input_value(0), split.input_value(1).get_node()
    rank = made.get_partial_shape().rank
    if rank.is_dynamic or rank.get_length() != _TOKENS or axis.get_type_name() != "Constant":
        return False
    if axis.data.item() % _TOKENS != _TOKENS - 1 or any(
        output.get_partial_shape()[-1].is_dynamic for output in split.outputs()
    ):
        return False
    product, biases = made.get_node(), []
    if product.get_type_name() == "Add":
        if len(made.get_target_inputs()) != 1:
            return False
        product, biases = product.input_value(0).get_node(), [product.input_value(1)]
    alone = product.get_output_size() == 1 and len(product.output(0).get_target_inputs()) == 1
    if product.get_type_name() != "MatMul" or not alone or _WIDE & set(product.get_rt_info()):
        return False
    layout = product.get_attributes()
    if layout["transpose_a"] or not layout["transpose_b"] or not _is_stored(product.input_value(1), _is_matrix):
        return False
    return all(_is_stored(bias, _is_vector) for bias in biases)


def _is_stored(value: Any, fits: Callable[[list[int]], bool]) -> bool:  # noqa: ANN401
    """Say whether a value is a constant, perhaps widened and scaled, of which some outputs can be taken."""
    node = value.get_node()
    if node.get_type_name() == "Constant":
        return bool(node.get_element_type().bitwidth >= 8) and fits(list(node.get_output_shape(0)))  # noqa: PLR2004 - of a byte
    stored = node.get_type_name() in {"Convert", "Multiply"}
    return stored and all(_is_stored(each, fits) for each in node.input_values())


def _is_matrix(shape: list[int]) -> bool:
    """Say whether it is a weight or its scales, whose first axis is that of outputs."""
    return len(shape) in {0, 2}


def _is_vector(shape: list[int]) -> bool:
    """Say whether it has no axis but its last: parts of it are views, then."""
    return all(size == 1 for size in shape[:-1])


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
    part = data[start:end] if axis == 0 else data[..., start:end]
    return openvino.op.Constant(openvino.Tensor(part, part.shape, node.get_element_type()), shared_memory=True)
