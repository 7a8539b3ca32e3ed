"""Open code that AOTInductor compiled: native, so only what a verified manifest vouches for, on the machine it was made for."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, CorruptError, InputError, UnavailableError
from ..hardware import instruction_sets
from ..weights import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from .runtime import PartFiles

PACKAGE, FACTS, CONSTANTS = "model.pt2", "aoti.json", "aoti_constants.safetensors"


def is_compiled(folder: Path) -> bool:
    return (folder / PACKAGE).is_file()


def device_of(folder: Path) -> str | None:
    """Return the device that a part's code was compiled for; None of a part that isn't compiled ahead of time."""
    return str(json.loads((folder / FACTS).read_text())["device"]) if is_compiled(folder) else None


class Compiled:
    """Compiled code, called as the module is. Weights are the module's own tensors, which stay where they are.

    Raises:
        ArtifactError: no verified manifest vouches for the code.
        CorruptError: it isn't what was written.
        UnavailableError: it was made for another kind of machine, or another torch.
    """

    def __init__(self, part: PartFiles, module: nn.Module, device: str) -> None:
        import torch._inductor

        for name in (PACKAGE, FACTS, CONSTANTS):
            _refuse_unvouched(part, name)
        _refuse_elsewhere(part, device)
        self._part, self._inputs = part, json.loads((part.folder / FACTS).read_text())["inputs"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch._inductor.aoti_load_package(str(part.folder / PACKAGE))  # noqa: SLF001 - its documented name
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **_constants(part, device)}
        wanted = loaded.get_constant_fqns()
        missing = [name for name in wanted if name not in tensors]
        if missing:
            message = f"{part.name}'s compiled code wants {', '.join(missing[:5])}, which aren't in its files"
            raise ArtifactError(message, fix="export it again")
        given = {name: tensors[name].detach() for name in wanted}
        loaded.load_constants(given, check_full_update=True, user_managed=True)
        self._kept = given  # user_managed: the code has their addresses alone
        self._loaded: Any = loaded

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        for port, given, tensor in zip(self._part.inputs, self._inputs, arguments, strict=True):
            _refuse_misfit(self._part.name, port.name, given, tensor)
        made = self._loaded(*arguments)
        return [*made] if isinstance(made, list | tuple) else [made]


def _refuse_misfit(part: str, name: str, given: Mapping[str, Any], tensor: Tensor) -> None:
    """Refuse what the code wasn't made for: it would read what lies there, or beyond."""
    dims = given["dims"]
    fits = len(dims) == tensor.ndim and all(
        least <= size and (most is None or size <= most)
        for (least, most), size in zip(dims, tensor.shape, strict=len(dims) == tensor.ndim)
    )
    if not fits or str(tensor.dtype) != f"torch.{given['dtype']}":
        wanted = ", ".join(str(least) if least == most else f"{least} to {most or 'any'}" for least, most in dims)
        message = f"{part} got {name} as {tuple(tensor.shape)} {tensor.dtype}, it was compiled for ({wanted}) {given['dtype']}"
        raise InputError(message)


def _refuse_unvouched(part: PartFiles, name: str) -> None:
    """Hash a file and compare it with the verified manifest."""
    vouched = part.vouched.get(name)
    if vouched is None:
        message = f"{part.folder / name} belongs to native code, which no verified manifest vouches for"
        raise ArtifactError(
            message, fix="export the model yourself: bakeoff export MODEL -o DIR --recipe torch:fp32+aoti"
        )
    if sha256(part.folder / name) != vouched:
        message = f"{part.folder / name} was changed after it was written: it is native code, and isn't opened"
        raise CorruptError(message, fix="export it again")


def _refuse_elsewhere(part: PartFiles, device: str) -> None:
    import torch

    made: Mapping[str, Any] = json.loads((part.folder / FACTS).read_text())
    here: dict[str, Any] = {"device": device, "torch": torch.__version__}
    if made["device"] == "cuda" and device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        here |= {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    lacking = sorted(set(made.get("instruction_sets", ())) - set(instruction_sets()))
    differing = [f"{name} {made[name]}, here {here[name]}" for name in here if made.get(name) != here[name]]
    differing += [f"instruction sets that aren't here: {', '.join(lacking)}"] if lacking and device == "cpu" else []
    if differing:
        message = f"{part.name} was compiled for {'; '.join(differing)}"
        raise UnavailableError(message, fix="export it on this machine, or without +aoti")


def _constants(part: PartFiles, device: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(part.folder / CONSTANTS, device=device)
