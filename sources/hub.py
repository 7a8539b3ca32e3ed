"""The hub: snapshots of models in its cache, and its errors in our words."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CONFIGS = ("model_index.json", "config.json", "*/*.json", "*/*.txt", "*/*.jinja", "*/*.model")
_UNWANTED = ("safety_checker/*", "*.non_ema.*", "*.onnx*")
VARIANT = "fp16"
"""The variant that is taken where a module has no other safetensors."""


@dataclass(frozen=True)
class Located:
    """Where a model lies."""

    model: str
    folder: Path
    revision: str | None = None
    """The commit, if it is a snapshot of the hub's."""
    partial: bool = False
    """The hub couldn't be asked, and files that it has are not in the cache."""


def is_id(model: str) -> bool:
    """Say whether a text can be a hub id: owner/name, or owner/name@revision."""
    return model.partition("@")[0].count("/") == 1 and not model.startswith((".", "/", "~"))


def fetch(model: str, revision: str | None = None) -> Located:
    """Bring a model's configs and safetensors into the cache: no code, no pickles.

    Args:
        model: owner/name, or owner/name@revision.
        revision: branch, tag or commit.

    Raises:
        SourceError: the hub doesn't give it, and the cache doesn't have it.
    """
    found = fetch_configs(model, revision)
    return fetch_weights(found, ["", *sorted(each.name for each in found.folder.iterdir() if each.is_dir())])


def fetch_configs(model: str, revision: str | None = None, *, cached: bool = False) -> Located:
    """Bring a model's configs alone into the cache; with `cached` only look whether they are there.

    Raises:
        SourceError: the hub doesn't give them, and the cache doesn't have them.
    """
    return snapshot(model, revision, _CONFIGS, _UNWANTED, cached=cached)


def fetch_weights(found: Located, modules: Iterable[str]) -> Located:
    """Bring the weights of modules into a snapshot that has their configs, as a variant where the hub has no other.

    Raises:
        SourceError: the hub doesn't give them.
    """
    modules = [module for module in modules if (found.folder / module / "config.json").is_file()]
    found = _fetch_files(found, modules, "", (*_UNWANTED, f"*.{VARIANT}*.safetensors"))
    return _fetch_files(found, [module for module in modules if lacks(found.folder / module)], f".{VARIANT}", _UNWANTED)


def _fetch_files(found: Located, modules: Iterable[str], variant: str, unwanted: Sequence[str]) -> Located:
    names = [f"{module}/*" if module else "diffusion_pytorch_model*" for module in modules]
    wanted = [f"{name}{variant}*.safetensors" for name in names]
    return snapshot(found.model, found.revision, (*_CONFIGS, *wanted), unwanted) if wanted else found


def lacks(folder: Path) -> bool:
    """Say whether a folder is a module's, but without safetensors."""
    return (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))


def snapshot(
    model: str,
    revision: str | None,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
    *,
    cached: bool = False,
) -> Located:
    """Bring the files that fit into the cache; if the hub can't be asked, take what is there.

    Raises:
        UsageError: two revisions were given.
        SourceError: the hub doesn't give it, and the cache doesn't have it.
    """
    name, _, pinned = model.partition("@")
    if pinned and revision and pinned != revision:
        message = f"got the revisions {pinned!r} and {revision!r} of {name}"
        raise UsageError(message, fix=f"give one: {name}@{revision}")
    revision = revision or pinned or None
    try:
        return _download(name, revision, wanted, unwanted, cached=cached)
    except Exception as error:
        raise _in_our_words(name, revision, error) from error


def _download(
    model: str, revision: str | None, wanted: Sequence[str], unwanted: Sequence[str], *, cached: bool
) -> Located:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
            local_files_only=cached,
        )
    except IncompleteSnapshotError as error:
        return _snapshot(model, error.snapshot_path, partial=True)
    except LocalEntryNotFoundError:
        if not cached:  # of a commit that it knows, it insists on every file
            with suppress(LocalEntryNotFoundError):
                return _download(model, revision, wanted, unwanted, cached=True)
        raise
    return _snapshot(model, folder)


def _snapshot(model: str, folder: str, *, partial: bool = False) -> Located:
    return Located(model, Path(folder), Path(folder).name, partial)  # the cache names a snapshot after its commit


def _in_our_words(model: str, revision: str | None, error: Exception) -> SourceError:
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{model}"
    if isinstance(error, errors.GatedRepoError):
        message = f"the hub model {model} is gated: it is given to those who have accepted its terms"
        return SourceError(message, fix=f"accept them at {page}, then: hf auth login")
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"the hub model {model} has no revision {revision or 'main'!r}"
        return SourceError(message, fix=f"see which ones it has: {page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        message = f"the hub has no model {model}, or a private one that it doesn't show you"
        return SourceError(message, fix=f"look at {page} for the name; if the model is private: hf auth login")
    refused = isinstance(error.__cause__, errors.HfHubHTTPError)
    if isinstance(error, errors.LocalEntryNotFoundError) and not refused:
        which = f"the hub model {model}" + (f" at {revision}" if revision else "")
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub can't be reached"
        command = f"hf download {model}" + (f" --revision {revision}" if revision else "")
        message = f"{which} is not in the cache ({constants.HF_HUB_CACHE}), and {why}"
        return SourceError(message, fix=f"fetch it where there is a network: {command}")
    message = f"the hub model {model} couldn't be had: {error.__cause__ if refused else error}"
    return SourceError(message, fix=f"look at {page}")
