"""Graphs that were lowered before: without its weights a part's is the same in every precision, and is made once.

Capture and lowering are most of an export's time. What they make is kept in `$BAKEOFF_HOME/graphs`, without the large
tensors: a few MB each, of the newest parts. Only a graph of the same bytes of config and weights, the same ports, tools and
code is taken from there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import staged
from ..errors import ArtifactError
from ..home import home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .exporter import Subject

_MOST = 64
_DECIDING = ("components", "exporters")
"""Folders of this package whose code decides on a graph."""


@dataclass(frozen=True)
class Shelf:
    """Where one part's graph of one kind is kept, if it is."""

    folder: Path | None
    """None: it mayn't be kept."""

    @classmethod
    def of(cls, subject: Subject, kind: str, packages: Iterable[str]) -> Shelf:
        """Find the place for a part's graph.

        Args:
            subject: the part.
            kind: of the graph, such as `onnx`.
            packages: what made it.
        """
        if subject.origin is None:
            return cls(None)
        fields: dict[str, Any] = {
            "part": subject.part,
            "origin": dict(subject.origin),
            "ports": [asdict(port) for port in (*subject.inputs, *subject.outputs)],
            "packages": {name: version(name) for name in sorted({*packages, "diffusers", "transformers"})},
            "code": _code(),
        }
        key = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
        return cls(home() / "graphs" / f"{kind}-{key[:32]}")

    def found(self) -> Path | None:
        """Return the folder of a graph that was kept, as its writer filled it."""
        if self.folder is None or not self.folder.is_dir():
            return None
        with contextlib.suppress(OSError):  # a home that can be read alone
            os.utime(self.folder)
        return self.folder

    def keep(self, write: Callable[[Path], None]) -> None:
        """Keep a graph, whole or not at all; the oldest ones go.

        Args:
            write: fills a folder.
        """
        if self.folder is None:
            return
        # What can't be kept is made again; another process may just have kept it.
        with contextlib.suppress(OSError, ArtifactError):
            with staged(self.folder, replace_existing=False) as work:
                write(work)
            _trim(self.folder.parent)


def _trim(root: Path) -> None:
    kept = sorted(root.glob("[!.]*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in kept[_MOST:]:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _code() -> str:
    root = Path(__file__).parent.parent
    files = sorted(file for name in _DECIDING for file in (root / name).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
