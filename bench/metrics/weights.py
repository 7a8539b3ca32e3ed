"""Where a metric's weights lie, and how they come into a module."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from ...errors import PickleError, SourceError, UsageError
from ...sources import hub

if TYPE_CHECKING:
    from torch import Tensor, nn

_COUNTER = "num_batches_tracked"
"""What batch normalisation counts while it is trained; older files lack it."""


def located(weights: str) -> Path:
    """Return the folder of weights, fetched from the hub if `weights` is an id there.

    Raises:
        UsageError: it is neither a folder nor a hub id.
        SourceError: the hub doesn't give it.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or not hub.is_id(weights):
        message = f"got the weights {weights}, expected a folder or a hub id (owner/name)"
        raise UsageError(message, fix=f"give the folder {path.parent}" if path.is_file() else f"ls {path.parent}")
    return hub.snapshot(weights, None, ("*.json", "*.txt", "*.safetensors")).folder


def require(folder: Path, *files: str) -> None:
    """Refuse a folder that lacks a file; `a|b` is either of two.

    Raises:
        UsageError: it does.
    """
    for names in files:
        if not any(any(folder.glob(name)) for name in names.split("|")):
            there = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
            wanted = names.replace("|", " or ")
            message = f"the weights' folder {folder} has {there}, expected {wanted} as well"
            raise UsageError(message, fix=f"copy {wanted} into {folder}")


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's `*.safetensors`, or, where there are none, of its `*.pth` and `*.pt`.

    Raises:
        UsageError: there are none of these.
        SourceError: a file is broken.
        PickleError: a file holds more than tensors; none is run.
    """
    require(folder, "*.safetensors|*.pth|*.pt")
    files = sorted(folder.glob("*.safetensors")) or sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    return {name: tensor for file in files for name, tensor in _read(file).items()}


def _read(file: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        message = f"{file} is a pickle of more than tensors, which can run code when it is opened: bakeoff doesn't"
        raise PickleError(message, fix="if you trust it, save its state_dict as .safetensors") from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        message = f"{file} can't be read: {error}"
        raise SourceError(message, fix="download or copy it again") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        message = f"{file} holds {type(content).__name__}, expected tensors by name"
        raise SourceError(message, fix="save its state_dict alone, as .safetensors")
    return content


def fill(module: nn.Module, found: dict[str, Tensor], folder: Path) -> None:
    """Give a module its weights, all of them and no others, and set it to inference.

    Raises:
        SourceError: a tensor is missing, unknown or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if not name.endswith(_COUNTER)}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items() if not name.endswith(_COUNTER)}
    problems = [f"lacks {name}" for name in wanted.keys() - shapes.keys()]
    problems += [f"has {name}, which is none of its tensors" for name in shapes.keys() - wanted.keys()]
    problems += [
        f"has {name} of {shapes[name]}, expected {wanted[name]}"
        for name in wanted.keys() & shapes.keys()
        if shapes[name] != wanted[name]
    ]
    if problems:
        more = f" ({len(problems)} such differences)" if len(problems) > 1 else ""
        message = f"the weights in {folder} aren't those of {type(module).__name__}: it {min(problems)}{more}"
        raise SourceError(message, fix="the metric's class says which weights it expects")
    module.load_state_dict(found, strict=False)  # all are there but, perhaps, the counters
    module.eval().requires_grad_(requires_grad=False)
