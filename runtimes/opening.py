"""Read a folder, ours or somebody else's, and open its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..artifact import MANIFEST, Artifact, PartEntry
from ..components.component import Port
from ..errors import ArtifactError, UnavailableError, UsageError
from ..hardware import processor
from ..recipe import Placement
from ..sources.source import family_of, parts_of, read_json
from ..weights import Checkpoint
from . import aoti
from .runtime import PartFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..components.family import Family, Part
    from ..sources.lora import Delta, Lora
    from ..sources.source import Source
    from .runtime import Runtime

_FOREIGN_FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}


@dataclass(frozen=True)
class Baked:
    """A folder that can be opened: its family, where each part lies and what it is."""

    folder: Path
    family: Family
    parts: Mapping[str, PartEntry]
    folders: Mapping[str, Path]
    proof: Mapping[str, Any]
    recipe: str
    artifact: Artifact | None = None
    """None: a folder without a manifest."""

    def vouched(self, part: str) -> dict[str, str]:
        """Return file -> sha256 of a part's files as the manifest has them; nothing where there is none."""
        return self.artifact.vouched(part) if self.artifact else {}

    @property
    def id(self) -> str:
        return str(self.folder)

    @property
    def index(self) -> dict[str, Any]:
        return read_json(self.folder / "model_index.json")

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.module for part in self.family.parts if part.name in self.parts))

    def config(self, module: str) -> dict[str, Any]:
        return read_json(self.folders[self._part(module)] / "config.json")

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights that LoRAs can be added to."""
        name = self._part(module)
        return plugins.runtime(self.parts[name].backend).shapes(self.folders[name])

    def refuse_twice(self, lora: Lora) -> None:
        """Refuse a LoRA that is baked into a part already.

        Raises:
            UsageError: with the part.
        """
        for name, part in self.parts.items():
            if any(baked["sha256"] == lora.fields["sha256"] for baked in part.key_fields.get("loras", ())):
                message = f"{lora.file} is baked into {self.folder}'s {name} already: it would be added twice"
                raise UsageError(message, fix="leave it out, or use an artifact that was exported without --lora")

    def _part(self, module: str) -> str:
        return next(part.name for part in self.family.parts if part.module == module and part.name in self.parts)


def read_folder(folder: Path) -> Baked:
    """Recognise an artifact, an Optimum ONNX or OpenVINO folder, or a Diffusers folder.

    Raises:
        ArtifactError: it is none of these, or lacks a part.
        PickleError: a part's weights are there as pickles alone.
        CorruptError: it is an artifact whose files aren't those that were written.
    """
    if (folder / MANIFEST).is_file():
        return of_artifact(Artifact.open(folder))
    if not folder.is_dir():
        message = f"no folder {folder}"
        raise ArtifactError(message, fix=f"bakeoff export shapes -o {folder} --recipe torch:fp32")
    family = family_of(folder)
    wanted = parts_of(family, read_json(folder / "model_index.json"))
    found = {part.name: _foreign(folder, part) for part in wanted}
    parts = {name: item[1] for name, item in found.items() if item}
    modules = {part.module for part in wanted if part.name in parts}
    for part in wanted:
        if part.module not in modules:
            _refuse_absent(folder, part)
    return Baked(
        folder,
        family,
        parts,
        {name: item[0] for name, item in found.items() if item},
        {"status": "unproved", "reason": "not made by bakeoff"},
        f"{next(iter(parts.values())).backend}:as found",
    )


def of_source(source: Source, precision: str) -> Baked:
    """Return a model as it is, to be run by torch in a precision: `fp32`, `bf16`, `fp16`."""
    folders = {part.name: source.path(part.module) for part in source.parts}
    parts = {
        part.name: replace(_foreign_entry(folders[part.name], part, "torch"), precision=precision)
        for part in source.parts
    }
    reason = "the model itself"
    return Baked(
        source.folder,
        source.family,
        parts,
        folders,
        {"status": "unproved", "reason": reason},
        f"torch:{precision}",
    )


def of_artifact(artifact: Artifact) -> Baked:
    """Return an artifact's parts.

    Raises:
        UnavailableError: no installed package knows its family.
    """
    manifest = artifact.manifest
    family = next((family for family in plugins.families() if family.name == manifest.family), None)
    if family is None:
        message = f"{artifact.folder} holds a {manifest.family} pipeline, which no installed package knows"
        raise UnavailableError(message, fix="install the plugin that registers this family")
    return Baked(
        artifact.folder,
        family.variant(manifest.variant),
        manifest.parts,
        {name: artifact.folder / name for name in manifest.parts},
        manifest.proof,
        ", ".join(dict.fromkeys(f"{part.backend}:{part.precision}" for part in manifest.parts.values())),
        artifact,
    )


def judged_on(artifact: Artifact, threads: int | None = None) -> Placement:
    """Return where an artifact is proved: on the processor, but for parts that run, or were compiled, elsewhere alone."""
    found = {
        name: aoti.device_of(artifact.folder / name) or plugins.runtime(part.backend).proves_on(part.precision)
        for name, part in artifact.manifest.parts.items()
    }
    return Placement("cpu", {name: device for name, device in found.items() if device != "cpu"}, threads=threads)


def proved_elsewhere(baked: Baked) -> str | None:
    """Say that an artifact was proved on a processor that multiplies otherwise than this one, if it was.

    Backends choose their kernels of two bytes and of low bits by instruction sets: what such a proof vouches for, other
    kernels compute. Of parts in float32 they are of one arithmetic, but for the order of sums.
    """
    there = baked.proof.get("processor")
    if there is None or all(part.backend == "null" or part.precisions == {"fp32"} for part in baked.parts.values()):
        return None
    here = processor()
    if there["instruction_sets"] == here["instruction_sets"]:
        return None
    lacking = [
        f"{where} alone has {', '.join(sorted(names))}"
        for where, names in (
            ("that one", set(there["instruction_sets"]) - set(here["instruction_sets"])),
            ("this one", set(here["instruction_sets"]) - set(there["instruction_sets"])),
        )
        if names
    ]
    return (
        f"it was proved on another processor, {there['cpu']} ({'; '.join(lacking)}), whose kernels may differ: "
        f"bakeoff verify {baked.folder} --parity proves it on this one"
    )


def _foreign(folder: Path, part: Part) -> tuple[Path, PartEntry] | None:
    for backend, file in _FOREIGN_FILES.items():
        if (folder / part.name / file).is_file():
            return folder / part.name, _foreign_entry(folder / part.name, part, backend)
    if any((folder / part.module).glob("*.safetensors")):
        return folder / part.module, _foreign_entry(folder / part.module, part, "torch")
    return None


def _refuse_absent(folder: Path, part: Part) -> None:
    """Say why a module can't be opened: its weights are pickles, or it isn't there."""
    if (folder / part.module).is_dir():
        Checkpoint.open(folder / part.module)
    expected = ", ".join(f"{part.name}/{file}" for file in _FOREIGN_FILES.values())
    message = f"{folder} has no {part.name}"
    raise ArtifactError(message, fix=f"expected {expected} or safetensors in {part.module}/")


def _foreign_entry(folder: Path, part: Part, backend: str) -> PartEntry:
    config = read_json(folder / "config.json")
    return PartEntry(
        backend=backend,
        precision="fp32",
        key="",
        key_fields={},
        inputs=[port_to_dict(port) for port in part.component.inputs(config)],
        outputs=[port_to_dict(port) for port in part.component.outputs(config)],
        weights="as found",
        weight_bytes={},
        tools={},
    )


def port_to_dict(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype, "dims": list(port.dims)} | ({"exact": True} if port.exact else {})


def port_from_dict(data: Mapping[str, Any]) -> Port:
    return Port(data["name"], data["dtype"], tuple(data["dims"]), exact=data.get("exact", False))


def open_part(
    folder: Path,
    part: Part,
    entry: PartEntry,
    placement: Placement,
    deltas: Mapping[str, Sequence[Delta]] | None = None,
    vouched: Mapping[str, str] | None = None,
) -> Runtime:
    """Open one part from its own folder with the runtime of its backend, with what LoRAs add to its weights.

    `vouched` is what a verified manifest has of its files, by name: native code isn't opened without.

    Raises:
        UnavailableError: the backend can't be used here.
    """
    runtime = plugins.runtime(entry.backend)
    available = runtime.probe()
    if not available.ok:
        message = f"{part.name} is a {entry.backend} part, but {available.reason}"
        raise UnavailableError(message, fix=available.fix)
    files = PartFiles(
        name=part.name,
        folder=folder,
        precision=entry.precision,
        inputs=tuple(port_from_dict(port) for port in entry.inputs),
        outputs=tuple(port_from_dict(port) for port in entry.outputs),
        build=lambda dtype: part.component.flat(part.component.load(folder, _torch_dtype(dtype))).eval(),
        deltas=deltas or {},
        islands=bool(entry.key),
        vouched=vouched or {},
    )
    return runtime(files, placement)


def _torch_dtype(name: str) -> Any:  # noqa: ANN401 - a torch.dtype, with torch imported late
    import torch

    return getattr(torch, name)
