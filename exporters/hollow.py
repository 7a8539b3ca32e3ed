"""Stand-ins for checkpoints: all tensors as float32, the large ones holes of a sparse file with a mark at their start.

Capture and lowering look at the shapes of large weights, never at their values. So they work on a file that takes no
disk and no memory, whatever the size and dtype of the checkpoint; the marks tell which constant of the lowered graph
is which tensor, and its bytes are then linked or streamed from the checkpoint itself.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import LoweringError
from ..weights import SAFETENSORS_DTYPES, TORCH_DTYPES, Checkpoint, as_bytes, read_chunks, safetensors_header

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram
    from torch.fx import Node

    from ..weights import Entry

T = TypeVar("T")

SOLID_BYTES = 1 << 16
"""Smaller tensors keep their values: optimizers fold them."""
_SHARD_BYTES = 4_000_000_000
_MARK = (6.0e-23, 1.6e-19)
_MARK_BYTES = 16
_PREFIX_BYTES = 4096
_THROUGH = ("aten.to.", "aten._to_copy", "aten.alias", "aten.detach", "aten.clone")
"""What leaves a float32 tensor as it is."""


@dataclass(frozen=True)
class Hollow:
    """A folder that loads like a module's own, and the way back from its bytes to the checkpoint's tensors."""

    folder: Path
    marks: Mapping[bytes, Entry]
    solid: Mapping[tuple[int, bytes], list[tuple[Entry, Entry]]]
    """(bytes, first of them) -> tensors that are as they are: here, and in the checkpoint."""

    @classmethod
    def make(
        cls, source: Path, folder: Path, solid: frozenset[str] = frozenset(), checkpoint: Checkpoint | None = None
    ) -> Hollow:
        """Write the stand-in for a module folder into a new folder.

        Args:
            source: holds `config.json` and safetensors.
            folder: is made anew.
            solid: names of large tensors whose values are needed after all.
            checkpoint: of the module; by default the one in its folder.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copyfile(source / "config.json", folder / "config.json")
        checkpoint = checkpoint or Checkpoint.open(source)
        marks = _write(checkpoint, folder, solid)
        values: dict[tuple[int, bytes], list[tuple[Entry, Entry]]] = {}
        marked = {entry.name for entry in marks.values()}
        for entry in Checkpoint.open(folder).entries.values():
            if entry.name not in marked:
                data = _read(entry)
                values.setdefault((len(data), data[:_PREFIX_BYTES]), []).append((entry, checkpoint.entries[entry.name]))
        return cls(folder, marks, values)

    def entry_of(self, data: memoryview) -> Entry | None:
        """Find the checkpoint's tensor that these bytes, of float32 as captured, stand for; whatever its shape here."""
        marked = self.marks.get(bytes(data[:_MARK_BYTES]))
        if marked is not None:
            return marked if _width(marked) == len(data) else None
        for entry, original in self.solid.get((len(data), bytes(data[:_PREFIX_BYTES])), []):
            if _read(entry) == data:
                return original
        return None

    def needed(self, program: ExportedProgram) -> Counter[str]:
        """Return each hollow tensor that a captured program uses -> how many operations take it."""
        signature = program.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        tensors = {**program.state_dict, **program.constants}
        found: Counter[str] = Counter()
        for node in program.graph.nodes:
            if node.name in sources and (takers := _takers(node)):
                mark = bytes(as_bytes(tensors[sources[node.name]].contiguous())[:_MARK_BYTES])
                if mark in self.marks:
                    found[self.marks[mark].name] += takers
        return found


def _takers(node: Node) -> int:
    """Count the operations that take a tensor, through those that leave it as it is; checks of it take nothing."""
    taking = [user for user in node.users if user.users or user.op == "output"]
    return sum(_takers(user) if str(user.target).startswith(_THROUGH) else 1 for user in taking)


def lower_hollow(
    part: str,
    capture: Callable[[frozenset[str]], tuple[ExportedProgram, Hollow]],
    lower: Callable[[ExportedProgram, Hollow], tuple[T, set[str]]],
) -> T:
    """Capture and lower; again with their values for tensors that the lowering changed, such as a transposed one.

    Args:
        part: its name, for errors.
        capture: gets the names of large tensors whose values it shall have.
        lower: returns what it made, and the names of the checkpoint's tensors that it found in it as they are, wherever they
            are used.

    Raises:
        LoweringError: it goes on losing tensors.
    """
    solid: frozenset[str] = frozenset()
    while True:
        program, hollow = capture(solid)
        needed = hollow.needed(program)
        lowered, found = lower(program, hollow)
        lost = needed.keys() - found
        if not lost:
            return lowered
        if lost <= solid:
            message = f"{part}: lowering loses {', '.join(sorted(lost)[:5])}"
            raise LoweringError(message)
        solid |= lost


def _write(checkpoint: Checkpoint, folder: Path, solid: frozenset[str]) -> dict[bytes, Entry]:
    """Write sparse files; return mark -> the checkpoint's tensor.

    They are sharded: a kernel may refuse to map a file that is larger than the memory.
    """
    shards: list[list[Entry]] = [[]]
    for entry in checkpoint.entries.values():
        if sum(map(_width, shards[-1])) + _width(entry) > _SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(entry)
    names = [checkpoint.single_file]
    if len(shards) > 1:
        stem = names[0].removesuffix(".safetensors")
        names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    marks: dict[bytes, Entry] = {}
    for name, shard in zip(names, shards, strict=True):
        _write_shard(shard, folder / name, solid, marks)
    return marks


def _write_shard(entries: list[Entry], file: Path, solid: frozenset[str], marks: dict[bytes, Entry]) -> None:
    """Write one sparse file, and note the marks in it."""
    header, offsets = safetensors_header((each.name, _dtype(each), each.shape, _width(each)) for each in entries)
    with file.open("wb") as stream:
        stream.write(header)
        for entry, offset in zip(entries, offsets[:-1], strict=True):
            stream.seek(offset)
            if _is_hollow(entry) and entry.name not in solid:
                mark = _mark(len(marks))
                marks[mark] = entry
                stream.write(mark)
            else:
                stream.writelines(read_chunks(entry, _dtype(entry)))
        stream.truncate(offsets[-1])


def _is_hollow(entry: Entry) -> bool:
    return entry.dtype in TORCH_DTYPES and _width(entry) >= SOLID_BYTES


def _dtype(entry: Entry) -> str:
    return SAFETENSORS_DTYPES["float32"] if entry.dtype in TORCH_DTYPES else entry.dtype


def _width(entry: Entry) -> int:
    """Return the tensor's bytes in the stand-in."""
    return entry.bytes_in("float32")


def _mark(number: int) -> bytes:
    import numpy as np

    return np.array([_MARK[0], number, _MARK[1], -number], dtype=np.float32).tobytes()


def _read(entry: Entry) -> bytes:
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        return stream.read(entry.length)
