"""What stand-ins share: full configs, the tensors' type, and refusing what an exported part doesn't have."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping


def full_config(model_class: type, config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - Diffusers' FrozenDict is untyped
    """Return the FrozenDict that the real module would have: the file's values over the class's defaults."""
    from diffusers.configuration_utils import FrozenDict

    parameters = inspect.signature(model_class.__init__).parameters.values()  # type: ignore[misc]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return FrozenDict({**defaults, **config})


def refuse(part: str, arguments: Mapping[str, Any]) -> None:
    """Raise InputError for each argument with a value: the exported graph has no input for it."""
    given = sorted(name for name, value in arguments.items() if value is not None and value is not False)
    if given:
        message = f"the exported {part} takes no {', '.join(given)}: its graph has no such input"
        raise InputError(message, fix="leave it out, or use the original Diffusers pipeline for it")
