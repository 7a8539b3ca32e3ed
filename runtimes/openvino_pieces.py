"""Products whose weight is more than a core's cache holds, computed in pieces before a model is compiled."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np

from .openvino_slices import is_of_weights, is_stored_vector, is_to_stay_wide, sliced, stored_slice

_MOST_BYTES = 800 * 1024
"""Of a piece's weight: two fifths of the second cache of cores with AMX, where products were quickest."""
_MOST_PIECES = 16
"""From where more of them take as long to compile as they save."""
_MULTIPLE = 64
"""Outputs of a piece are a multiple of: what the kernels compute at once."""
_WIDENING = 2
"""Outputs to inputs, from where pieces pay: they have to be put together again."""
_OF_ONE = {"Gelu", "Swish", "FakeQuantize"}
_BY_THEMSELVES = {*_OF_ONE, "Add", "Multiply"}
"""Operations on each output by itself, of one value, and of two."""


def cut_in_pieces(model: Any, most_bytes: int = _MOST_BYTES, multiple: int = _MULTIPLE) -> int:  # noqa: ANN401 - openvino is untyped
    """Let products that widen their inputs, as a feed-forward's first does, be of some outputs at a time; return how many.

    All that is done to each output by itself, its activation function, gate and rounding, is done to the piece, which is in
    the caches still. With AMX a product of 2,048 tokens with 1280 x 5120 bytes takes 0.6 of its time so, in bfloat16 0.8.
    Pieces are views of the whole weight, which has to live as long as what is compiled.
    """
    found = [made for made in map(_last_of_outputs, model.get_ordered_ops()) if made is not None]
    pieces = [_count(made, most_bytes, multiple) for made in found]
    for made, count in zip(found, pieces, strict=True):
        if count > 1:
            _cut(made, count)
    return sum(count > 1 for count in pieces)


def _last_of_outputs(operation: Any) -> Any:  # noqa: ANN401
    """Return what an operation makes, if it is of a product's outputs, each by itself, and what takes it isn't."""
    if operation.get_output_size() != 1:
        return None
    made = operation.output(0)
    takers = [target.get_node() for target in made.get_target_inputs()]
    goes_on = any(taker.get_type_name() in _BY_THEMSELVES and _products(taker.output(0)) for taker in takers)
    return made if _products(made) and not goes_on else None


def _products(made: Any) -> list[Any]:  # noqa: ANN401
    """Return the products of whose outputs a value is made, each output of theirs by itself: none, if it isn't."""
    node = made.get_node()
    if is_of_weights(made):
        return [node.input_value(0).get_node() if node.get_type_name() == "Add" else node]
    kind = node.get_type_name()
    given = node.input_values()
    if is_to_stay_wide(node):
        return []
    if kind == "Multiply":
        sides = [_products_of_one_taker(each) for each in given]
        return [product for side in sides for product in side] if all(sides) else []
    if kind in _OF_ONE and all(is_stored_vector(each) for each in given[1:]):
        return _products_of_one_taker(given[0])
    return []


def _products_of_one_taker(made: Any) -> list[Any]:  # noqa: ANN401
    return _products(made) if len(made.get_target_inputs()) == 1 else []


def _count(made: Any, most_bytes: int, multiple: int) -> int:  # noqa: ANN401
    """Return of how many pieces a value is made: of one, where more don't pay."""
    products, outputs = _products(made), _outputs(made)
    if outputs < _WIDENING * max(_shape(product)[1] for product in products):
        return 1
    fewest = min(ceil(max(map(_bytes, products)) / most_bytes), _MOST_PIECES)
    return next((n for n in range(fewest, 2 * _MOST_PIECES) if outputs % (n * multiple) == 0), 1)


def _cut(made: Any, pieces: int) -> None:  # noqa: ANN401
    """Replace a value by its pieces."""
    from openvino import opset13

    outputs = _outputs(made)
    length = outputs // pieces
    takers = made.get_target_inputs()
    joined = opset13.concat([_piece(made, start, start + length) for start in range(0, outputs, length)], -1).output(0)
    for target in takers:
        target.replace_source_output(joined)


def _outputs(made: Any) -> int:  # noqa: ANN401
    count: int = made.get_partial_shape()[-1].get_length()
    return count


def _shape(product: Any) -> list[int]:  # noqa: ANN401
    """Return outputs and inputs of a product's weight."""
    return list(product.input_value(1).get_shape())


def _bytes(product: Any) -> int:  # noqa: ANN401
    """Return what a product's weight takes where it is multiplied: a byte each where its inputs are rounded, else two."""
    rounded = product.input_value(0).get_node().get_type_name() == "FakeQuantize"
    return int(np.prod(_shape(product))) * (1 if rounded else 2)


def _piece(made: Any, start: int, end: int) -> Any:  # noqa: ANN401
    """Return a value's outputs from one to another, made of theirs alone."""
    from openvino import opset13

    if is_of_weights(made):
        return sliced(made, start, end)
    node = made.get_node()
    kind = node.get_type_name()
    if kind == "Multiply":
        return opset13.multiply(*(_piece(each, start, end) for each in node.input_values()))
    given = _piece(node.input_value(0), start, end)
    rest = [stored_slice(each, start, end) for each in node.input_values()[1:]]
    if kind == "FakeQuantize":
        return opset13.fake_quantize(given, *rest, levels=node.get_attributes()["levels"])
    if kind == "Gelu":
        return opset13.gelu(given, node.get_attributes()["approximation_mode"])
    return opset13.swish(given, *rest)
