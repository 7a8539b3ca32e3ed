"""Which layer of a checkpoint the path of a module means: the two rarely agree in all words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from .weights import Checkpoint


def meant(path: str, names: Collection[str]) -> str | None:
    """Return the name that a path means, which may have more or less before it; None if none does.

    Of names that have more before, the shortest: `proj_out` is `model.proj_out`, not `model.blocks.0.proj_out`. Of those that
    have less, the longest: `module.blocks.0.proj_out` is `blocks.0.proj_out`, not `proj_out`.
    """
    if path in names:
        return path
    longer = [name for name in names if name.endswith(f".{path}")]
    if longer:
        return min(longer, key=lambda name: (len(name), name))
    shorter = [name for name in names if path.endswith(f".{name}")]
    return max(shorter, key=len) if shorter else None


def layer_names(paths: Iterable[str], checkpoint: Checkpoint) -> dict[str, str]:
    """Return path in a module -> the layer's name in the checkpoint.

    That may have more or less before it, or lack a word in between: Transformers opens `model.layers.0` as
    `model.language_model.layers.0`.
    """
    known = {name.removesuffix(".weight") for name in checkpoint.entries if name.endswith(".weight")}
    found: dict[str, str] = {}
    others: list[str] = []
    for path in paths:
        own = meant(path, known)
        if own:
            found[path] = own
        else:
            others.append(path)
    return found | _names_between(others, known.difference(found.values()))


def _names_between(paths: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Match paths to names that have some of their words, in the same order, where that leaves no choice on either side."""
    pairs = [(path, name) for path in paths for name in names if _has_words(path, name)]
    by_path, by_name = Counter(path for path, _ in pairs), Counter(name for _, name in pairs)
    return {path: name for path, name in pairs if by_path[path] == by_name[name] == 1}


def _has_words(path: str, name: str) -> bool:
    """Say whether a path ends as a name does, and has its other words in their order."""
    words, wanted = path.split("."), name.split(".")
    rest = iter(words)
    return words[-1] == wanted[-1] and all(word in rest for word in wanted)
