"""A part compiled ahead of time by AOTInductor: native code beside the weights, for one device of one kind of machine.

`model.pt2` holds code alone: the weights stay in the safetensors that the artifact has anyway, and are handed to it
when it is opened. What torch.export lifted out of the program besides (tables, small constants) is in a file of its own.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from .. import hardware
from ..errors import LoweringError, RecipeError
from ..weights import save_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

    from .exporter import Subject

PACKAGE, FACTS, CONSTANTS = "model.pt2", "aoti.json", "aoti_constants.safetensors"
OPTION = "aoti"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def device_here() -> str:
    """Return the torch device that code is compiled for on this machine."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def facts() -> dict[str, Any]:
    """Return what compiled code is bound to: torch's version, and the processor's instruction sets or the GPU."""
    import torch

    device = device_here()
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return {**found, "gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    return {**found, "instruction_sets": hardware.instruction_sets()}


def write(subject: Subject, folder: Path) -> None:
    """Capture a part in its precision and compile it, into the folder.

    Raises:
        RecipeError: some of its layers have another precision.
        LoweringError: it can't be captured or compiled.
    """
    import torch._inductor

    if subject.mixture.layers:
        message = f"{subject.part} is to be compiled ahead of time, which takes one precision for all of its layers"
        raise RecipeError(message, fix="leave out +aoti, or the layers of their own precision")

    device = device_here()
    program, _ = subject.capture(frozenset(), PRECISIONS[subject.mixture.precision], device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - its documented name
                program,
                package_path=str(folder / PACKAGE),
                inductor_configs={"aot_inductor.package_constants_in_so": False},
            )
    except Exception as error:
        message = f"AOTInductor couldn't compile {subject.part}: {error}"
        raise LoweringError(message, fix="leave out +aoti") from error
    _write_constants(program, folder / CONSTANTS)
    told = {**facts(), "inputs": _inputs(program)}
    (folder / FACTS).write_text(json.dumps(told, indent=1) + "\n")


def _inputs(program: ExportedProgram) -> list[dict[str, Any]]:
    """Return dtype, and the least and most of each dimension (None: any), of each tensor that the code is given.

    The least is 1 where the program says 2: torch.export takes every size as 2 or more, and what it makes of it runs with
    1, too, which the proof shows. AOTInductor's own checks would refuse that.
    """
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    found = []
    for name in program.graph_signature.user_inputs:
        value = values[name]
        dims = [[dim, dim] if isinstance(dim, int) else [1, _most(program, dim)] for dim in value.shape]
        found.append({"dtype": str(value.dtype).removeprefix("torch."), "dims": dims})
    return found


def _most(program: ExportedProgram, dim: Any) -> int | None:  # noqa: ANN401 - a SymInt
    known = program.range_constraints.get(dim.node.expr)
    upper = getattr(known, "upper", None)
    return int(upper) if upper is not None and upper.is_Integer else None


def _write_constants(program: ExportedProgram, file: Path) -> None:
    """Write the constants that aren't in the module's checkpoint: buffers that it computes, and what was lifted."""
    import torch

    stored = set(program.state_dict)
    found = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, value in program.constants.items()
        if isinstance(value, torch.Tensor) and name not in stored
    }
    save_tensors(found, file)
