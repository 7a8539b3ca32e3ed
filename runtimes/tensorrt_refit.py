"""Exchange weights of an open engine: LoRAs are added to those that they change, and taken off again bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, InputError
from ..lora import added
from ..weights import TORCH_DTYPES, read_header, read_tensor
from .tensorrt_files import PLAN, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..lora import Delta
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
    """What an engine's weights are now. Those of the file come back as the file's own bytes."""

    def __init__(self, trt: Any, engine: Any, logger: Any, files: EngineFiles) -> None:  # noqa: ANN401 - tensorrt is untyped
        self._trt, self._files = trt, files
        self._refitter = trt.Refitter(engine, logger)
        self._names = {tensor: name for name, (tensor, _) in files.weights.items()}
        self._changed: set[str] = set()
        self.last: dict[str, int] = {}
        """What the last exchange came to: weights that LoRAs changed, that went back, and that went along unchanged."""

    def load_all(self) -> None:
        """Give a plan without weights all of them."""
        entries = {entry.name: entry for entry in read_header(self._files.folder / WEIGHTS)}
        self._apply({name: _stored(entry) for name, entry in entries.items() if name != "padding"}, known_alone=True)

    def change(self, deltas: Mapping[str, Sequence[Delta]]) -> None:
        """Add LoRAs to the file's weights, instead of what was added before; weights that neither has stay untouched.

        Raises:
            ArtifactError: the engine doesn't take other weights.
        """
        if deltas and not self._files.refits:
            message = f"{self._files.folder / PLAN} was built for identical weights alone"
            raise ArtifactError(message, fix="export it with +refit")
        entries = {entry.name: entry for entry in read_header(self._files.folder / WEIGHTS)}
        touched = {self._names[tensor] for tensor in deltas} | self._changed
        if not touched:
            return
        values = {}
        for name in sorted(touched):
            tensor, turned = self._files.weights[name]
            stored = _stored(entries[name])
            if tensor in deltas:
                plain = stored.T if turned else stored
                new = added(plain, deltas[tensor])
                stored = (new.T if turned else new).contiguous()
            values[name] = stored
        along = self._apply(values, entries=entries)
        changed = {self._names[tensor] for tensor in deltas}
        self.last = {"changed": len(changed), "restored": len(touched - changed), "unchanged": along}
        self._changed = changed

    def _apply(
        self, values: Mapping[str, Tensor], *, entries: Mapping[str, Any] | None = None, known_alone: bool = False
    ) -> int:
        """Set weights, and what TensorRT wants beside them because it combined them; return how many those were."""
        known = set(self._refitter.get_all_weights())
        held = {name: value for name, value in values.items() if not known_alone or name in known}
        for name, value in held.items():
            self._set(name, value)
        missing = [name for name in self._refitter.get_missing_weights() if name]
        beside = {}
        for name in missing:
            if entries is None or name not in entries:
                message = f"TensorRT wants {name!r} for a refit, which isn't among the weights beside the plan"
                raise ArtifactError(message, fix="export the artifact again")
            beside[name] = _stored(entries[name])
            self._set(name, beside[name])
        if not self._refitter.refit_cuda_engine():
            message = f"TensorRT refused to exchange weights of {self._files.folder / PLAN}"
            raise ArtifactError(message, fix="bake the LoRA in: bakeoff export … --lora FILE:SCALE")
        for name in (*held, *beside):
            self._refitter.unset_named_weights(name)
        return len(beside)

    def _set(self, name: str, value: Tensor) -> None:
        dtype = getattr(self._trt.DataType, _DTYPES[str(value.dtype).removeprefix("torch.")])
        weights = self._trt.Weights(dtype, value.data_ptr(), value.numel())
        if not self._refitter.set_named_weights(name, weights):
            message = f"TensorRT doesn't take {name!r} as {value.dtype} of {value.numel()} elements"
            raise ArtifactError(message, fix="export the artifact again")


def _stored(entry: Any) -> Tensor:  # noqa: ANN401 - an Entry of any dtype
    if entry.dtype not in TORCH_DTYPES:
        message = f"{entry.name} is stored as {entry.dtype}, which LoRAs can't be added to"
        raise InputError(message, fix="bake the LoRA in: bakeoff export … --lora FILE:SCALE")
    return read_tensor(entry)
