"""The seam of an exporter: a captured part in, files out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn
    from torch.export import ExportedProgram

    from ..components.component import Port
    from ..hardware import Availability
    from ..quantize.grid import Grids
    from ..quantize.mixture import Mixture
    from ..weights import Checkpoint
    from .hollow import Hollow


SCALES = "scales"
"""What the bytes of the scales beside codes count as; they are of float32."""


@dataclass(frozen=True)
class Subject:
    """What an exporter gets: one part, and its checkpoint in whatever dtype it has."""

    part: str
    mixture: Mixture
    """The precision of its weights."""
    activations: Mapping[str, Grids]
    """Layer -> what its input and its output are rounded to, where the recipe rounds activations as calibrated."""
    inputs: tuple[Port, ...]
    """Ports as the files shall have them; dtype and rank may differ from the program's (a convention of the backend)."""
    outputs: tuple[Port, ...]
    source: Path
    """Folder with `config.json` and the checkpoint."""
    checkpoint: Checkpoint
    capture: Callable[..., tuple[ExportedProgram, Hollow]]
    """Capture on hollow weights; those named shall have their values. In float32 on the CPU, unless a torch dtype and a
    device follow."""
    module: Callable[[], nn.Module]
    """Build the module as its library does, on hollow weights."""
    weights: str
    """`auto`, `link` or `copy`: how bytes that needn't change come into the folder."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the recipe."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Named dimension -> the largest size that the model can take."""
    origin: Mapping[str, object] | None = None
    """What decides on the captured program beside ports and tools: hashes of the module's files and the like. None: its
    graph isn't kept for later exports."""


@dataclass(frozen=True)
class Cost:
    """What exporting one part takes, predicted from its checkpoint's headers."""

    anon_bytes: int
    """Peak of anonymous memory, of the whole process."""
    disk_bytes: int
    seconds: float
    """On one core, of capture, lowering and writing."""
    weight_bytes: Mapping[str, int]
    """dtype -> bytes of weights in it, whether written or shared."""


@dataclass(frozen=True)
class Lowered:
    """What an exporter wrote."""

    weights: str
    """`reflinked`, `linked`, `copied` or `written`."""
    weight_bytes: Mapping[str, int] = field(default_factory=dict)
    """dtype -> bytes of weights in it; codes of a low-bit format under its name, their scales as `SCALES`."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Matrix or convolution that a low-bit recipe left in a wider dtype -> why."""
    activations: Mapping[str, Grids] | None = None
    """Layer -> what its input and output are rounded to, where that isn't just what `Subject.activations` asked for."""


class Exporter(Protocol):
    """Registered under the entry points `bakeoff.exporters`; its entry point's name is the backend's in recipes.

    One whose files depend on the machine also is a `BoundExporter`.
    """

    version: ClassVar[int]
    """Raised when a change here changes the files: part of an artifact's key."""
    precisions: ClassVar[tuple[str, ...]]
    reasons: ClassVar[Mapping[str, str]]
    """Precision of recipes that it doesn't have -> why; none is left out of both."""
    layer_precisions: ClassVar[Mapping[str, tuple[str, ...]]]
    """Precision of a part -> those that some of its layers may have instead; none unless said."""
    options: ClassVar[Mapping[str, tuple[str, ...]]]
    """Option of a recipe -> the values it may have; none: any, which `BoundExporter.check` looks at. One named after an input
    asks for the dtype of that input's port."""

    def cost(
        self,
        checkpoint: Checkpoint,
        mixture: Mixture,
        *,
        options: Mapping[str, str],
        operations: int,
        shared: bool,
    ) -> Cost:
        """Predict what `lower` takes.

        Args:
            checkpoint: of the part's module.
            mixture: the precision of its weights.
            options: of the recipe.
            operations: of the captured graph, about.
            shared: whether bytes that needn't change come into the folder without being copied.
        """

    def packages(self) -> tuple[str, ...]:
        """Name the packages whose versions belong in the manifest."""

    def lower(self, subject: Subject, folder: Path) -> Lowered:
        """Write the part's files into an existing, empty folder."""


@runtime_checkable
class BoundExporter(Protocol):
    """What an exporter has besides whose files are for the machine that they are made on."""

    def probe(self) -> Availability:
        """Say whether it can be used here; asked before any work."""

    def check(self, precision: str, options: Mapping[str, str]) -> None:
        """Refuse a precision, or options, that can't be had here.

        Raises:
            RecipeError: an option's value means nothing.
            UnavailableError: the machine hasn't that precision.
        """

    def key_fields(self, precision: str, options: Mapping[str, str]) -> dict[str, Any]:
        """Return what decides the files besides model and recipe; `bound` is what the manifest says of the hardware."""
