"""The model that an artifact was made from: opened and checked to be that, and told to child processes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..sources.lora import Lora, with_loras
from ..sources.source import Source
from .proof import family_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..artifact import Artifact


@contextlib.contextmanager
def source_of(
    artifact: Artifact,
    model: str,
    config: str | None = None,
    controlnet: str | None = None,
    loras: Sequence[str] = (),
) -> Iterator[Source]:
    """Open the model that an artifact was made from: of a hub model the same revision, with its ControlNet and its LoRAs.

    Modules that LoRAs change are written beside the artifact, with these added, for the while.

    Args:
        artifact: of any recipe.
        model: a Diffusers folder, a hub id, a single-file checkpoint, or `shapes`.
        config: of a single-file checkpoint.
        controlnet: where its ControlNet lies; by default where it lay then.
        loras: those that were baked in, as `FILE.safetensors` or `FILE.safetensors:SCALE` each, in their order.

    Raises:
        SourceError: it is another model, or other LoRAs.
    """
    made_from, variant = artifact.manifest.source, artifact.manifest.variant
    revision = made_from["revision"] if model == made_from["id"] else None
    module = made_from.get(variant or "") or {"id": "", "revision": None}
    with_revision = f"{module['id']}@{module['revision']}" if module["revision"] else module["id"]
    source = Source.open(model, revision, variant, controlnet or with_revision, config)
    for name, entry in artifact.manifest.parts.items():
        if source.hashes(family_part(artifact, name).module) != entry.key_fields["source"]:
            message = f"{source.folder} is not what {artifact.folder} was made from: its {name} has other bytes"
            raise SourceError(message, fix=f"give the model it was made from, {made_from['id']}")
    given = [Lora.open(text, source) for text in loras]
    _refuse_other_loras(artifact, given)
    with with_loras(source, given, artifact.folder) as merged:
        yield merged


def _refuse_other_loras(artifact: Artifact, given: Sequence[Lora]) -> None:
    """Refuse LoRAs that aren't those that were baked in.

    Raises:
        SourceError: with these.
    """
    baked: list[dict[str, Any]] = artifact.manifest.source.get("loras", [])
    expected = [(lora["sha256"], lora["scale"]) for lora in baked]
    if expected == [(lora.fields["sha256"], lora.scale) for lora in given]:
        return
    if not baked:
        message = f"{artifact.folder} has no LoRA baked in"
        raise SourceError(message, fix="leave out --lora")
    names = " ".join(f"--lora {lora['file']}:{lora['scale']:g}" for lora in baked)
    got = "no LoRA" if not given else "other LoRAs, or in another order"
    message = f"{artifact.folder} has LoRAs baked in, and got {got}"
    model = artifact.manifest.source["id"]
    raise SourceError(message, fix=f"--source {model} {names}; --parity by itself needs neither")


def folders_of(source: Source) -> dict[str, Any]:
    """Return what a child process is told of a source, which `origin_of` reads."""
    elsewhere = {module: str(path) for module, path in source.elsewhere.items()}
    return {"source": str(source.folder), "elsewhere": elsewhere}


def origin_of(artifact: Artifact, source: str, elsewhere: Mapping[str, str]) -> Source:
    """Open the source that an artifact was made from by its folders, as a child process is told them."""
    opened = Source.open(source)
    found = {module: Path(path) for module, path in elsewhere.items()}
    return replace(
        opened,
        elsewhere=found,
        family=opened.family.variant(artifact.manifest.variant),
        variant=artifact.manifest.variant,
    )
