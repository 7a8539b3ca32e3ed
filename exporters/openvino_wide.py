"""Layers that a recipe has in float32 among others in less, marked in an OpenVINO graph so that its CPU plugin heeds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..quantize.mixture import Mixture

_MARK = "precise_0"
_CONVOLUTIONS = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData"}
_CHANNELS = 1


def keep_wide(model: Any, layers: Mapping[str, list[str]], mixture: Mixture) -> None:  # noqa: ANN401 - openvino is untyped
    """Mark the operations of layers that the recipe has in float32.

    The plugin loses marks of what it fuses or takes apart, so products are kept from their biases and group norms are taken
    apart here. Convolutions are kept from sums: OpenVINO 2026.4 fuses these, and adds bfloat16 to float32 as if it were that,
    which makes NaN, or shapes of nought, or doesn't compile.
    """
    wide = {name for layer, names in layers.items() if mixture.layers.get(layer) == "fp32" for name in names}
    for operation in model.get_ordered_ops() if wide else []:
        if operation.get_friendly_name() in wide:
            _marked(operation)
            kind = operation.get_type_name()
            if kind == "MatMul":
                _limit(operation)
            elif kind in _CONVOLUTIONS:
                _keep_from_sums(operation, wide)
            elif kind == "GroupNormalization":
                _take_apart(operation)


def _marked(operation: Any) -> Any:  # noqa: ANN401
    operation.get_rt_info()[_MARK] = ""
    return operation


def _sums(made: Any) -> list[Any]:  # noqa: ANN401
    """Return the inputs of sums that an operation's result goes into."""
    targets = made.output(0).get_target_inputs()
    return [target for target in targets if target.get_node().get_type_name() == "Add"]


def _keep_from_sums(made: Any, wide: set[str]) -> None:  # noqa: ANN401
    """Keep a convolution, or it and its bias, from other sums, and have these in float32, too."""
    sums = (target.get_node() for target in _sums(made))
    made = next((each for each in sums if each.get_friendly_name() in wide), made)  # with its bias
    for target in _sums(made):
        _marked(target.get_node())
    _limit(made)


def _limit(made: Any) -> None:  # noqa: ANN401
    """Put limits that no value reaches before the sums that take a result: the plugin fuses nothing over these, and leaves them."""
    from openvino import opset13

    targets = _sums(made)
    if targets:
        most = float(np.finfo(np.float32).max)
        limited = _marked(opset13.clamp(made, -most, most))
        for target in targets:
            target.replace_source_output(limited.output(0))


def _take_apart(norm: Any) -> None:  # noqa: ANN401
    """Normalise a group's channels as one row, then scale and shift each channel: Wu and He, 2018, "Group Normalization"."""
    from openvino import opset13

    given, scale, shift = norm.input_values()
    about, rank = norm.get_attributes(), given.get_partial_shape().rank.get_length()
    rows = opset13.reshape(given, opset13.constant(np.array([0, about["num_groups"], -1])), special_zero=True)
    normal = opset13.mvn(
        rows, opset13.constant([2]), normalize_variance=True, eps=about["epsilon"], eps_mode="INSIDE_SQRT"
    )
    back = opset13.reshape(normal, opset13.shape_of(given), special_zero=False)
    channels = np.ones(rank, dtype=np.int64)
    channels[_CHANNELS] = -1
    by_channel = [opset13.reshape(each, opset13.constant(channels), special_zero=False) for each in (scale, shift)]
    scaled = opset13.multiply(back, by_channel[0])
    shifted = opset13.add(scaled, by_channel[1])
    for made in (rows, normal, back, *by_channel, scaled, shifted):
        _marked(made)
    _replace(norm, shifted)


def _replace(old: Any, new: Any) -> None:  # noqa: ANN401
    """Let an operation take another's place, of whose outputs it may be made, and its names."""
    name, names = old.get_friendly_name(), old.output(0).get_names()
    for target in old.output(0).get_target_inputs():
        if target.get_node() != new:
            target.replace_source_output(new.output(0))
    old.set_friendly_name(f"{name} before")
    new.set_friendly_name(name)
    if names:
        old.output(0).get_tensor().set_names(set())
        new.output(0).get_tensor().set_names(names)
