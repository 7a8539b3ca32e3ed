"""A baked TensorRT part on disk: what it says of itself, and whether it may be opened here."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, CorruptError
from ..weights import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PLAN, ABOUT, ONNX, WEIGHTS = "model.plan", "engine.json", "model.onnx", "model.safetensors"
_SCHEMA = 1
_ALWAYS = ("tensorrt",)
"""What a plan is bound to whatever it was built for, unless it is version compatible."""
_SAME_GPU = ("gpu", "compute_capability")


@dataclass(frozen=True)
class EngineFiles:
    """`engine.json`, as the exporter wrote it."""

    folder: Path
    bound: Mapping[str, Any]
    settings: Mapping[str, Any]
    products: Mapping[str, str]
    """Matrix product or convolution, by its node -> dtype that it is to compute in."""
    weights: Mapping[str, tuple[str, bool]]
    """Initializer -> tensor of the checkpoint, and whether transposed."""

    @classmethod
    def open(cls, folder: Path, vouched: Mapping[str, str]) -> EngineFiles:
        """Read what the part says of itself, once a verified manifest vouches for its plan.

        A plan is native code. Its bytes are hashed each time; nothing of it is handed to TensorRT before.

        Args:
            folder: of the part.
            vouched: file of the folder -> its hash in a manifest that was verified; empty where there is none.

        Raises:
            ArtifactError: no manifest vouches for the plan, or it isn't one of ours.
            CorruptError: it isn't what was written.
        """
        if PLAN not in vouched or ABOUT not in vouched:
            message = f"{folder / PLAN} is native code, and no manifest of an artifact vouches for it"
            raise ArtifactError(message, fix="export the model here, or get the whole artifact from who made it")
        for name in (PLAN, ABOUT):
            if not (folder / name).is_file() or sha256(folder / name) != vouched[name]:
                message = f"{folder / name} is not what was written: its sha256 isn't the manifest's"
                raise CorruptError(message, fix="export the artifact again")
        about = json.loads((folder / ABOUT).read_text())
        if about["schema"] > _SCHEMA:
            message = f"{folder / ABOUT} has schema {about['schema']}, this bakeoff reads up to {_SCHEMA}"
            raise ArtifactError(message, fix="pip install --upgrade bakeoff")
        weights = {name: (str(tensor), bool(turned)) for name, (tensor, turned) in about["weights"].items()}
        return cls(folder, about["bound"], about["settings"], about["products"], weights)

    def refuse_elsewhere(self, here: Mapping[str, Any]) -> None:
        """Refuse a plan that was built for another machine.

        Raises:
            ArtifactError: naming what differs.
        """
        fields = [] if self.settings["version_compatible"] else list(_ALWAYS)
        fields += {"exact": _SAME_GPU, "same_compute_capability": _SAME_GPU[1:], "ampere_plus": ()}[
            self.settings["hardware"]
        ]
        differing = [
            f"{name} {self.bound[name]}, here {here[name]}" for name in fields if self.bound[name] != here[name]
        ]
        if differing:
            message = f"{self.folder / PLAN} was built for another machine: {'; '.join(differing)}"
            raise ArtifactError(message, fix="export the model again on this machine")

    def mapped(self) -> mmap.mmap:
        """Return the plan's bytes, mapped: TensorRT reads them from the file's pages."""
        with (self.folder / PLAN).open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def plan_bytes(self) -> int:
        return (self.folder / PLAN).stat().st_size

    @property
    def refits(self) -> bool:
        """Whether weights may become others: an engine for identical ones alone would give anything."""
        return bool(self.settings["refit"])
