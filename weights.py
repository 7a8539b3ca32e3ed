"""Checkpoints on disk: where each tensor's bytes lie, and how they come into an artifact without entering memory.

The format is safetensors (https://huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header of
names, dtypes, shapes and offsets, then the bytes. Pickles are never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import PickleError, SourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

CHUNK_BYTES = 16 << 20
_HEADER_LIMIT_BYTES = 100 << 20
_FICLONE = 0x40049409
SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's floating-point dtypes -> safetensors' names of them."""
TORCH_DTYPES = {short: name for name, short in SAFETENSORS_DTYPES.items()}
_NAMES = ("diffusion_pytorch_model", "model")
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
_CONVERT = (
    'convert once: python -c "from diffusers import DiffusionPipeline as P; '
    "P.from_pretrained('MODEL', use_safetensors=False).save_pretrained('MODEL-safe')\""
)
WEIGHT_MODES = ("auto", "link", "copy")


@dataclass(frozen=True)
class Entry:
    """One tensor's place: file, first byte, length in bytes; dtype as safetensors spells it (`F32`, `BF16`…)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def bytes_in(self, dtype: str) -> int:
        """Return its bytes, once it is of a torch dtype; those that aren't floating-point stay as they are."""
        return _converted_length(self, _target_dtype(self, dtype))


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of one module, sharded or not."""

    files: tuple[Path, ...]
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a module folder's safetensors files.

        Raises:
            PickleError: there are weights, but only as pickles.
            SourceError: there are none, or a header is broken.
        """
        files = _find(folder)
        return cls(files, {entry.name: entry for file in files for entry in read_header(file)})

    @property
    def single_file(self) -> str:
        """Name of the file that would hold all of it: the first one's, without the number of a shard or a variant."""
        return self.files[0].name.partition("-000")[0].partition(".")[0] + ".safetensors"

    @property
    def nbytes(self) -> int:
        return sum(entry.length for entry in self.entries.values())

    def bytes_in(self, dtype: str) -> int:
        """Return the bytes of all tensors, once the floating-point ones are of a dtype."""
        return sum(entry.bytes_in(dtype) for entry in self.entries.values())

    @property
    def matrices(self) -> int:
        """How many tensors have two dimensions or more."""
        return sum(len(entry.shape) > 1 for entry in self.entries.values())

    @property
    def convolution_bytes(self) -> int:
        """Bytes of the tensors of four dimensions."""
        return sum(entry.length for entry in self.entries.values() if len(entry.shape) == 4)  # noqa: PLR2004

    def is_in(self, dtype: str) -> bool:
        """Say whether all floating-point tensors are of a torch dtype already."""
        return {entry.dtype for entry in self.entries.values() if entry.dtype in TORCH_DTYPES} <= {
            SAFETENSORS_DTYPES[dtype]
        }


def _find(folder: Path) -> tuple[Path, ...]:
    for name in _NAMES:
        index = folder / f"{name}.safetensors.index.json"
        if index.is_file():
            return tuple(_inside(folder, shard) for shard in _shards(index))
        if (folder / f"{name}.safetensors").is_file():
            return (folder / f"{name}.safetensors",)
    others = ", ".join(file.name for file in sorted(folder.glob("*.safetensors")))
    if others:
        message = f"{folder} has {others}, expected {' or '.join(f'{name}.safetensors' for name in _NAMES)}"
        raise SourceError(message, fix="give the file of the variant that you want this name")
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        message = f"{folder} has its weights only as pickles ({', '.join(pickles)}), which can run code when opened"
        raise PickleError(
            message,
            fix=f"if you trust them, {_CONVERT}",
        )
    message = f"no safetensors weights in {folder}"
    raise SourceError(message, fix=f"download or copy it whole; if its author has pickles alone, {_CONVERT}")


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(shard) for shard in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{index} is not an index of safetensors files: {error!r}"
        raise SourceError(message, fix="download or copy it again") from error


def _inside(folder: Path, name: str) -> Path:
    if "/" in name or "\\" in name or name in {"", ".", ".."}:
        message = f"the index in {folder} names {name!r}, which is not a file of that folder"
        raise SourceError(message)
    if not (folder / name).is_file():
        message = f"{folder} lacks {name}, which its index names"
        raise SourceError(message, fix="download or copy the model again")
    return folder / name


def read_header(file: Path) -> list[Entry]:
    """Read the entries of one safetensors file.

    Raises:
        SourceError: the file is not safetensors, or says that tensors lie outside of it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not len("{}") <= length <= min(_HEADER_LIMIT_BYTES, size - 8):
            message = f"{file} is not a safetensors file: got a header of {length} bytes in {size}"
            raise SourceError(message, fix="download or copy it again")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [_entry(file, name, item, 8 + length) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{file} is not a safetensors file: its header can't be read ({error!r})"
        raise SourceError(message, fix="download or copy it again") from error
    for entry in entries:
        if not 8 + length <= entry.offset <= entry.offset + entry.length <= size:
            message = f"{file} is cut short: {entry.name} should end at byte {entry.offset + entry.length} of {size}"
            raise SourceError(message, fix="download or copy it again")
    return entries


def _entry(file: Path, name: str, item: Mapping[str, Any], start: int) -> Entry:
    begin, end = item["data_offsets"]
    return Entry(name, file, str(item["dtype"]), tuple(item["shape"]), start + begin, end - begin)


def as_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor's bytes without copying them."""
    import torch

    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def convert(checkpoint: Checkpoint, file: Path, dtype: str) -> None:
    """Write all tensors to one file, floating-point ones as `dtype`, in chunks of a few MB."""
    write_entries(checkpoint.entries.values(), file, dtype)


def write_entries(
    entries: Iterable[Entry],
    file: Path,
    dtype: str | None = None,
    changed: Callable[[Entry], Iterable[memoryview] | None] = lambda _: None,
) -> dict[str, Entry]:
    """Stream entries into a new safetensors file, converting floats to `dtype` if given; return their new places.

    Where `changed` returns bytes for an entry, those are written instead of its own: as many, in its own dtype.
    """

    def chunks(entry: Entry) -> Iterator[bytes | memoryview]:
        yield from changed(entry) or read_chunks(entry, _target_dtype(entry, dtype))

    return write_streamed([replace(streamed(entry, dtype), chunks=chunks(entry)) for entry in entries], file)


@dataclass(frozen=True)
class Streamed:
    """A tensor that is made as it is written; `length` bytes in all."""

    name: str
    dtype: str
    """As safetensors spells it."""
    shape: Sequence[int]
    length: int
    chunks: Iterable[bytes | memoryview]


def streamed(entry: Entry, dtype: str | None = None) -> Streamed:
    """Return an entry as it is written; floats as `dtype` if given."""
    target = _target_dtype(entry, dtype)
    length = _converted_length(entry, target)
    return Streamed(entry.name, target, entry.shape, length, read_chunks(entry, target))


def write_streamed(
    tensors: Sequence[Streamed], file: Path, metadata: Mapping[str, str] | None = None
) -> dict[str, Entry]:
    """Write a new safetensors file, one tensor's chunks after another's; return the tensors' places."""
    header, _ = safetensors_header(((each.name, each.dtype, each.shape, each.length) for each in tensors), metadata)
    with file.open("wb") as stream:
        stream.write(header)
        for tensor in tensors:
            stream.writelines(tensor.chunks)
    return {entry.name: entry for entry in read_header(file)}


def save_tensors(tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, str] | None = None) -> None:
    """Write small tensors into a safetensors file, readable as far as the umask lets: the library's own is its owner's alone.

    Args:
        tensors: contiguous, by name.
        file: is made, or replaced where it lies.
        about: metadata.
    """
    from safetensors.torch import save

    file.write_bytes(save(dict(tensors), dict(about) if about else None))


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Lay tensors out one after another.

    Args:
        tensors: name, dtype as safetensors spells it, shape, and bytes of each.
        metadata: what else the header says.

    Returns:
        What the file begins with, whose length is a multiple of 8; and where each tensor begins in the file, the end of
        the last one behind them.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    ends = [0]
    for name, dtype, shape, length in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [ends[-1], ends[-1] + length]}
        ends.append(ends[-1] + length)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, [len(start) + end for end in ends]


def _target_dtype(entry: Entry, dtype: str | None) -> str:
    return SAFETENSORS_DTYPES[dtype] if dtype and entry.dtype in TORCH_DTYPES else entry.dtype


def _converted_length(entry: Entry, target: str) -> int:
    return entry.length if target == entry.dtype else entry.length // _width(entry.dtype) * _width(target)


def _width(dtype: str) -> int:
    return {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[dtype]


def read_chunks(entry: Entry, target: str) -> Iterable[bytes | memoryview]:
    """Read an entry's bytes a few MB at a time, as another floating-point dtype if `target` differs.

    Raises:
        SourceError: what is converted holds NaN, or the file ends too early.
    """
    import torch

    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        left = entry.length
        while left:
            data = bytearray(stream.read(min(CHUNK_BYTES, left)))
            if not data:
                message = f"{entry.file} ended while {entry.name} was read"
                raise SourceError(message)
            left -= len(data)
            if target == entry.dtype:
                yield bytes(data)
            else:
                values = torch.frombuffer(data, dtype=getattr(torch, TORCH_DTYPES[entry.dtype]))
                if values.isnan().any():
                    raise _broken(entry, "NaN")
                yield as_bytes(values.to(getattr(torch, TORCH_DTYPES[target])))


def read_rows(entry: Entry) -> Iterable[Tensor]:
    """Read a floating-point tensor a few MB at a time, in whole rows of its first dimension, to be rounded.

    Raises:
        SourceError: it holds what can't be: NaN or infinity.
    """
    import torch

    width = entry.length // entry.shape[0]
    rows = max(1, CHUNK_BYTES // 4 // width)
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        for start in range(0, entry.shape[0], rows):
            count = min(rows, entry.shape[0] - start)
            values = torch.frombuffer(
                bytearray(stream.read(count * width)), dtype=getattr(torch, TORCH_DTYPES[entry.dtype])
            )
            if not values.isfinite().all():
                raise _broken(entry, "NaN or infinity")
            yield values.reshape(count, *entry.shape[1:])


def _broken(entry: Entry, what: str) -> SourceError:
    return SourceError(
        f"{entry.name} of {entry.file} holds {what}",
        fix="get the model again: its weights are damaged, or its training diverged",
    )


def read_tensor(entry: Entry) -> Tensor:
    """Read one floating-point tensor into memory."""
    import torch

    with entry.file.open("rb") as stream:
        stream.seek(entry.offset)
        data = bytearray(stream.read(entry.length))
    return torch.frombuffer(data, dtype=getattr(torch, TORCH_DTYPES[entry.dtype])).reshape(entry.shape)


def place(source: Path, target: Path, mode: str) -> str:
    """Bring a file into a folder and say how: `reflinked`, `linked` or `copied`.

    `auto` shares the bytes if the file system can and copies otherwise; `link` insists on sharing; `copy` never shares.

    Raises:
        UsageError: `link` was asked for, but the file system can't.
    """
    source = source.resolve()
    if mode != "copy":
        if _reflink(source, target):
            return "reflinked"
        with contextlib.suppress(OSError):
            os.link(source, target)
            return "linked"
        if mode == "link":
            message = f"{source} can't be linked to {target}: they are on different file systems"
            raise UsageError(message, fix="use --weights auto or --weights copy")
    shutil.copyfile(source, target)
    return "copied"


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError:
            target.unlink()
            return False
    return True


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
