"""The torch artifact: a part's safetensors in the recipe's dtype; the module itself comes from Diffusers."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import RecipeError, UnavailableError
from ..hardware import Availability
from ..quantize.calibration import EVEN
from ..weights import TORCH_DTYPES, Checkpoint, convert, place, streamed, write_streamed
from . import aoti
from .bitsandbytes import Bitsandbytes
from .costs import BYTES_PER_S, PACKED_TIMES, stored_bytes
from .exporter import Cost, Lowered
from .packing import storage
from .torch_bytes import Bytes
from .torchao import Float8, TorchAO

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..quantize.mixture import Mixture
    from .codes import Layout
    from .exporter import Subject

_BASE_BYTES, _PACKING_BYTES = 155_000_000, 400_000_000
_LAYOUTS: dict[str, type[Layout]] = {
    "int8": Bitsandbytes,
    "nf4": Bitsandbytes,
    "int4": TorchAO,
    "w8a8-dynamic": TorchAO,
    "w8a8": Bytes,
    "fp8": Float8,
}
CODES = "codes"
"""Option of int8: whose layers run its codes. bitsandbytes' are Linear layers, which libraries open by themselves."""


class TorchExporter:
    version: ClassVar[int] = 2
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", *_LAYOUTS)
    reasons: ClassVar[Mapping[str, str]] = {}
    rounds_as_it_runs: ClassVar[tuple[str, ...]] = ("fp8",)
    """Precisions whose activations get their scales while it runs, where other backends take calibrated ones."""
    layer_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "bf16": ("fp32", "bf16"),
        "fp16": ("fp32", "fp16"),
        **dict.fromkeys(_LAYOUTS, ("bf16",)),
    }
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        aoti.OPTION: ("",),
        "activations": EVEN,
        CODES: (Bitsandbytes.library, Bytes.library),
    }

    def probe(self) -> Availability:
        return Availability(ok=True, reason="torch is there")

    def check(self, precision: str, options: Mapping[str, str]) -> None:
        if CODES in options and precision != "int8":
            message = f"torch has {CODES} of two kinds for int8 alone, got {precision}"
            raise RecipeError(message, fix=f"--recipe torch:int8+{CODES}={options[CODES]}, or leave {CODES} out")
        if aoti.OPTION not in options:
            return
        if precision not in aoti.PRECISIONS:
            message = f"AOTInductor compiles parts of float weights alone, got {precision}"
            raise RecipeError(message, fix=f"--recipe torch:bf16+{aoti.OPTION}")
        if not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++")))):
            message = "AOTInductor takes a C++ compiler, and there is none"
            raise UnavailableError(message, fix="apt-get install g++")

    def key_fields(self, precision: str, options: Mapping[str, str]) -> dict[str, Any]:  # noqa: ARG002 - another's
        if aoti.OPTION not in options:
            return {}
        tools = {package: importlib.metadata.version(package) for package in self.packages()}
        return {"bound": aoti.facts(), "lowered_with": tools}

    def packages(self) -> tuple[str, ...]:
        return ("torch", "diffusers", "transformers")

    def cost(
        self,
        checkpoint: Checkpoint,
        mixture: Mixture,
        *,
        options: Mapping[str, str],
        operations: int,  # noqa: ARG002
        shared: bool,
    ) -> Cost:
        if mixture.formats:
            weights = layout_of(mixture, options)(mixture).predict(checkpoint)
            written = sum(weights.values())
            return Cost(_PACKING_BYTES, written, written / BYTES_PER_S * PACKED_TIMES, weights)
        weights = stored_bytes(checkpoint, mixture)
        linked = shared and mixture.is_plain and checkpoint.is_in(storage(mixture.precision))
        written = 0 if linked else sum(weights.values())
        return Cost(_BASE_BYTES, written, written / BYTES_PER_S, weights)

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        if aoti.OPTION in subject.options:
            aoti.write(subject, folder)
        if not subject.mixture.formats:
            how = _write(subject, folder)
            totals: dict[str, int] = defaultdict(int)
            for entry in Checkpoint.open(folder).entries.values():
                totals[TORCH_DTYPES.get(entry.dtype, entry.dtype.lower())] += entry.length
            return Lowered(how, dict(totals))
        layout = layout_of(subject.mixture, subject.options)(subject.mixture, subject.activations)
        kept = layout.write(subject.checkpoint, subject.module(), folder)
        return Lowered("written", layout.weight_bytes(Checkpoint.open(folder)), kept)


def layout_of(mixture: Mixture, options: Mapping[str, str]) -> type[Layout]:
    """Return how the codes of a part's low-bit precision are stored, by its recipe's options."""
    return Bytes if options.get(CODES) == Bytes.library else _LAYOUTS[mixture.precision]


def _write(subject: Subject, folder: Path) -> str:
    """Bring the checkpoint into the folder as it is, or converted; return how."""
    mixture, file = subject.mixture, folder / subject.checkpoint.single_file
    dtype = storage(mixture.precision)
    if not mixture.is_plain:
        entries = subject.checkpoint.entries.values()
        write_streamed([streamed(entry, storage(mixture.precision_of(entry.name))) for entry in entries], file)
        return "written"
    if subject.checkpoint.is_in(dtype):
        for index in subject.source.glob("*.safetensors.index.json"):
            place(index, folder / index.name, "copy")
        return min(place(each, folder / each.name, subject.weights) for each in subject.checkpoint.files)
    convert(subject.checkpoint, file, dtype)
    return "written"
