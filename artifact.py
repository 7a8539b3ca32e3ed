"""The artifact: a folder that needs nothing else, and the manifest that can verify and explain it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, CorruptError
from .weights import place, sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SCHEMA = 1
MANIFEST = "bakeoff.json"
ACTIVATIONS = "activations.json"
"""In a part's folder: layer -> what its input and output are rounded to, where that was calibrated."""
INPUTS = "inputs.st"
"""Beside it, safetensors: what layers' inputs took on, where weights were rounded for that."""
_WEIGHT_WIDTHS = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "fp8": 1,
    "int4": 0.5,
    "int4 in bytes": 1,
    "nf4": 0.5,
}
"""dtype or low-bit format -> bytes of a weight."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NUMBERS = itertools.count()
_LIVE: set[Path] = set()
"""Folders of this process that `_beside` has given out."""


@dataclass(frozen=True)
class PartEntry:
    """What the manifest says of one part."""

    backend: str
    precision: str
    key: str
    key_fields: Mapping[str, Any]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    weights: str
    """`reflinked`, `linked`, `copied` or `written`."""
    weight_bytes: Mapping[str, int]
    tools: Mapping[str, str]
    weight_shares: Mapping[str, float] = field(default_factory=dict)
    """dtype or low-bit format -> its share of the weights, by their number."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Matrix or convolution that a low-bit recipe left in a wider dtype -> why."""
    stated_share: float | None = None
    """Of `weight_shares`, what is in the type that the precision states, for those of low bits: int8 for w8a8, of layers
    that were calibrated."""
    uncalibrated: list[str] = field(default_factory=list)
    """Weights whose layers no drawing reached when activations were calibrated: they alone are rounded."""

    @property
    def layers(self) -> dict[str, str]:
        """Layers that have a precision of their own, by their names in the checkpoint -> which."""
        return dict(self.key_fields["recipe"].get("layers", {}))

    @property
    def precisions(self) -> set[str]:
        """The part's precision, and those of its layers."""
        return {self.precision, *self.layers.values()}


def shares_of(weight_bytes: Mapping[str, int]) -> dict[str, float]:
    """Return dtype or low-bit format -> its share of all weights, by their number; scales count as none."""
    counts = {name: size / _WEIGHT_WIDTHS[name] for name, size in weight_bytes.items() if name in _WEIGHT_WIDTHS}
    total = sum(counts.values())
    return {name: round(count / total, 4) for name, count in sorted(counts.items())} if total else {}


def stated_share(shares: Mapping[str, float], name: str) -> float:
    """Return the share of a low-bit format's weights, however they are stored (`int4`, `int4 in bytes`)."""
    return round(sum(share for label, share in shares.items() if label.split()[0] == name), 4)


@dataclass(frozen=True)
class FileEntry:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`bakeoff.json`. Its text is a function of its content, so that a changed byte of it shows, too."""

    schema: int
    bakeoff: str
    key: str
    key_fields: Mapping[str, Any]
    family: str
    pipeline: str
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    hardware: Mapping[str, Any] | None
    """None: bound to no hardware."""
    parts: Mapping[str, PartEntry]
    files: Mapping[str, FileEntry]
    proof: Mapping[str, Any] = field(default_factory=lambda: {"status": "unproved", "reason": "not yet proved"})
    variant: str | None = None
    """Of the family, such as `controlnet`."""

    def render(self) -> str:
        """Return the file's text, the last field being the hash of all others."""
        content = asdict(self)
        if self.variant is None:
            del content["variant"]
        for part in content["parts"].values():
            for name in ("kept", "weight_shares", "stated_share", "uncalibrated"):
                if part[name] is None or part[name] in ({}, []):
                    del part[name]
        content["sha256"] = hashlib.sha256(_canonical(content).encode()).hexdigest()
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, data: bytes, where: Path) -> Manifest:
        """Read a manifest from its file's bytes.

        Raises:
            CorruptError: it was changed after it was written, or isn't one.
            ArtifactError: a later bakeoff wrote it.
        """
        try:
            content = json.loads(data.decode())
            content.pop("sha256")
            if content["schema"] > SCHEMA:
                message = f"{where} has schema {content['schema']}, this bakeoff reads up to {SCHEMA}"
                raise ArtifactError(message, fix="pip install --upgrade bakeoff")
            content["parts"] = {name: PartEntry(**part) for name, part in content["parts"].items()}
            content["files"] = {name: FileEntry(**file) for name, file in content["files"].items()}
            manifest = cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{where} is not a bakeoff manifest: {error}"
            raise CorruptError(message, fix="export the artifact again") from error
        if manifest.render().encode() != data:
            message = f"{where} was changed after it was written: its sha256 doesn't fit its content"
            raise CorruptError(message, fix="export the artifact again")
        return manifest

    @property
    def proved(self) -> bool:
        return self.proof.get("status") == "proved"


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def key_of(fields: Mapping[str, Any]) -> str:
    """Hash the fields that decide what is written."""
    return hashlib.sha256(_canonical(fields).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Read the manifest and check that each file is there with its size; hash nothing.

        Raises:
            ArtifactError: the folder isn't an artifact.
            CorruptError: the manifest or a file isn't what was written.
        """
        file = folder / MANIFEST
        if not file.is_file():
            message = f"{folder} is not an artifact: it has no {MANIFEST}"
            raise ArtifactError(message, fix=f"bakeoff export MODEL -o {folder} --recipe torch:fp32")
        artifact = cls(folder, Manifest.parse(file.read_bytes(), file))
        problems = [problem for name in artifact.manifest.files if (problem := artifact._check_size(name))]
        if problems:
            raise CorruptError("; ".join(problems), fix=f"bakeoff verify {folder}, then export it again")
        return artifact

    def _check_size(self, name: str) -> str | None:
        path = inside(self.folder, name)
        expected = self.manifest.files[name].size
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        return None if size == expected else f"{name} has {size} bytes, expected {expected}"

    def verify(self, progress: Callable[[int], object] = lambda _: None) -> list[str]:
        """Hash every file; return what is wrong, in words. `progress` gets each file's size in bytes."""
        problems = []
        for name, entry in self.manifest.files.items():
            problem = self._check_size(name)
            if problem is None and sha256(inside(self.folder, name)) != entry.sha256:
                problem = f"{name} was changed: its sha256 is not the one that was written"
            if problem:
                problems.append(problem)
            progress(entry.size)
        extra = sorted(set(list_files(self.folder)) - set(self.manifest.files))
        return problems + [f"{name} is not in the manifest" for name in extra]

    def twin(self, folder: Path) -> Artifact:
        """Make a second artifact of the same files, linked where the file system can, in an existing, empty folder."""
        for name in [*list_files(self.folder), MANIFEST]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            place(self.folder / name, folder / name, "auto")
        return Artifact(folder, self.manifest)

    def vouched(self, part: str) -> dict[str, str]:
        """Return file -> sha256 of a part's files, as the manifest has them: it was verified when it was opened."""
        prefix = f"{part}/"
        files = self.manifest.files.items()
        return {name.removeprefix(prefix): entry.sha256 for name, entry in files if name.startswith(prefix)}

    def with_proof(self, proof: Mapping[str, Any]) -> Artifact:
        """Write a proof, and the tensors it left under `proof/`, into the manifest, atomically."""
        files = {**self.manifest.files, **describe_files(self.folder, "proof")}
        artifact = Artifact(self.folder, replace(self.manifest, proof=proof, files=files))
        artifact.write_manifest()
        return artifact

    def write_manifest(self) -> None:
        partial = self.folder / f".{MANIFEST}.partial"
        partial.write_bytes(self.manifest.render().encode())
        partial.replace(self.folder / MANIFEST)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest names.

    Raises:
        ArtifactError: the name leads out of the folder.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
        message = f"{folder} names a file outside of itself: {name!r}"
        raise ArtifactError(message, fix="don't use this artifact unless you know who made it")
    return path


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files but the manifest, sorted."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in files if path.as_posix() not in {MANIFEST, f".{MANIFEST}.partial"})


def describe_files(folder: Path, below: str = "") -> dict[str, FileEntry]:
    """Return size and hash of each file under `below`; one that is linked twice is hashed once."""
    known: dict[tuple[int, int], str] = {}
    entries = {}
    for name in list_files(folder):
        if not name.startswith(below):
            continue
        stat = (folder / name).stat()
        inode = (stat.st_dev, stat.st_ino)
        if inode not in known:
            known[inode] = sha256(folder / name)
        entries[name] = FileEntry(stat.st_size, known[inode])
    return entries


@contextlib.contextmanager
def staged(target: Path, *, replace_existing: bool) -> Iterator[Path]:
    """Yield a new folder beside `target` that takes its place, whole, when the block ends well.

    A process killed inside leaves `target` as it was; what it left behind is removed by the next export there. A link to
    a folder stays one: the folder that it leads to is replaced.

    Raises:
        ArtifactError: `target` exists and isn't to be replaced, or isn't an artifact.
    """
    target = target.resolve() if target.is_symlink() else target
    check_target(target, replace_existing=replace_existing)
    with _beside(target, "partial") as partial:
        yield partial
        _sync(partial)
        check_target(target, replace_existing=replace_existing)
        if replace_existing and target.exists():
            _exchange(partial, target)
        else:
            partial.rename(target)  # fails, changing nothing, where something has just appeared there


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` for the while; if the process is killed, the next export there removes it.

    There may be several at once.
    """
    with _beside(target, f"partial-scratch{next(_NUMBERS)}") as folder:
        yield folder


@contextlib.contextmanager
def _beside(target: Path, kind: str) -> Iterator[Path]:
    """Yield a new folder beside `target`, named after this process; what is left of it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    folder = target.parent.resolve() / f".{target.name}.{kind}-{os.getpid()}"
    folder.mkdir()
    _LIVE.add(folder)
    try:
        yield target.parent / folder.name
    finally:
        _LIVE.discard(folder)
        shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, *, replace_existing: bool) -> None:
    """Refuse what can't be written to, or replaced.

    Raises:
        ArtifactError: `target` exists and isn't to be replaced, isn't an artifact, or is the current folder.
    """
    if not target.exists():
        return
    if target.samefile(Path.cwd()):
        message = f"{target} is the current folder, which can't be replaced"
        raise ArtifactError(message, fix="choose a folder of its own for the artifact")
    if not replace_existing:
        message = f"{target} already exists"
        raise ArtifactError(message, fix="choose another folder, or add --force to replace it")
    if not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        message = f"{target} is not an artifact: --force replaces artifacts and empty folders alone"
        raise ArtifactError(message, fix="choose another folder, or move this one away yourself")


def sweep(target: Path) -> None:
    """Remove what killed exports to this target have left; in a container an earlier one may have had this process's number."""
    import psutil

    for stale in target.parent.resolve().glob(f".{target.name}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        own = pid == str(os.getpid())
        if pid.isdecimal() and (stale not in _LIVE if own else not psutil.pid_exists(int(pid))):
            shutil.rmtree(stale, ignore_errors=True)


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the kernel can; else in two."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        paths = os.fsencode(new), os.fsencode(old)
        if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
