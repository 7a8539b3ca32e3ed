"""Which parts stay open together, and how the VAE decodes: decided by the memory that is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..components.family import Part
    from ..recipe import Placement

DENOISING_STAGE = "denoising"
VAE_STAGE = "vae"


@dataclass(frozen=True)
class Need:
    """What a part is predicted to hold once it is open, in bytes of anonymous memory."""

    name: str
    stage: str
    """Parts of one stage take turns; those of other stages are done while it lasts."""
    held_bytes: int
    mapped_bytes: int | None = None
    """With its weights left in their files; None: its runtime can't."""
    is_open: bool = False


@dataclass(frozen=True)
class Decoding:
    """What the VAE's pictures need: how many, and the predicted activations of one, whole or tiled, in bytes."""

    rows: int
    row_bytes: int
    tile_bytes: int


@dataclass(frozen=True)
class Decision:
    """What to do about memory for one batch, and why."""

    unload: bool = False
    mapped: frozenset[str] = frozenset()
    """Parts that open with their weights left in the files."""
    slicing: bool = False
    tiling: bool = False
    notes: tuple[str, ...] = ()


def stage_of(part: Part) -> str:
    """Return when a part runs: text encoders first, a ControlNet in turn with the UNet, the VAE before and after."""
    if part.module.startswith("text_encoder"):
        return "text"
    return VAE_STAGE if part.module == "vae" else DENOISING_STAGE


def decide(placement: Placement, needs: Sequence[Need], decoding: Decoding | None, usable_bytes: int) -> Decision:
    """Choose what keeps a batch within the memory that may be used now, and no more of it than needed.

    First pictures are decoded one at a time (exact), then parts are unloaded (exact), then weights stay mapped in parts
    that wouldn't fit alone (exact, slower), then a picture is decoded in tiles (lossy).
    """
    coming = sum(need.held_bytes for need in needs if not need.is_open)
    at_once = coming + (decoding.row_bytes if decoding else 0)
    notes = []
    if placement.offload == "auto":
        unload = at_once > usable_bytes
        if unload:
            notes.append(
                f"parts take turns in memory: all of them are predicted to take {gigabytes(at_once)} more, "
                f"{gigabytes(usable_bytes)} can be used"
            )
    else:
        unload = placement.offload not in {"none", "blocks"}
    room = usable_bytes + sum(need.held_bytes for need in needs if need.is_open)
    mapped = _mapped(placement, needs, room if unload else None)
    if placement.offload == "auto":
        notes += [_mapped_note(need, room, mapped) for need in needs if unload and need.held_bytes > room]
    left = room - sum(_held(need, mapped) for need in needs if need.stage == VAE_STAGE or not unload)
    slicing, tiling = _decoding(placement, decoding, left)
    return Decision(unload, mapped, slicing, tiling, tuple(notes))


@dataclass(frozen=True)
class DeviceDecision:
    """What to do about the memory of a device that isn't the host's."""

    unload: bool = False
    blocks: frozenset[str] = frozenset()
    """Parts whose weights come from the host a block at a time."""
    notes: tuple[str, ...] = ()


def decide_on_device(offload: str, device: str, needs: Sequence[Need], usable_bytes: int | None) -> DeviceDecision:
    """Choose what keeps weights within a device's memory: parts that take turns, then blocks of one that wouldn't fit alone.

    `usable_bytes` is None where nothing tells; then parts do what is asked for, and with `auto` stay open.
    """
    can = frozenset(need.name for need in needs if need.mapped_bytes is not None)
    if offload == "blocks":
        return DeviceDecision(blocks=can)
    if offload != "auto" or usable_bytes is None:
        return DeviceDecision(unload=offload in {"parts", "mapped"})
    coming = sum(need.held_bytes for need in needs if not need.is_open)
    if coming <= usable_bytes:
        return DeviceDecision()
    room = usable_bytes + sum(need.held_bytes for need in needs if need.is_open)
    notes = [
        f"parts take turns on {device}: their weights take {gigabytes(coming)} more, {gigabytes(usable_bytes)} can be used"
    ]
    for need in needs:
        if need.held_bytes > room:
            done = "come from the host a block at a time" if need.name in can else "may not fit"
            notes.append(
                f"{need.name} takes {gigabytes(need.held_bytes)} of {device}'s {gigabytes(room)}: its weights {done}"
            )
    return DeviceDecision(
        unload=True,
        blocks=frozenset(n.name for n in needs if n.held_bytes > room and n.name in can),
        notes=tuple(notes),
    )


def _mapped(placement: Placement, needs: Sequence[Need], room: int | None) -> frozenset[str]:
    """Choose the parts that open mapped: all that can where that is asked for, those that don't fit alone with `auto`."""
    can = [need for need in needs if need.mapped_bytes is not None]
    if placement.offload == "mapped":
        return frozenset(need.name for need in can)
    if placement.offload != "auto" or room is None:
        return frozenset()
    return frozenset(need.name for need in can if need.held_bytes > room)


def _mapped_note(need: Need, room: int, mapped: frozenset[str]) -> str:
    said = f"{need.name} is predicted to take {gigabytes(need.held_bytes)}, more than the {gigabytes(room)} there are"
    if need.name in mapped:
        return f"{said}: its weights stay in their files, and are read as they are needed"
    return f"{said}, and its runtime can't leave weights in their files: it may run out of memory"


def _held(need: Need, mapped: frozenset[str]) -> int:
    return need.mapped_bytes if need.name in mapped and need.mapped_bytes is not None else need.held_bytes


def _decoding(placement: Placement, decoding: Decoding | None, left: int) -> tuple[bool, bool]:
    """Return whether pictures are decoded one at a time, and in tiles."""
    slicing, tiling = placement.vae_slicing == "on", placement.vae_tiling == "on"
    if decoding is None:
        return slicing, tiling
    if placement.vae_slicing == "auto":
        slicing = decoding.rows > 1 and decoding.rows * decoding.row_bytes > left
    if placement.vae_tiling == "auto":
        tiling = decoding.tile_bytes < decoding.row_bytes and decoding.row_bytes > left
    return slicing, tiling


def make_room(
    opening: Need, needs: Sequence[Need], close: Callable[[str], None], usable_bytes: Callable[[], int]
) -> None:
    """Close what is done before a part is opened: parts of other stages, then, if it still doesn't fit, of its own."""
    others = [need for need in needs if need.is_open and need.name != opening.name]
    for need in others:
        if need.stage != opening.stage:
            close(need.name)
    for need in others:
        if need.stage == opening.stage and opening.held_bytes > usable_bytes():
            close(need.name)


def gigabytes(count: int) -> str:
    return f"{max(count, 0) / 1e9:.2f} GB"
