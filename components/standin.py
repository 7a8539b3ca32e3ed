"""What stand-ins share: full configs, the tensors' type, and refusing what an exported part doesn't have."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from .component import Runner


class StandIn:
    """What a Diffusers pipeline reads from any of its modules: they take and give float32, on `device`."""

    dtype = torch.float32
    device = torch.device("cpu")
    """Where the pipeline's tensors lie; it says so."""

    def __init__(self, runner: Runner, config: Any) -> None:  # noqa: ANN401 - Diffusers' and Transformers' own types
        self.config = config
        self._runner = runner

    def modules(self) -> Iterator[torch.nn.Module]:
        """Return no modules: there are none that a hook could have moved."""
        return iter(())

    def _run(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Execute the part; floating-point inputs become float32."""
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        return self._runner.run(floats)


def is_there(place: object, device: torch.device) -> bool:
    """Say whether a place, as `to` takes it, is a device: `cuda` is the first one."""
    try:
        named = torch.device(place)  # type: ignore[call-overload]
    except (TypeError, RuntimeError):
        return False
    return bool(named.type == device.type and (named.index or 0) == (device.index or 0))


def full_config(model_class: type, config: Mapping[str, Any]) -> Any:  # noqa: ANN401 - Diffusers' FrozenDict is untyped
    """Return the FrozenDict that the real module would have: the file's values over the class's defaults."""
    from diffusers.configuration_utils import FrozenDict

    parameters = inspect.signature(model_class.__init__).parameters.values()  # type: ignore[misc]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return FrozenDict({**defaults, **config})


def refuse(part: str, arguments: Mapping[str, Any]) -> None:
    """Raise InputError for each argument with a value: the exported graph has no input for it."""
    given = sorted(
        name for name, value in arguments.items() if value is not None and value is not False and value != {}
    )
    if given:
        message = f"the exported {part} takes no {', '.join(given)}: its graph has no such input"
        raise InputError(message, fix="leave it out, or use the original Diffusers pipeline for it")
