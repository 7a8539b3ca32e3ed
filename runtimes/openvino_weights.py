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
    """Add LoRAs to a model's weights, each as precise as it is stored; int8 ones become bfloat16."""
    from openvino import opset13

    operations = {operation.get_friendly_name(): operation for operation in model.get_ops()} if deltas else {}
    for name, additions in deltas.items():
        value, last = _read(name, operations)
        new = opset13.constant(added(value, additions).float().numpy(), name=f"{name} with LoRAs")
        for target in last.output(0).get_target_inputs():
            target.replace_source_output(new.output(0))


def _read(name: str, operations: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a weight in the dtype that it is stored in, and the operation that gives it in float32."""
    import numpy as np
    import torch

    weight = torch.from_numpy(operations[name].get_data(dtype=np.float32, copy=True))
    if f"{name}/dequantized" in operations:
        scale = torch.from_numpy(operations[f"{name}/scale"].get_data(dtype=np.float32, copy=True))
        return (weight * scale).bfloat16(), operations[f"{name}/dequantized"]
    if f"{name}/float32" in operations:
        return weight.bfloat16(), operations[f"{name}/float32"]
    return weight, operations[name]
