"""What a part's layers were given when it was calibrated, and the biases that make up for what rounding their weights loses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..naming import layer_names
from ..weights import read_header, read_rows, read_tensor, save_tensors
from .channels import Channels

if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from pathlib import Path

    from ..weights import Checkpoint
    from .calibration import Calibration
    from .mixture import Mixture


def with_inputs(mixture: Mixture, calibration: Calibration | None, part: str, checkpoint: Checkpoint) -> Mixture:
    """Return a part's precisions with what the inputs of its layers took on, where weights are rounded for that."""
    if calibration is None or not any(each.uses_inputs for each in mixture.formats.values()):
        return mixture
    seen = calibration.reached(part)
    known: dict[str, Channels] = {}
    for path, name in layer_names(seen, checkpoint).items():
        weight_format, shape = mixture.format_of(name), checkpoint.entries[f"{name}.weight"].shape
        if weight_format is None or not weight_format.uses_inputs or weight_format.obstacle(shape):
            continue
        calibration.need_channels(path, seen[path][0])
        if seen[path][0].channels.size == shape[1]:  # else: groups
            known[name] = seen[path][0].channels
    return replace(mixture, known=known)


def corrected(checkpoint: Checkpoint, mixture: Mixture, file: Path, kept: Container[str] = ()) -> Checkpoint:
    """Return a checkpoint whose biases make up for their layers' rounding, written to `file` in float32; weights stay.

    Args:
        checkpoint: of a part.
        mixture: its precisions, and its layers' inputs.
        file: is made anew, a few MB at most.
        kept: weights that stay as they are after all, and their biases with them.
    """
    import torch

    made = {}
    for layer, channels in mixture.known.items():
        weight, bias = (checkpoint.entries.get(f"{layer}.{kind}") for kind in ("weight", "bias"))
        if weight is None or bias is None or weight.name in kept:
            continue
        weight_format = mixture.corrected(layer, weight.shape)
        if weight_format:
            importance = mixture.importance(weight.name)
            lost = [weight_format.lost(rows, channels.mean, importance) for rows in read_rows(weight)]
            made[bias.name] = read_tensor(bias).float() + torch.cat(lost)
    if not made:
        return checkpoint
    save_tensors(made, file)
    return replace(checkpoint, entries={**checkpoint.entries, **{entry.name: entry for entry in read_header(file)}})


def write_inputs(known: Mapping[str, Channels], file: Path) -> None:
    """Write what layers' inputs took on, for proofs: safetensors, layer -> (4, C)."""
    save_tensors({layer: channels.as_tensor() for layer, channels in known.items()}, file)


def read_inputs(file: Path) -> dict[str, Channels]:
    """Read what `write_inputs` wrote; nothing where there is no file."""
    from safetensors.torch import load_file

    return {layer: Channels.read(rows) for layer, rows in load_file(file).items()} if file.is_file() else {}
