"""Where a model comes from: `shapes`, a Diffusers folder, or a hub id."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins
from .errors import PickleError, SourceError, UsageError, unknown
from .weights import Checkpoint, sha256

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .components.family import Family, Part

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
    """Modules that come from another folder: a ControlNet given beside the pipeline, one that LoRAs were merged into."""
    variant: str | None = None

    @classmethod
    def open(cls, model: str, revision: str | None = None, variant: str | None = None, module: str = "") -> Source:
        """Find a model and its family.

        Args:
            model: `shapes`, a Diffusers folder, or a hub id.
            revision: of a hub model.
            variant: of the family, such as `controlnet`.
            module: the folder or hub id of the module that the variant is named after.

        Raises:
            SourceError: it isn't there, or isn't a pipeline that bakeoff knows.
            PickleError: it is a pickle.
        """
        folder, found_revision = _locate(model, revision)
        family = family_of(folder)
        if variant is None:
            return cls(model, found_revision, folder, family)
        if variant not in family.variants:
            message = f"{family.name} takes no {variant}"
            having = [each.name for each in plugins.families() if variant in each.variants]
            raise UsageError(message, fix=f"families with one: {', '.join(having)}")
        beside = {variant: _module_folder(variant, module)}
        return cls(model, found_revision, folder, family.variant(variant), beside, variant)

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

    @property
    def host_files(self) -> list[Path]:
        """Scheduler, tokenizers and index: what the pipeline needs besides its parts."""
        folders = [folder for pattern in _HOST_FOLDERS for folder in sorted(self.folder.glob(pattern))]
        inner = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
        return [self.folder / "model_index.json", *inner]

    def hashes(self, module: str) -> dict[str, str]:
        """Return the sha256 of a module's config and weight files, by name."""
        files = [self.path(module) / "config.json", *self.checkpoint(module).files]
        return {file.name: _HashCache.of(file) for file in files}


def _module_folder(name: str, module: str) -> Path:
    """Find a module of its own: a folder with `config.json` and weights, or a hub id."""
    path = Path(module).expanduser()
    if path.is_dir():
        folder = path
    elif module.count("/") == 1 and not module.startswith((".", "/", "~")):
        folder, _ = _from_hub(module, None)
    else:
        message = f"no folder {module} for the {name}"
        raise SourceError(message, fix=f"give a Diffusers {name} folder, or a hub id: owner/name")
    if not (folder / "config.json").is_file():
        message = f"{folder} is no {name}: it has no config.json"
        raise SourceError(message, fix="give the folder that holds config.json and the safetensors")
    return folder


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


def _locate(model: str, revision: str | None) -> tuple[Path, str | None]:
    path = Path(model).expanduser()
    if revision and (model in EMBEDDED or path.exists()):
        message = f"got the revision {revision!r} for {model}, which isn't on the hub"
        raise UsageError(message, fix="leave out --revision")
    if model in EMBEDDED:
        return Path(__file__).parent / "models" / model, None
    if path.is_dir():
        return path, None
    if path.is_file():
        if path.suffix in {".ckpt", ".pt", ".pth", ".bin", ".pkl"}:
            message = f"{model} is a pickle, which can run code when it is opened: bakeoff never opens one"
            raise PickleError(
                message, fix="get the .safetensors version of this checkpoint, or convert it where you trust it"
            )
        message = f"got the file {model}, expected a Diffusers folder, a hub id or {EMBEDDED[0]!r}"
        raise SourceError(
            message,
            fix="convert it to a Diffusers folder, with its pipeline's class: from_single_file(…).save_pretrained(…)",
        )
    if "/" not in model:
        raise SourceError(unknown("model", model, EMBEDDED), fix="or give a Diffusers folder, or a hub id: owner/name")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        message = f"no folder {model}; expected a Diffusers folder, a hub id (owner/name) or {EMBEDDED[0]!r}"
        raise SourceError(message, fix=f"bakeoff export {EMBEDDED[0]} -o DIR --recipe onnx:fp32")
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> tuple[Path, str]:
    """Fetch safetensors and configs, no code and no pickles; the snapshot's folder names its revision."""
    from huggingface_hub import snapshot_download

    patterns = [
        "model_index.json",
        "config.json",
        "diffusion_pytorch_model*.safetensors*",
        "*/*.json",
        "*/*.txt",
        "*/*.jinja",
        "*/*.model",
        "*/*.safetensors",
    ]
    unwanted = ["safety_checker/*", "*.fp16.*", "*.non_ema.*", "*.onnx*"]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=unwanted))
    except Exception as error:
        message = f"the hub model {model} couldn't be had: {error}"
        fix = f"look at https://huggingface.co/{model} (accept its terms if it asks), then: hf auth login"
        raise SourceError(message, fix=fix) from error
    return folder, folder.name


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


def home() -> Path:
    """Return `$BAKEOFF_HOME`, by default `~/.cache/bakeoff`."""
    return Path(os.environ.get("BAKEOFF_HOME") or Path.home() / ".cache" / "bakeoff")


class _HashCache:
    """Hashes of source files, remembered by path, inode, size and time of change."""

    @staticmethod
    def of(file: Path) -> str:
        stat = file.resolve().stat()
        key = f"{file.resolve()}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        store = home() / "hashes.json"
        try:
            known: dict[str, str] = json.loads(store.read_text())
        except (OSError, ValueError):
            known = {}
        if key not in known:
            known[key] = sha256(file)
            with contextlib.suppress(OSError):  # what can't be remembered is hashed again
                store.parent.mkdir(parents=True, exist_ok=True)
                partial = store.with_suffix(f".partial-{os.getpid()}")
                partial.write_text(json.dumps(known, indent=0))
                partial.replace(store)
        return known[key]
