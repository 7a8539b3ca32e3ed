"""Modules whose weights are there as one variant alone, such as `model.fp16.safetensors`."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from typing import TYPE_CHECKING

from ..home import home

if TYPE_CHECKING:
    from pathlib import Path

_PLAIN = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_VARIANT = re.compile(r"(?P<stem>diffusion_pytorch_model|model)\.(?P<variant>\w+)(?:-\d{5}-of-\d{5})?\.safetensors")


def plainly_named(folder: Path) -> Path:
    """Return a module's folder, or one of links with plain names if its weights have a variant's name.

    Diffusers wants to be told a variant; people expect that the only one is taken.
    """
    if any((folder / name).exists() or (folder / f"{name}.index.json").exists() for name in _PLAIN):
        return folder
    found = [match for file in sorted(folder.glob("*.safetensors")) if (match := _VARIANT.fullmatch(file.name))]
    if len({match["variant"] for match in found}) != 1:
        return folder
    stem, variant = found[0]["stem"], found[0]["variant"]
    names = {match[0]: match[0] for match in found}
    if f"{stem}.{variant}.safetensors" in names:
        names = {f"{stem}.{variant}.safetensors": f"{stem}.safetensors"}
    names |= {
        f"{stem}.safetensors.index.{variant}.json": f"{stem}.safetensors.index.json",
        "config.json": "config.json",
    }
    return _links(folder, names)


def _links(folder: Path, names: dict[str, str]) -> Path:
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:20]
    target = home() / "variants" / where / folder.name
    target.mkdir(parents=True, exist_ok=True)
    for name, plain in names.items():
        if (folder / name).exists() and not (target / plain).exists():
            (target / plain).unlink(missing_ok=True)
            with suppress(FileExistsError):
                (target / plain).symlink_to(folder.resolve() / name)
    return target
