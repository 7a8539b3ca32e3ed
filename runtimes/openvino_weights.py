"""The checkpoint's tensors in an OpenVINO part, and other values for them before it is compiled."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

from ..sources.lora import added

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..sources.lora import Delta


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an IR's constants by name: those of the checkpoint have its names."""
    layers = ET.parse(file).getroot().iterfind("layers/layer[@type='Const']")  # noqa: S314 - entities aren't expanded
    return {
        layer.attrib["name"]: tuple(int(dim.text or 0) for dim in layer.iterfind("output/port/dim")) for layer in layers
    }


def adapt(model: Any, deltas: Mapping[str, Sequence[Delta]]) -> None:  # noqa: ANN401 - openvino is untyped
    """Add LoRAs to a model's weights, each as precise as it is stored; codes become bfloat16.

    Weights of convolutions that take each channel in steps of its own are of such steps, and so is what is added.
    """
    from openvino import opset13

    operations = {operation.get_friendly_name(): operation for operation in model.get_ops()} if deltas else {}
    for name, additions in deltas.items():
        value, last = _read(name, operations)
        targets = list(last.output(0).get_target_inputs())
        steps = _steps(targets)
        new = (added(value.float() / steps, additions) * steps).to(value.dtype).float()
        constant = opset13.constant(new.numpy(), name=f"{name} with LoRAs")
        for target in targets:
            target.replace_source_output(constant.output(0))


def _steps(targets: Sequence[Any]) -> Any:  # noqa: ANN401 - a torch tensor, or one number
    """Return what a weight's input channels were multiplied by, for inputs that are rounded to numbers of steps."""
    import torch

    given = next((target.get_node().input_value(0).get_node() for target in targets if target.get_index() == 1), None)
    if given is None or given.get_type_name() != "FakeQuantize":
        return 1.0
    before, after = (torch.from_numpy(given.input_value(index).get_node().data.copy()) for index in (1, 3))
    return before / after if before.numel() > 1 else 1.0


def _read(name: str, operations: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a weight in the dtype that it is stored in, and the operation that gives it in float32."""
    import numpy as np
    import torch

    weight = torch.from_numpy(operations[name].get_data(dtype=np.float32, copy=True))
    if f"{name}/dequantized" in operations:
        scale = torch.from_numpy(operations[f"{name}/scale"].get_data(dtype=np.float32, copy=True))
        return (weight * scale).bfloat16(), operations[f"{name}/dequantized"]
    if f"{name}/float32" in operations:
        stored = operations[name].get_element_type().to_string()
        return weight.half() if stored == "f16" else weight.bfloat16(), operations[f"{name}/float32"]
    return weight, operations[name]
