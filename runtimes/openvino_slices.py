"""Some of the outputs of a product with a weight: what a graph makes, made of views of what it has stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_MARKS = {"decompression_0"}
"""What a conversion to float32 is marked with that compiling leaves to the kernels."""
_WIDE = {"precise_0", "DisablePrecisionConversion_0"}
"""What an operation is marked with that is to stay in float32, as it is set and as it is read: a new one can't be marked."""
_TOKENS = 3
"""Rank of the activations that slices pay for: one of a vector's product saves nothing."""


def is_of_weights(made: Any) -> bool:  # noqa: ANN401 - openvino is untyped
    """Say whether this is a product of tokens with a stored weight, and perhaps a bias, of which slices can be taken.

    Its outputs are the last axis. Nothing else takes the product that a bias is added to; of what is made, look yourself.
    """
    rank = made.get_partial_shape().rank
    if rank.is_dynamic or rank.get_length() != _TOKENS:
        return False
    product, biases = made.get_node(), []
    if product.get_type_name() == "Add":
        product, biases = product.input_value(0).get_node(), [product.input_value(1)]
        if len(product.output(0).get_target_inputs()) != 1:
            return False
    if product.get_type_name() != "MatMul" or is_to_stay_wide(product):
        return False
    layout = product.get_attributes()
    if layout["transpose_a"] or not layout["transpose_b"] or not _is_stored(product.input_value(1), _is_matrix):
        return False
    return all(is_stored_vector(bias) for bias in biases)


def is_to_stay_wide(operation: Any) -> bool:  # noqa: ANN401
    """Say whether an operation is marked, as what is made in its place can't be."""
    return bool(_WIDE & set(operation.get_rt_info()))


def is_stored_vector(value: Any) -> bool:  # noqa: ANN401
    """Say whether a value is stored, and has no axis but its last."""
    return _is_stored(value, _is_vector)


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
    """Say whether it has no axis but its last: slices of it are views, then."""
    return all(size == 1 for size in shape[:-1])


def sliced(value: Any, start: int, end: int) -> Any:  # noqa: ANN401
    """Return a product, and the bias added to it, of these outputs alone."""
    from openvino import opset13

    node = value.get_node()
    if node.get_type_name() == "Add":
        return opset13.add(sliced(node.input_value(0), start, end), stored_slice(node.input_value(1), start, end))
    weight = _taken(node.input_value(1), start, end, 0)
    made = opset13.matmul(node.input_value(0), weight, transpose_a=False, transpose_b=True)
    made.set_friendly_name(f"{node.get_friendly_name()} of {start} to {end}")
    return made


def stored_slice(value: Any, start: int, end: int) -> Any:  # noqa: ANN401
    """Return these places of a stored vector's last axis."""
    return _taken(value, start, end, -1)


def _taken(value: Any, start: int, end: int, axis: int) -> Any:  # noqa: ANN401
    """Return what a stored value has at these places of an axis: a view, which the whole has to outlive."""
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
    some = data[start:end] if axis == 0 else data[..., start:end]
    return openvino.op.Constant(openvino.Tensor(some, some.shape, node.get_element_type()), shared_memory=True)
