"""The work that every arm gets: the same prompts, and the same latents from a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..artifact import Manifest

DEFAULT = "shapes-256"


def seed_of(prompt_id: str) -> int:
    """Return the seed of a prompt: from its id, so that it is the same in every experiment."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:7], "big")


def prompts(name: str, count: int) -> list[tuple[str, str]]:
    """Return the first (id, text) of a prompt set, or of the lines of a text file.

    Raises:
        UsageError: there is no such set or file, or it has too few prompts.
    """
    from ..models.prompts import read_prompts

    found = read_prompts(DEFAULT if name == "default" else name, count)
    return [(prompt.id, prompt.text) for prompt in found]


def write_latents(
    model: str, ids: list[str], height: int | None, width: int | None, file: str, config: str | None = None
) -> dict[str, Any]:
    """Draw each prompt's latents, unit normal float32, from a CPU generator of its own; runs in a child process."""
    import numpy as np

    from ..runtimes.request import row_generator
    from ..sources.source import Source

    source = Source.open(model, config=config)
    configs = {part.module: source.config(part.module) for part in source.parts}
    size = source.family.default_size(configs) if height is None or width is None else (height, width)
    shape = source.family.latent_shape(configs, len(ids), *size)
    latents = np.stack([row_generator(seed_of(each), shape[1:])[1].numpy() for each in ids])
    partial = Path(file).with_suffix(".partial.npy")
    np.save(partial, latents)
    partial.replace(file)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return {"latents_sha256": digest, "shape": list(latents.shape), "family": source.family.name, "size": list(size)}


_HOME = "$BAKEOFF_HOME"


def portable(folder: Path) -> str:
    """Return a folder's name for a record, which others read: what lies in our home is said relative to it."""
    from ..home import home

    return f"{_HOME}/{folder.relative_to(home())}" if folder.is_relative_to(home()) else str(folder)


def local(name: str) -> Path:
    """Return the folder that a record names."""
    from ..home import home

    return home() / name.removeprefix(f"{_HOME}/") if name.startswith(f"{_HOME}/") else Path(name).resolve()


def found(folder: str) -> dict[str, Any]:
    """Say what a folder or a hub id holds that is run as it is; runs in a child process."""
    from ..artifact import MANIFEST, Artifact
    from ..sources.source import Source

    path = Path(folder) if Path(folder).is_dir() else Source.open(folder).folder
    if (path / MANIFEST).is_file():
        return {"folder": str(path), "placement": {}, **_told(Artifact.open(path).manifest)}
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"folder": str(path), "placement": {}, "bytes": size}


def bake(
    model: str, recipe: str, config: str | None = None, calibration: str | None = None, *, prove: bool = True
) -> dict[str, Any]:
    """Export a recipe into the home folder, by key, unless it is there; runs in a child process."""
    import time

    from ..bake import export
    from ..home import home
    from ..plan import plan
    from ..recipe import read

    wanted, placement = read(recipe)
    target = home() / "artifacts" / plan(model, wanted, config=config, calibration=calibration).key[:20]
    present = target.is_dir()
    started = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    manifest = export(model, target, wanted, config=config, calibration=calibration, prove=prove).manifest
    export_s = None if present else time.perf_counter() - started
    return {"folder": portable(target), "placement": placement.as_dict(), "export_s": export_s, **_told(manifest)}


def _told(manifest: Manifest) -> dict[str, Any]:
    return {
        "key": manifest.key,
        "bytes": sum(file.size for file in manifest.files.values()),
        "proof": {
            name: min(case["sqnr_db"] for case in part["cases"])
            for name, part in manifest.proof.get("parts", {}).items()
        },
    }
