"""Gated layers kept apart where OpenVINO's fusion of them would end the process."""

from __future__ import annotations

from typing import Any

import numpy as np

_ACTIVATIONS = {"Gelu", "Swish"}
_ONE = np.nextafter(np.float32(1), np.float32(2))
"""So near to 1 that nothing changes in bfloat16, and not 1, which would be left out."""


def keep_gates_apart(model: Any) -> int:  # noqa: ANN401 - openvino is untyped
    """Let the two products of a gated layer be of different inputs, by name alone; return how many layers there were.

    On processors with AMX, OpenVINO 2026.4 makes one operation of such a layer in bfloat16, and divides its work by half the
    threads: by none, where there is one (SIGFPE as it is compiled). T5's and Gemma's are such layers.
    """
    from openvino import opset13

    found = [product for product in map(_gated, model.get_ordered_ops()) if product is not None]
    for product in found:
        given = opset13.multiply(product.input_value(0), opset13.constant(_ONE))
        given.set_friendly_name(f"{product.get_friendly_name()} given apart")  # the same one in each copy
        product.input(0).replace_source_output(given.output(0))
    return len(found)


def _gated(operation: Any) -> Any:  # noqa: ANN401
    """Return the product that a gate multiplies, if this is such a multiplication and both are products of one input."""
    if operation.get_type_name() != "Multiply":
        return None
    sides = [value.get_node() for value in operation.input_values()]
    for gate, product in (sides, sides[::-1]):
        if gate.get_type_name() not in _ACTIVATIONS or product.get_type_name() != "MatMul":
            continue
        other = gate.input_value(0).get_node()
        if other.get_type_name() == "MatMul" and other.input_value(0) == product.input_value(0):
            return product
    return None
