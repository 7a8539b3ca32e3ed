"""What an OpenVINO part consists of, and the tensors inside of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layers import read_layers
from .runtime import Operation

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def operations(model: Any, folder: Path) -> list[Operation]:  # noqa: ANN401 - openvino is untyped
    """Return the model's operations, as `Runtime.operations` does; inputs under the names that the interface has."""
    layers = read_layers(folder)
    found = []
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind not in {"Constant", "Parameter", "Result"}:
            name = operation.get_friendly_name()
            inputs = tuple(_tensor(each.get_source_output()) for each in operation.inputs())
            outputs = tuple(_tensor(each) for each in operation.outputs())
            found.append(Operation(name, kind, inputs, outputs, layers.get(name)))
    return found


def _tensor(output: Any) -> str:  # noqa: ANN401 - openvino is untyped
    name: str = output.get_node().get_friendly_name()
    return f"{name}:{output.get_index()}" if output.get_index() else name


def tap(
    model: Any,  # noqa: ANN401 - openvino is untyped
    device: str,
    settings: dict[str, Any],
    inputs: dict[str, Tensor],
    names: list[str],
) -> dict[str, Tensor]:
    """Run a model as far as these tensors."""
    import openvino
    import torch

    outputs = {_tensor(output): output for node in model.get_ordered_ops() for output in node.outputs()}
    cut = openvino.Model([outputs[name] for name in names], model.get_parameters(), "tapped")
    compiled = openvino.Core().compile_model(cut, device, settings)
    results = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(results[index].copy()) for index, name in enumerate(names)}
