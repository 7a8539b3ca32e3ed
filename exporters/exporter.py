"""The seam of an exporter: a captured part in, files out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

    from ..components.component import Port
    from ..weights import Checkpoint


@dataclass(frozen=True)
class Subject:
    """What an exporter gets: one part, whose checkpoint already has the dtype that `Exporter.storage` asked for."""

    part: str
    precision: str
    inputs: tuple[Port, ...]
    """Ports as the files shall have them; dtype and rank may differ from the program's (a convention of the backend)."""
    outputs: tuple[Port, ...]
    source: Path
    """Folder with `config.json` and the checkpoint."""
    checkpoint: Checkpoint
    program: Callable[[], ExportedProgram]
    """Captures on the first call."""
    weights: str
    """`auto`, `link` or `copy`: how bytes that needn't change come into the folder."""


@dataclass(frozen=True)
class Lowered:
    """What an exporter wrote."""

    weights: str
    """`reflinked`, `linked`, `copied` or `written`."""
    weight_bytes: Mapping[str, int] = field(default_factory=dict)
    """dtype -> bytes of weights in it."""


class Exporter(Protocol):
    """Registered under the entry points `bakeoff.exporters`; its entry point's name is the backend's in recipes."""

    version: ClassVar[int]
    """Raised when a change here changes the files: part of an artifact's key."""
    precisions: ClassVar[tuple[str, ...]]
    options: ClassVar[Mapping[str, tuple[str, ...]]]
    """Option of a recipe -> the values it may have. One named after an input asks for the dtype of that input's port."""
    own_weights: ClassVar[bool]
    """Whether the files always hold weights of their own, or can use the checkpoint's where the dtype is the same."""

    def storage(self, precision: str) -> str:
        """Return the torch dtype that the checkpoint must have before lowering."""

    def packages(self) -> tuple[str, ...]:
        """Name the packages whose versions belong in the manifest."""

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        """Write the part's files into an existing, empty folder."""
