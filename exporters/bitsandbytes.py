"""Low-bit weights as bitsandbytes stores them, which Diffusers and Transformers open by themselves.

Its layout isn't written down: it is what `state_dict()` of its `Linear8bitLt` and `Linear4bit` gives.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from ..weights import TORCH_DTYPES, Streamed, as_bytes, layer_names, streamed, write_streamed
from .exporter import SCALES
from .packing import Packing, nibbles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from ..quantize.format import Format
    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint, Entry

PRECISIONS = ("int8", "nf4")
_ROW_MAJOR = 0
_INT8_STEPS = 127


def write(checkpoint: Checkpoint, module: nn.Module, mixture: Mixture, folder: Path) -> dict[str, str]:
    """Write a module's checkpoint with codes for its Linear layers, and say so in its `config.json`.

    Args:
        checkpoint: of the module.
        module: as its library builds it; its weights aren't read.
        mixture: int8 or nf4, but for layers in bfloat16.
        folder: has the `config.json`.

    Returns:
        Matrix or convolution that is left as it is -> why.
    """
    layers, weight_format = _linear_layers(module, checkpoint), mixture.formats[mixture.precision]
    kept: dict[str, str] = {}
    tensors: list[Streamed] = []
    for entry in checkpoint.entries.values():
        obstacle = mixture.obstacle(entry.name, entry.shape)
        if obstacle is None and entry.name not in layers:
            obstacle = "bitsandbytes has codes for Linear layers alone"
        if obstacle is None:
            tensors += _int8(entry, weight_format) if weight_format.name == "int8" else _nf4(entry, weight_format)
            continue
        tensors.append(streamed(entry, "bfloat16"))
        if len(entry.shape) > 1:
            kept[entry.name] = obstacle
    write_streamed(tensors, folder / checkpoint.single_file)
    config = json.loads((folder / "config.json").read_text())
    skipped = sorted(path for name, path in layers.items() if name in kept)
    config["quantization_config"] = _config(weight_format, skipped)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return kept


def stored_name(name: str) -> str | None:
    """Return the name of the weight that a tensor belongs to, if it is one of bitsandbytes' own beside codes."""
    for ending in (".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.quant_state."):
        before, found, _ = name.partition(ending)
        if found:
            return f"{before}.weight"
    return None


def _linear_layers(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the weight's name in the checkpoint -> path in the module, of each Linear layer."""
    from torch import nn

    paths = [path for path, layer in module.named_modules() if type(layer) is nn.Linear]
    return {f"{name}.weight": path for path, name in layer_names(paths, checkpoint).items()}


def _int8(entry: Entry, weight_format: Format) -> list[Streamed]:
    packing = Packing(weight_format, entry)
    layer = entry.name.removesuffix(".weight")
    scales = packing.scales(times=_INT8_STEPS)
    return [
        Streamed(entry.name, "I8", entry.shape, math.prod(entry.shape), packing.codes(lambda codes: codes)),
        Streamed(f"{layer}.SCB", "F32", [entry.shape[0]], 4 * entry.shape[0], scales),
        Streamed(f"{layer}.weight_format", "U8", [], 1, [bytes([_ROW_MAJOR])]),
    ]


def _nf4(entry: Entry, weight_format: Format) -> list[Streamed]:
    packing = Packing(weight_format, entry)
    codes, scales = weight_format.stored_bytes(entry.shape)
    state = {"quant_type": "nf4", "blocksize": weight_format.group, "dtype": "bfloat16", "shape": list(entry.shape)}
    text = json.dumps(state).encode()
    levels = _levels(weight_format)
    return [
        Streamed(entry.name, "U8", [codes, 1], codes, packing.codes(lambda rows: nibbles(rows, high_first=True))),
        Streamed(f"{entry.name}.absmax", "F32", [scales // 4], scales, packing.scales()),
        Streamed(f"{entry.name}.quant_map", "F32", [len(levels)], 4 * len(levels), [as_bytes(levels)]),
        Streamed(f"{entry.name}.quant_state.bitsandbytes__nf4", "U8", [len(text)], len(text), [text]),
    ]


def _levels(weight_format: Format) -> Tensor:
    """Return what the codes 0 to 15 stand for, in a group whose largest magnitude is 1."""
    import torch

    assert weight_format.group is not None  # noqa: S101 - a format of 4 bits has groups
    codes = torch.arange(weight_format.group, dtype=torch.int8).remainder(16)[None]
    return weight_format.unpack(codes, torch.ones(1, 1))[0, :16].contiguous()


def _config(weight_format: Format, skipped: list[str]) -> dict[str, Any]:
    """Return what Diffusers and Transformers read as `BitsAndBytesConfig`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": weight_format.name == "int8",
        "load_in_4bit": weight_format.name == "nf4",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": skipped,
    }


def weights_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Entry]]:
    """Yield each tensor of a written checkpoint with what its bytes count as: a format, its scales, or a torch dtype."""
    coded = {stored_name(name) for name in checkpoint.entries} - {None}
    for name, entry in checkpoint.entries.items():
        label = {"I8": "int8", "U8": "nf4"}.get(entry.dtype) if name in coded else None
        beside = SCALES if stored_name(name) else TORCH_DTYPES.get(entry.dtype, entry.dtype.lower())
        yield label or beside, entry
