"""Where a model comes from: `shapes`, a Diffusers folder, a hub id, or a single-file checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..errors import SourceError, UsageError, unknown
from ..home import remembered_sha256
from ..weights import Checkpoint
from . import hub, single_file
from .variants import plainly_named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..components.family import Family, Part

EMBEDDED = ("shapes",)
_HOST_FOLDERS = ("scheduler", "tokenizer*")


@dataclass(frozen=True)
class Source:
    """A Diffusers folder and what it was asked for as."""

    id: str
    revision: str | None
    folder: Path
    family: Family
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    """Modules that come from another folder: a ControlNet given beside the pipeline, what a single file was converted
    to, one that LoRAs were merged into."""
    variant: str | None = None
    origins: Mapping[str, Any] = field(default_factory=dict)
    """What else it was made from, for the manifest: the single file and its config, the ControlNet."""

    @classmethod
    def open(
        cls,
        model: str,
        revision: str | None = None,
        variant: str | None = None,
        module: str = "",
        config: str | None = None,
    ) -> Source:
        """Find a model and its family.

        Args:
            model: `shapes`, a Diffusers folder, a hub id (owner/name or owner/name@revision), or a single-file
                checkpoint in safetensors.
            revision: of a hub model.
            variant: of the family, such as `controlnet`.
            module: the folder or hub id of the module that the variant is named after.
            config: of a single file: a Diffusers folder or a hub id with its tokenizers, scheduler and configs.

        Raises:
            SourceError: it isn't there, or isn't a pipeline that bakeoff knows.
            PickleError: it is a pickle.
        """
        if model not in EMBEDDED and Path(model).expanduser().is_file():
            source = _of_file(model, revision, config)
        elif config:
            message = f"got the config {config} for {model}, which is no single file and has its own"
            raise UsageError(message, fix="leave out --config")
        else:
            source = _of_folder(_locate(model, revision))
        return _with_variant(source, variant, module) if variant else source

    @property
    def parts(self) -> tuple[Part, ...]:
        """The family's parts that this pipeline has: some leave a text encoder out."""
        return parts_of(self.family, self.index)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return `model_index.json`, with the variant's module in it."""
        index = read_json(self.folder / "model_index.json")
        if self.variant is None:
            return index
        own = self.config(self.variant).get("_class_name")
        return {**index, "_class_name": self.family.pipelines["text-to-image"], self.variant: ["diffusers", own]}

    @property
    def modules(self) -> tuple[str, ...]:
        """The folders that the parts come from."""
        return tuple(dict.fromkeys(part.module for part in self.parts))

    def path(self, module: str) -> Path:
        """Return the folder with a module's config and weights."""
        return self.elsewhere.get(module, self.folder / module)

    def config(self, module: str) -> dict[str, Any]:
        return read_json(self.path(module) / "config.json")

    def checkpoint(self, module: str) -> Checkpoint:
        return Checkpoint.open(self.path(module))

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a module's weights, by name."""
        return {name: entry.shape for name, entry in self.checkpoint(module).entries.items()}

    @property
    def host_files(self) -> list[Path]:
        """Scheduler, tokenizers and index: what the pipeline needs besides its parts."""
        folders = [folder for pattern in _HOST_FOLDERS for folder in sorted(self.folder.glob(pattern))]
        inner = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
        return [self.folder / "model_index.json", *inner]

    def hashes(self, module: str) -> dict[str, str]:
        """Return the sha256 of a module's config and weight files, by name."""
        files = [self.path(module) / "config.json", *self.checkpoint(module).files]
        return {file.name: remembered_sha256(file) for file in files}


def _of_folder(found: hub.Located) -> Source:
    """Open a Diffusers folder, the user's or the hub's snapshot."""
    source = Source(found.model, found.revision, found.folder, family_of(found.folder))
    lacking = [module for module in source.modules if hub.lacks(found.folder / module)]
    if found.partial and lacking:
        message = f"the cache has {found.model} without the weights of {', '.join(lacking)}; the hub can't be asked"
        command = f"hf download {found.model} --revision {found.revision}"
        raise SourceError(message, fix=f"fetch it where there is a network: {command}")
    return replace(source, elsewhere={module: plainly_named(found.folder / module) for module in source.modules})


def _of_file(model: str, revision: str | None, config: str | None) -> Source:
    """Open a single file: its modules are converted, what it lacks comes from the config's folder."""
    file = Path(model).expanduser()
    single_file.check(file)
    if revision:
        message = f"got the revision {revision!r} for the file {model}, which isn't on the hub"
        raise UsageError(message, fix="leave out --revision; that of its config is said with it: --config owner/name@…")
    located = _locate_config(model, config)
    source = Source(model, None, located.folder, family_of(located.folder))
    converted = single_file.convert(file, located.folder, source.index, source.modules)
    others = {module: located.folder / module for module in source.modules if module not in converted}
    if located.revision and any(hub.lacks(folder) for folder in others.values()):
        hub.fetch_weights(located, others)
    lacking = [module for module, folder in others.items() if hub.lacks(folder)]
    if lacking:
        message = (
            f"{model} holds {', '.join(converted)} alone, and its config {located.model} has no safetensors for "
            f"{', '.join(lacking)} (in {located.folder})"
        )
        raise SourceError(message, fix="give a whole pipeline's folder or hub id as --config")
    about = {"name": file.name, "sha256": remembered_sha256(file), "modules": sorted(converted)}
    return replace(
        source,
        elsewhere={**{module: plainly_named(folder) for module, folder in others.items()}, **converted},
        origins={"file": about, "config": {"id": located.model, "revision": located.revision}},
    )


def _locate_config(model: str, config: str | None) -> hub.Located:
    """Find the folder with a single file's configs: the one that is given, or the likely one if the cache has it."""
    if config and Path(config).expanduser().is_dir():
        return hub.Located(config, Path(config).expanduser())
    if config and not hub.is_id(config):
        message = f"no folder {config} for the config"
        raise SourceError(message, fix="give a Diffusers folder, or a hub id: owner/name")
    if config:
        return hub.fetch_configs(config)
    likely = single_file.likely_config(Path(model).expanduser())
    try:
        return hub.fetch_configs(likely, cached=True)
    except SourceError as error:
        message = f"{model} has no tokenizers, scheduler and configs of its own; by its keys those of {likely} fit it"
        raise SourceError(message, fix=f"add --config {likely} to fetch them, or --config FOLDER") from error


def _with_variant(source: Source, variant: str, module: str) -> Source:
    """Add the module that a variant of the family is named after."""
    family = source.family
    if variant not in family.variants:
        message = f"{family.name} takes no {variant}"
        having = [each.name for each in plugins.families() if variant in each.variants]
        raise UsageError(message, fix=f"families with one: {', '.join(having)}")
    found = _locate_module(variant, module)
    return replace(
        source,
        family=family.variant(variant),
        elsewhere={**source.elsewhere, variant: plainly_named(found.folder)},
        variant=variant,
        origins={**source.origins, variant: {"id": found.model, "revision": found.revision}},
    )


def _locate_module(name: str, module: str) -> hub.Located:
    """Find a module of its own: a folder with `config.json` and weights, or a hub id."""
    path = Path(module).expanduser()
    if path.is_dir():
        found = hub.Located(module, path)
    elif hub.is_id(module):
        found = hub.fetch(module)
    else:
        message = f"no folder {module} for the {name}"
        raise SourceError(message, fix=f"give a Diffusers {name} folder, or a hub id: owner/name")
    if not (found.folder / "config.json").is_file():
        message = f"{found.folder} is no {name}: it has no config.json"
        raise SourceError(message, fix="give the folder that holds config.json and the safetensors")
    return found


def parts_of(family: Family, index: dict[str, Any]) -> tuple[Part, ...]:
    """Return the parts whose modules an index has: `[null, null]` says that one is left out."""
    return tuple(part for part in family.parts if index.get(part.module, ["", ""]) != [None, None])


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: there is no such file, or no JSON object in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file} can't be read as JSON: {error}"
        raise SourceError(message) from error
    if not isinstance(content, dict):
        message = f"{file} holds {type(content).__name__}, expected an object"
        raise SourceError(message)
    return content


def _locate(model: str, revision: str | None) -> hub.Located:
    path = Path(model).expanduser()
    if revision and (model in EMBEDDED or path.exists()):
        message = f"got the revision {revision!r} for {model}, which isn't on the hub"
        raise UsageError(message, fix="leave out --revision")
    if model in EMBEDDED:
        return hub.Located(model, Path(__file__).parent.parent / "models" / model)
    if path.is_dir():
        return hub.Located(model, path)
    if path.suffix == ".safetensors":
        message = f"no file {model}"
        raise SourceError(message, fix=f"ls {path.parent}")
    if "/" not in model:
        raise SourceError(unknown("model", model, EMBEDDED), fix="or give a Diffusers folder, or a hub id: owner/name")
    if not hub.is_id(model):
        message = f"no folder {model}; expected a Diffusers folder, a hub id (owner/name) or {EMBEDDED[0]!r}"
        raise SourceError(message, fix=f"bakeoff export {EMBEDDED[0]} -o DIR --recipe onnx:fp32")
    return hub.fetch(model, revision)


def family_of(folder: Path) -> Family:
    """Recognise a pipeline folder by the class in its `model_index.json`.

    Raises:
        SourceError: there is none, or no family knows it.
    """
    if not (folder / "model_index.json").is_file():
        message = f"{folder} is not a Diffusers pipeline: it has no model_index.json"
        raise SourceError(message, fix="give the folder that holds model_index.json, unet/, vae/…")
    name = str(read_json(folder / "model_index.json").get("_class_name"))
    plain = name.removeprefix("ORT").removeprefix("OV")
    for family in plugins.families():
        if plain in family.pipelines.values():
            return family
    known = sorted(name for family in plugins.families() for name in family.pipelines.values())
    message = f"{folder} is a {name}; known pipelines: {', '.join(known)}"
    raise SourceError(message, fix="add its family: one file in components/families, see the README")
