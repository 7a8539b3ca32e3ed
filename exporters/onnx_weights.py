"""The weights of an ONNX graph: the checkpoint's own bytes, converted ones, or codes of a low-bit format."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..weights import Streamed, as_bytes, place, read_header, save_tensors, streamed, write_entries, write_streamed
from .exporter import SCALES
from .hollow import SOLID_BYTES
from .onnx_codes import Encoder
from .onnx_editing import DTYPES, OWN
from .packing import storage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir
    from torch import Tensor

    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint, Entry
    from .exporter import Subject
    from .hollow import Hollow

FILE = "model.safetensors"
_INLINE_BYTES = 1024
"""Smaller constants stay in the graph."""
_WIDENED = ("BF16", "F16")
_TENSOR = "bakeoff.tensor"
"""Under it an initializer of a kept graph has the name of the checkpoint's tensor that it is."""


@dataclass(frozen=True)
class Weights:
    """A graph's large initializers, by name: tensors of the checkpoint, and what the lowering made itself."""

    found: dict[str, Entry]
    made: dict[str, Tensor]

    @classmethod
    def of(cls, model: onnx_ir.Model, hollow: Hollow) -> Weights:
        weights = cls({}, {})
        for name, value in model.graph.initializers.items():
            tensor = _torch_tensor(value)
            if tensor is None or tensor.numel() * tensor.element_size() < _INLINE_BYTES:
                continue
            entry = hollow.entry_of(as_bytes(tensor))
            if entry is None:
                weights.made[name] = tensor
            else:
                weights.found[name] = entry
        return weights

    @property
    def made_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.made.values())


@dataclass
class Brought:
    """How weights came into the folder."""

    how: str
    kept: dict[str, str] = field(default_factory=dict)
    """Weight that the recipe's low-bit formats left as it is -> why."""
    labels: dict[str, str] = field(default_factory=dict)
    """Initializer of codes, or of their scales -> what its bytes count as."""


def name_tensors(model: onnx_ir.Model, weights: Weights) -> None:
    """Let initializers that are the checkpoint's say which tensor they are; those of large ones then have no values."""
    import onnx_ir

    for name, entry in weights.found.items():
        value = model.graph.initializers[name]
        constant = value.const_value
        assert constant is not None and value.shape is not None  # noqa: S101, PT018 - an initializer has both
        value.metadata_props[_TENSOR] = entry.name
        if constant.nbytes >= SOLID_BYTES:
            value.const_value = onnx_ir.ExternalTensor(
                location=entry.name,
                offset=0,
                length=constant.nbytes,
                dtype=constant.dtype,
                shape=value.shape,
                name=name,
            )


def read_hollow(model: onnx_ir.Model, checkpoint: Checkpoint) -> tuple[onnx_ir.Model, Weights]:
    """Return a graph that `name_tensors` changed, and its weights."""
    weights = Weights({}, {})
    for name, value in model.graph.initializers.items():
        constant, own = value.const_value, value.metadata_props.pop(_TENSOR, None)
        if own is not None:
            weights.found[name] = checkpoint.entries[own]
        elif constant is not None and constant.nbytes >= _INLINE_BYTES:
            tensor = _torch_tensor(value)
            assert tensor is not None  # noqa: S101 - it has a constant
            weights.made[name] = tensor
    return model, weights


def bring(model: onnx_ir.Model, weights: Weights, subject: Subject, folder: Path) -> Brought:
    """Point initializers into safetensors files in the folder, the checkpoint's own where nothing changes."""
    if subject.mixture.is_plain:
        how, moved = _place(weights.found, subject, folder)
        brought = Brought(how)
    else:
        brought, moved = _pack(model, weights.found, subject, folder)
    for name, entry in moved.items():
        value = model.graph.initializers[name]
        point(value, entry, folder)
        if entry.dtype in _WIDENED:
            _widen(model, value)
    if weights.made:
        _write_made(model, weights.made, folder)
    return brought


def weight_bytes(model: onnx_ir.Model, labels: Mapping[str, str]) -> dict[str, int]:
    """Sum the initializers' bytes by dtype, or by what codes and scales count as."""
    totals: dict[str, int] = defaultdict(int)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            own = SCALES if name.startswith(OWN) else str(value.const_value.dtype.numpy())
            totals[labels.get(name, own)] += value.const_value.nbytes
    return dict(totals)


def _torch_tensor(value: onnx_ir.Value) -> Tensor | None:
    import torch

    constant = value.const_value
    if constant is None:
        return None
    raw = constant.raw
    if isinstance(raw, torch.Tensor):
        return raw.detach().contiguous()
    return torch.from_numpy(constant.numpy().copy())


def _place(found: dict[str, Entry], subject: Subject, folder: Path) -> tuple[str, dict[str, Entry]]:
    """Bring the checkpoint's tensors into the folder; return how, and where each initializer's bytes lie now."""
    dtype = storage(subject.mixture.precision)
    used = {entry.name: entry for entry in found.values()}
    if not used:
        return "written", {}
    if subject.weights == "copy" or not subject.checkpoint.is_in(dtype):
        written = write_entries(used.values(), folder / FILE, dtype)
        how = "copied" if subject.checkpoint.is_in(dtype) else "written"
        return how, {name: written[entry.name] for name, entry in found.items()}
    how = min(place(file, folder / file.name, subject.weights) for file in {entry.file for entry in used.values()})
    return how, {name: replace(entry, file=folder / entry.file.name) for name, entry in found.items()}


def point(value: onnx_ir.Value, entry: Entry, folder: Path, dtype: onnx_ir.DataType | None = None) -> None:
    """Let an initializer's bytes be those of a safetensors file; without a dtype they are what the file says."""
    import onnx_ir

    dtype = dtype or onnx_ir.DataType[DTYPES[entry.dtype]]
    assert value.shape is not None  # noqa: S101 - an initializer has one
    value.const_value = onnx_ir.ExternalTensor(
        location=entry.file.name,
        offset=entry.offset,
        length=entry.length,
        dtype=dtype,
        shape=value.shape,
        name=value.name or entry.name,
        base_dir=folder,
    )
    value.type = onnx_ir.TensorType(dtype)


def _widen(model: onnx_ir.Model, value: onnx_ir.Value) -> None:
    """Let an initializer's users have it in float32."""
    import onnx_ir

    wide = onnx_ir.Value(
        name=f"{value.name}.float32", shape=value.shape, type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )
    onnx_ir.convenience.replace_all_uses_with(value, wide)
    to = onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT)
    model.graph.insert_before(
        model.graph[0], onnx_ir.Node("", "Cast", [value], [to], outputs=[wide], name=f"widen {value.name}")
    )


def _write_made(model: onnx_ir.Model, made: dict[str, Tensor], folder: Path) -> None:
    file = folder / "constants.safetensors"
    save_tensors(made, file)
    for entry in read_header(file):
        point(model.graph.initializers[entry.name], entry, folder)


def _pack(
    model: onnx_ir.Model, found: dict[str, Entry], subject: Subject, folder: Path
) -> tuple[Brought, dict[str, Entry]]:
    """Write codes for what the formats and the graph allow, the rest as floats; return where the rest lies."""
    mixture = subject.mixture
    encoders = {name: Encoder(model, mixture, name, subject.activations) for name in mixture.formats}
    brought = Brought("written")
    packed: list[Streamed] = []
    plain: dict[str, Entry] = {}
    for name, entry in found.items():
        encoder = encoders.get(mixture.precision_of(entry.name))
        value = model.graph.initializers[name]
        encoded = encoder.encode(value, entry) if encoder else mixture.obstacle(entry.name, entry.shape)
        if isinstance(encoded, list):
            packed += encoded
            brought.labels |= {tensor.name: _label(mixture, entry, tensor) for tensor in encoded}
            del model.graph.initializers[name]
            continue
        plain[name] = entry
        if encoded and len(entry.shape) > 1:
            brought.kept[entry.name] = encoded
    plain = {name: entry for name, entry in plain.items() if not _dropped(model, name)}
    rest = {entry.name: streamed(entry, storage(mixture.precision_of(entry.name))) for entry in plain.values()}
    written = write_streamed([*packed, *rest.values()], folder / FILE)
    for tensor in packed:
        point(model.graph.initializers[tensor.name], written[tensor.name], folder)
    return brought, {name: written[entry.name] for name, entry in plain.items()}


def _dropped(model: onnx_ir.Model, name: str) -> bool:
    """Take an initializer out that nothing uses any more, such as a bias that became another."""
    value = model.graph.initializers[name]
    if value.uses() or value.is_graph_output():
        return False
    del model.graph.initializers[name]
    return True


def _label(mixture: Mixture, entry: Entry, tensor: Streamed) -> str:
    """Return what the bytes of codes, or of their scales, count as."""
    weight_format = mixture.format_of(entry.name)
    return weight_format.name if weight_format and tensor.name.endswith(".codes") else SCALES
