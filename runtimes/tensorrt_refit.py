"""Exchange weights of an open engine: LoRAs are added to those that they change, and taken off again bit for bit."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, InputError
from ..sources.lora import added
from ..weights import TORCH_DTYPES, read_header, read_tensor
from .tensorrt_files import ONNX, PLAN, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..sources.lora import Delta
    from .tensorrt_files import EngineFiles

_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


def shapes(folder: Path, weights: Mapping[str, tuple[str, bool]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that LoRAs can be added to, by their names in the checkpoint.

    Raises:
        InputError: the weights aren't beside the plan, or are codes.
    """
    if not (folder / WEIGHTS).is_file():
        message = f"LoRAs can't be added to {folder}: its engine was built for the weights that it has"
        raise InputError(message, fix="export it with +refit, or bake the LoRA in: --lora FILE:SCALE")
    found = {}
    for entry in read_header(folder / WEIGHTS):
        if entry.name in weights:
            tensor, turned = weights[entry.name]
            found[tensor] = entry.shape[::-1] if turned else entry.shape
    return found


class Refit:
    """What an engine's weights are now. Those of the file come back as the file's own bytes.

    Each exchange has a refitter of its own: one keeps the addresses of all that it was given, and reads them again in its
    next exchange, whether what lay there is still there or not.
    """

    def __init__(self, trt: Any, engine: Any, logger: Any, files: EngineFiles) -> None:  # noqa: ANN401 - tensorrt is untyped
        self._trt, self._engine, self._files, self._logger = trt, engine, files, logger
        self._names: dict[str, set[str]] = {}
        """Tensor of the checkpoint -> initializers that hold it."""
        for name, (tensor, _) in files.weights.items():
            self._names.setdefault(tensor, set()).add(name)
        self._changed: set[str] = set()
        self.last: dict[str, int] = {}
        """What the last exchange came to: weights that LoRAs changed, that went back, and that went along unchanged."""

    def _refitter(self) -> Any:  # noqa: ANN401 - tensorrt is untyped
        return self._trt.Refitter(self._engine, self._logger)

    def load_all(self) -> None:
        """Give a plan without weights all of them, from the graph that it was built of.

        Raises:
            ArtifactError: they don't fit.
        """
        refitter = self._refitter()
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(self._files.folder / ONNX)) or not refitter.refit_cuda_engine():
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            message = (
                f"the weights of {self._files.folder} don't fit its plan: {' '.join(errors) or 'nothing said why'}"
            )
            raise ArtifactError(message, fix="export the artifact again")

    def change(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        """Add LoRAs to the file's weights, instead of what was added before; weights that neither has stay untouched.

        Raises:
            ArtifactError: the engine doesn't take other weights. It may have some of them by then.
        """
        if deltas and not self._files.refits:
            message = f"{self._files.folder / PLAN} was built for identical weights alone"
            raise ArtifactError(message, fix="export it with +refit")
        changed = {name for tensor in deltas for name in self._names[tensor]}
        touched = changed | self._changed
        if not touched:
            return
        stored = _Stored(self._files.folder)
        values = {}
        for name in sorted(touched):
            tensor, turned = self._files.weights[name]
            value = stored.read(name)
            if tensor in deltas:
                new = added(value.T if turned else value, deltas[tensor])
                value = (new.T if turned else new).contiguous()
            values[name] = value
        self._changed = touched  # until it is known that some went back
        along = self._apply(values, stored)
        self.last = {"changed": len(changed), "restored": len(touched - changed), "unchanged": along}
        self._changed = changed

    def _apply(self, values: Mapping[str, Tensor], stored: _Stored) -> int:
        """Set weights, and what TensorRT wants beside them because it combined them; return how many those were."""
        refitter = self._refitter()
        for name, value in values.items():
            self._set(refitter, name, value)
        beside: dict[str, Tensor] = {}  # which may make it want others
        while missing := [name for name in refitter.get_missing_weights() if name and name not in beside]:
            beside |= {name: stored.read(name) for name in missing}
            for name in missing:
                self._set(refitter, name, beside[name])
        if not refitter.refit_cuda_engine():
            message = f"TensorRT refused to exchange weights of {self._files.folder / PLAN}"
            raise ArtifactError(message, fix="bake the LoRA in: bakeoff export … --lora FILE:SCALE")
        return len(beside)

    def _set(self, refitter: Any, name: str, value: Tensor) -> None:  # noqa: ANN401 - tensorrt is untyped
        dtype = getattr(self._trt.DataType, _DTYPES[str(value.dtype).removeprefix("torch.")])
        weights = self._trt.Weights(dtype, value.data_ptr(), value.numel())
        if not refitter.set_named_weights(name, weights):
            message = f"TensorRT doesn't take {name!r} as {value.dtype} of {value.numel()} elements"
            raise ArtifactError(message, fix="export the artifact again")


class _Stored:
    """The weights beside a plan: large ones in a safetensors file, small ones in the graph itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries = {entry.name: entry for entry in read_header(folder / WEIGHTS)}

    def read(self, name: str) -> Tensor:
        """Return a weight by its initializer's name.

        Raises:
            ArtifactError: it isn't there, or isn't of floats.
        """
        entry = self._entries.get(name)
        if entry is not None and entry.dtype in TORCH_DTYPES:
            return read_tensor(entry)
        found = self._inline.get(name)
        if found is None:
            message = f"TensorRT wants {name!r} for a refit, which isn't among the floats beside {self._folder / PLAN}"
            raise ArtifactError(message, fix="bake the LoRA in: bakeoff export … --lora FILE:SCALE")
        return found

    @cached_property
    def _inline(self) -> dict[str, Tensor]:
        import onnx
        import torch

        graph = onnx.load(self._folder / ONNX, load_external_data=False).graph
        dtypes = {
            onnx.TensorProto.FLOAT: torch.float32,
            onnx.TensorProto.FLOAT16: torch.float16,
            onnx.TensorProto.BFLOAT16: torch.bfloat16,
        }
        return {
            tensor.name: torch.frombuffer(bytearray(tensor.raw_data), dtype=dtypes[tensor.data_type])
            for tensor in graph.initializer
            if tensor.data_type in dtypes and tensor.raw_data
        }
