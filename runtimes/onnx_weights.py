"""The checkpoint's tensors in an ONNX part, and other values for them when a session opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..sources.lora import added
from ..weights import TORCH_DTYPES, read_header, read_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..sources.lora import Delta
    from ..weights import Entry


_CODES = ".codes"
"""What the names of low-bit weights end in."""


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that LoRAs can be added to, by their names in the checkpoint.

    Raises:
        InputError: the weights are codes.
    """
    found = tensors(folder)
    if any(name.endswith(_CODES) for name in found):
        message = f"LoRAs can't be added to {folder}: its weights are codes of a few bits, which ONNX Runtime multiplies as they are"
        raise InputError(message, fix="bake it in: bakeoff export MODEL -o DIR --recipe … --lora FILE:SCALE")
    return {entry.name: entry.shape for entry in found.values()}


def tensors(folder: Path) -> dict[str, Entry]:
    """Return initializer -> the tensor in a safetensors file of the folder that it points to."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    found: dict[str, Entry] = {}
    files: dict[str, dict[int, Entry]] = {}
    for initializer in graph.initializer:
        place = {item.key: item.value for item in initializer.external_data}
        file = place.get("location", "")
        if file.endswith(".safetensors") and "/" not in file and "\\" not in file:
            if file not in files:
                files[file] = {entry.offset: entry for entry in read_header(folder / file)}
            entry = files[file].get(int(place["offset"]))
            if entry is not None and (entry.dtype in TORCH_DTYPES or entry.name.endswith(_CODES)):
                found[initializer.name] = entry
    return found


def adapt(options: Any, folder: Path, deltas: Mapping[str, Sequence[Delta]]) -> list[Any]:  # noqa: ANN401 - onnxruntime is untyped
    """Let a session open with LoRAs added to its weights; return what has to live until it is open."""
    if not deltas:
        return []
    changed = {name: entry for name, entry in tensors(folder).items() if entry.name in deltas}
    values = [_value(added(read_tensor(entry), deltas[entry.name])) for entry in changed.values()]
    options.add_external_initializers(list(changed), values)
    return values


def _value(tensor: Tensor) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    import onnx
    import torch
    from onnxruntime import OrtValue

    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.uint16).numpy()
        return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
