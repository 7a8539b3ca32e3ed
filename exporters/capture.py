"""Capture a part with torch.export: one program, dynamic in batch, height, width and sequence."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

from ..components.component import CAPTURE_SIZES
from ..errors import LoweringError
from .hollow import Hollow

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from ..components.component import Component, Config, Port
    from ..weights import Checkpoint


def on_hollow(
    part: str, component: Component, config: Config, source: Path, work: Path, checkpoint: Checkpoint | None = None
) -> Callable[..., tuple[ExportedProgram, Hollow]]:
    """Return what `Subject.capture` is: it captures a part on a stand-in for its weights, made in the folder `work`."""

    def captured(solid: frozenset[str], dtype: str = "float32", device: str = "cpu") -> tuple[ExportedProgram, Hollow]:
        hollow = Hollow.make(source, work, solid, checkpoint)
        return capture(part, component, config, hollow.folder, dtype, device), hollow

    return captured


def module_on_hollow(component: Component, source: Path, work: Path) -> Callable[[], nn.Module]:
    """Return what `Subject.module` is: it builds the module on a stand-in for its weights, made in the folder `work`."""

    def built() -> nn.Module:
        import torch

        return component.load(Hollow.make(source, work).folder, torch.float32)

    return built


def capture(
    part: str, component: Component, config: Config, folder: Path, dtype: str = "float32", device: str = "cpu"
) -> ExportedProgram:
    """Capture a part, whose weights stay mapped from `folder` where they are in `dtype` and `device` is the CPU.

    Example tensors are clones, because torch.export marks what it is given as dynamic, and no dynamic size is 1,
    which would be baked.

    Raises:
        LoweringError: the module can't be captured.
    """
    import torch

    computed = getattr(torch, dtype)
    flat = component.flat(component.load(folder, computed)).eval().to(device)
    example = component.example(config, component.limit(config, CAPTURE_SIZES), seed=0)
    ports = component.inputs(config)
    _tie(flat, ports)
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, dim in enumerate(port.dims) if isinstance(dim, str)} for port in ports
    )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = tuple(_given(example[port.name], port, computed).to(device) for port in ports)
            program = torch.export.export(flat, arguments, dynamic_shapes=_named(flat, dynamic), strict=False)
    except Exception as error:
        message = f"torch.export couldn't capture {part} ({component.name}): {error}"
        raise LoweringError(message) from error
    _refuse_baked(part, ports, program)
    return program


def _given(tensor: Tensor, port: Port, dtype: torch.dtype) -> Tensor:
    """Return a clone, in the dtype that a part of this one is given."""
    return tensor.to(dtype, copy=True) if tensor.is_floating_point() and not port.exact else tensor.clone()


def _tie(flat: nn.Module, ports: tuple[Port, ...]) -> None:
    """Let the program know that dimensions of one name are one: a batch of latents and a batch of texts."""
    import torch

    forward = flat.forward

    @functools.wraps(forward)
    def tied(*tensors: Tensor) -> object:
        sizes: dict[str, int] = {}
        for port, tensor in zip(ports, tensors, strict=True):
            for dim, size in zip(port.dims, tensor.shape, strict=True):
                if isinstance(dim, str) and dim.isidentifier():
                    torch._check(sizes.setdefault(dim, size) == size)  # noqa: SLF001 - its documented name
        return forward(*tensors)

    flat.forward = tied


def _refuse_baked(part: str, ports: tuple[Port, ...], program: ExportedProgram) -> None:
    """Raise if a dimension that the ports call free became the example's size."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for port, name in zip(ports, program.graph_signature.user_inputs, strict=True):
        for axis, dim in enumerate(port.dims):
            if isinstance(dim, str) and isinstance(values[name].shape[axis], int):
                message = f"torch.export baked {port.name}'s {dim} into {part} as {values[name].shape[axis]}"
                raise LoweringError(message)


def _named(flat: object, dynamic: tuple[dict[int, object], ...]) -> dict[str, object]:
    """Give each argument of `forward` its dynamic axes; `*residuals` and the like take what is left."""
    import inspect

    parameters = inspect.signature(flat.forward).parameters.values()  # type: ignore[attr-defined]
    plain = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    rest = {p.name: tuple(dynamic[len(plain) :]) for p in parameters if p.kind is p.VAR_POSITIONAL}
    return {**dict(zip(plain, dynamic, strict=not rest)), **{name: axes for name, axes in rest.items() if axes}}
