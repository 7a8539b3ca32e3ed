"""Rounded activations in an OpenVINO graph: FakeQuantize of calibrated ranges, which plugins turn into integers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..quantize.grid import LEAST, MOST
from .openvino_weights import TENSOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ..quantize.grid import Grid, Grids
    from ..weights import Entry

_ROUNDING = {"MatMul", "Convolution"}
_BITS = 8
_LAYOUT = {"Reshape", "Transpose"}
_STORED = {"Constant", "Parameter"}
_SMALL_HEAD = 32


def round_activations(  # openvino is untyped
    model: Any,  # noqa: ANN401
    entries: Sequence[Entry],
    grids: Mapping[str, Grids],
) -> None:
    """Let calibrated layers round what they are given: FakeQuantize, which the plugins turn into 8-bit integers.

    Each activation is rounded once for all layers that take it on the same grid.
    """
    layers = {f"{TENSOR}{number}": entry.name.removesuffix(".weight") for number, entry in enumerate(entries)}
    _round_attention(model, layers, grids)
    rounded: dict[tuple[str, int, Grid], Any] = {}
    for parameter in model.get_parameters():
        layer = layers.get(parameter.get_friendly_name())
        if layer is None or layer not in grids or not _is_whole(parameter, entries):
            continue
        grid, _ = grids[layer]
        for target in parameter.output(0).get_target_inputs():
            operation = target.get_node()
            if operation.get_type_name() not in _ROUNDING or target.get_index() != 1:
                continue
            given = operation.input_value(0)
            key = (given.get_node().get_friendly_name(), given.get_index(), grid)
            if key not in rounded:
                rounded[key] = _rounded(given, grid)
            operation.input(0).replace_source_output(rounded[key].output(0))


def _round_attention(model: Any, layers: Mapping[str, str], grids: Mapping[str, Grids]) -> None:  # noqa: ANN401
    """Let calibrated layers that make queries and keys round these, so that attention's first product is of integers.

    They are rounded before they are laid out by heads: bytes are moved then. Probabilities stay as they are: of 255 steps
    from 0 to 1, thousands of small ones in a row would keep nothing. Small heads stay as they are: OpenVINO 2026.4 gets the
    product wrong on processors with AMX where there are as many keys as a head has channels, and no more than 32.
    """
    for attention in model.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention" or not _has_large_heads(attention):
            continue
        for given in (attention.input_value(0), attention.input_value(1)):
            made = _before_layout(given)
            layer = _layer_of(made, layers) or ""
            after = grids[layer][1] if layer in grids else None
            if after is not None:
                users = made.get_target_inputs()
                rounded = _rounded(made, after)
                for user in users:
                    user.replace_source_output(rounded.output(0))


def _has_large_heads(attention: Any) -> bool:  # noqa: ANN401
    channels = attention.input_value(1).get_partial_shape()[-1]
    return bool(channels.is_static) and channels.get_length() > _SMALL_HEAD


def _rounded(value: Any, grid: Grid) -> Any:  # noqa: ANN401
    """Round a value; the steps of channels, along its second axis, are left to the weights of what takes it.

    Around nought on an even grid, so that the plugin makes signed bytes of it: with AMX its kernels for matrices take
    0.8 of the time that they take for unsigned ones, with AVX512-VNNI alone 1.08.
    """
    from openvino import opset13

    ends = [np.float32(code - grid.zeros[0]) for code in (LEAST, MOST)]
    steps = np.asarray(grid.steps, dtype=np.float32)
    given = [end * (steps.reshape(1, -1, 1, 1) if grid.by_channel else steps[0]) for end in ends]
    made = ends if grid.by_channel else given
    return opset13.fake_quantize(value, *map(opset13.constant, (*given, *made)), levels=MOST - LEAST + 1)


def shortened(grids: Mapping[str, Grids]) -> dict[str, Grids]:
    """Return grids with steps that the plugin computes with as they are: for activations, and for weights that take them."""
    return {
        layer: (_with_short_steps(before), _with_short_steps(after) if after else None)
        for layer, (before, after) in grids.items()
    }


def _with_short_steps(grid: Grid) -> Grid:
    return replace(grid, steps=tuple(_short(np.asarray(grid.steps, dtype=np.float32)).tolist()))


def _short(steps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the nearest steps of 8 significant bits, with which nought stays nought: a grid 0.4 % finer or coarser at most.

    Where the plugin rounds in float32 it takes the step from the ends, and what comes out for nought is some millionths of a
    step, of which norms without a mean make whole numbers. Found by trial: of 240 random steps 173 did so with 24 bits,
    23 with 16, none with 8, nor of 4,500 more.
    """
    mantissas, exponents = np.frexp(steps)
    return np.ldexp(np.round(np.ldexp(mantissas, _BITS)), exponents - _BITS)


def _is_whole(parameter: Any, entries: Sequence[Entry]) -> bool:  # noqa: ANN401
    """Say whether a weight is in the graph as it is in the checkpoint: else it stays a float, in another shape."""
    entry = entries[int(parameter.get_friendly_name().removeprefix(TENSOR))]
    return tuple(parameter.get_output_shape(0)) == tuple(entry.shape)


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
