"""Rounded activations in an OpenVINO graph: FakeQuantize with calibrated scales, which plugins turn into integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .openvino_weights import TENSOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..weights import Entry

_ROUNDING = {"MatMul", "Convolution"}
_LAYOUT = {"Reshape", "Transpose"}
_STORED = {"Constant", "Parameter"}
_SIGNED, _UNSIGNED = (-128, 127), (-127, 128)
"""Whole multiples of a scale: the plugin makes bytes around nought of the former, and around 127 of the latter, which its
kernels for matrices are quicker with."""


def round_activations(  # openvino is untyped
    model: Any,  # noqa: ANN401
    entries: Sequence[Entry],
    scales: Mapping[str, tuple[float, float]],
) -> None:
    """Let calibrated layers round what they are given: FakeQuantize, which the plugins turn into 8-bit integers.

    Each activation is rounded once for all layers that take it with the same scale.
    """
    layers = {f"{TENSOR}{number}": entry.name.removesuffix(".weight") for number, entry in enumerate(entries)}
    _round_attention(model, layers, scales)
    rounded: dict[tuple[str, int, float, tuple[int, int]], Any] = {}
    for parameter in model.get_parameters():
        layer = layers.get(parameter.get_friendly_name())
        if layer is None or layer not in scales:
            continue
        scale, _ = scales[layer]
        for target in parameter.output(0).get_target_inputs():
            operation = target.get_node()
            if operation.get_type_name() not in _ROUNDING or target.get_index() != 1:
                continue
            given = operation.input_value(0)
            codes = _UNSIGNED if operation.get_type_name() == "MatMul" else _SIGNED
            key = (given.get_node().get_friendly_name(), given.get_index(), scale, codes)
            if key not in rounded:
                rounded[key] = _rounded(given, scale, codes)
            operation.input(0).replace_source_output(rounded[key].output(0))


def _round_attention(model: Any, layers: Mapping[str, str], scales: Mapping[str, tuple[float, float]]) -> None:  # noqa: ANN401
    """Let calibrated layers that make queries and keys round these, so that attention's first product is of integers.

    They are rounded before they are laid out by heads: bytes are moved then. Probabilities stay as they are: of 255 steps
    from 0 to 1, thousands of small ones in a row would keep nothing.
    """
    for attention in model.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention":
            continue
        for given in (attention.input_value(0), attention.input_value(1)):
            made = _before_layout(given)
            layer = _layer_of(made, layers)
            if layer is not None and layer in scales:
                users = made.get_target_inputs()
                rounded = _rounded(made, scales[layer][1], _SIGNED)
                for user in users:
                    user.replace_source_output(rounded.output(0))


def _rounded(value: Any, scale: float, codes: tuple[int, int]) -> Any:  # noqa: ANN401
    import numpy as np
    from openvino import opset13

    least, most = (opset13.constant(np.float32(step * scale)) for step in codes)
    return opset13.fake_quantize(value, least, most, least, most, levels=256)


def _before_layout(value: Any) -> Any:  # noqa: ANN401
    """Go back over reshapes and transpositions that only one operation takes."""
    while value.get_node().get_type_name() in _LAYOUT and len(value.get_target_inputs()) == 1:
        value = value.get_node().input_value(0)
    return value


def _layer_of(made: Any, layers: Mapping[str, str]) -> str | None:  # noqa: ANN401
    """Return the layer that makes a value: a product with its weight, and perhaps a bias."""
    operation = made.get_node()
    if operation.get_type_name() == "Add" and operation.input_value(1).get_node().get_type_name() in _STORED:
        operation = operation.input_value(0).get_node()
    if operation.get_type_name() != "MatMul" or len(made.get_target_inputs()) != 1:
        return None
    return layers.get(operation.input_value(1).get_node().get_friendly_name())
