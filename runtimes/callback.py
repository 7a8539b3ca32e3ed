"""What is called after each step, as pipelines of Diffusers' newer and older kind want it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Callback = Callable[[int, float, Tensor], bool | None]
    """Takes step, timestep, and latents in host memory; False stops."""


def step_end(callback: Callback | None) -> Callable[..., dict[str, Any]] | None:
    """Return what pipelines of Diffusers' newer kind call after a step; None for no callback."""
    tell = after_step(callback)
    if tell is None:
        return None

    def told(_: object, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        tell(step, timestep, tensors["latents"])
        return {}

    return told


def after_step(callback: Callback | None) -> Callable[[int, Any, Tensor], None] | None:
    """Return what pipelines of Diffusers' older kind call after a step; None for no callback.

    It raises `Cancelled` where the callback returns False.
    """
    if callback is None:
        return None

    def tell(step: int, timestep: Any, latents: Tensor) -> None:  # noqa: ANN401
        if callback(step, float(timestep), latents.cpu()) is False:
            message = f"the callback stopped after step {step + 1}"
            raise Cancelled(message)

    return tell
