"""Bake Diffusers pipelines into hardware artifacts, then hold a bake-off between them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .errors import BakeoffError

if TYPE_CHECKING:
    from .artifact import Artifact
    from .bake import export
    from .recipe import Recipe, parse
    from .runtimes.engine import Engine, load

__all__ = ["Artifact", "BakeoffError", "Engine", "Recipe", "export", "load", "parse"]

_LATE = {
    "Artifact": ("artifact", "Artifact"),
    "Engine": ("runtimes.engine", "Engine"),
    "Recipe": ("recipe", "Recipe"),
    "export": ("bake", "export"),
    "load": ("runtimes.engine", "load"),
    "parse": ("recipe", "parse"),
}

# Diffusers imports bitsandbytes, which advises to let it download kernels from the hub (code that nobody asked for), and
# torchao, which tells of the kernels for GPUs that it can't load.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "kernels-community",
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao`",
}
for _name, _text in _NOISE.items():
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in str(record.msg))  # type: ignore[misc]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import on first use: `import bakeoff` loads neither torch nor anything else heavy."""
    if name not in _LATE:
        message = f"module 'bakeoff' has no attribute {name!r}"
        raise AttributeError(message)
    import importlib

    module, attribute = _LATE[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)
