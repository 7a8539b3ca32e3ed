"""Options of placement that would do nothing where they are asked for: refused, never ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import plugins
from ..errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..components.family import Part
    from ..recipe import Placement
    from .opening import Baked


def refuse_idle_options(baked: Baked, placement: Placement) -> None:
    """Refuse an option that no part's runtime has, or that none can have on its device.

    Raises:
        UsageError: with why, and what to do.
    """
    parts = [part for part in baked.family.parts if part.name in baked.parts]
    for name, _ in placement.devices:
        if name not in baked.parts:
            raise UsageError(unknown("part that a device is given to", name, baked.parts))
    for option in _asked(placement):
        _refuse(baked, placement, parts, option)
    if placement.vae_tiling == "on" and not any(part.name == "vae_decoder" for part in parts):
        message = f"vae_tiling does nothing here: {baked.folder} has no vae_decoder"
        raise UsageError(message, fix="leave out vae_tiling")


def _asked(placement: Placement) -> list[str]:
    asked: dict[str, Any] = {
        "compile": placement.compile,
        "cuda_graphs": placement.cuda_graphs,
        "attention": placement.attention,
        "channels_last": placement.channels_last != "auto",
        "static": placement.static,
        "provider": placement.provider,
        "provider_options": placement.provider_options,
        "attention_slicing": placement.attention_slicing,
        "token_merging": placement.token_merging,
        "mapped": placement.offload == "mapped",
        "blocks": placement.offload == "blocks",
    }
    return [name for name, value in asked.items() if value]


def _refuse(baked: Baked, placement: Placement, parts: Sequence[Part], option: str) -> None:
    name = f"offload={option}" if option in {"mapped", "blocks"} else option
    reasons: list[tuple[str, str]] = []
    for part in parts:
        runtime = plugins.runtime(baked.parts[part.name].backend)
        if not runtime.serves(option, baked.config(part.module)):
            continue
        reason = runtime.option_obstacle(option, placement.of(part.name)) if runtime.probe().ok else None
        if reason is None:
            return
        reasons.append(reason)
    if reasons:
        message = f"{name} can't be had here: {reasons[0][0]}"
        raise UsageError(message, fix=reasons[0][1])
    kinds = ", ".join(sorted({entry.backend for entry in baked.parts.values()}))
    message = f"{name} does nothing here: {baked.folder} has parts of {kinds} alone"
    if option == "token_merging":
        message = f"{name} does nothing here: it is for UNets with cross-attention in the torch runtime"
    raise UsageError(message, fix=f"leave out {name}")
