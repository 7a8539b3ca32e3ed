"""Keeps an engine within the memory that is there: closes parts that are done, and has the VAE work in smaller pieces."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from .. import footprint
from ..errors import UsageError
from .offload import VAE_STAGE, Decision, Decoding, DeviceDecision, decide, decide_on_device, make_room

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..recipe import Placement
    from .request import Request
    from .station import Station

_STARTS = "vae_encoder"
"""Opened only where there is a picture to start from."""


class Keeper:
    """Decides before each batch, by predictions and by what can be used then; `notes` says what was done in the last one."""

    def __init__(
        self, stations: Mapping[str, Station], configs: Mapping[str, Mapping[str, Any]], placement: Placement
    ) -> None:
        self._stations, self._configs, self._placement = stations, configs, placement
        merging = placement.token_merging
        self._lossy = [f"token_merging={merging} computes on fewer tokens: lossy"] if merging else []
        self.notes: list[str] = []
        self._decision = self._decide(None)
        for station in stations.values():
            station.before = self._make_room

    @contextlib.contextmanager
    def batch(self, pipeline: Any, request: Request) -> Iterator[None]:  # noqa: ANN401 - some Diffusers pipeline
        """Decide what to do about memory for one batch; the VAE's own switches are as they were afterwards."""
        vae: Any = getattr(pipeline, "vae", None)
        if not hasattr(vae, "tile_sample_min_size"):
            self._refuse_pieces(vae)
            self._decide(request)
            yield
            return
        tile: int = vae.tile_sample_min_size
        decision = self._decide(request, tile)
        before = vae.use_slicing, vae.use_tiling
        vae.use_slicing, vae.use_tiling = before[0] or decision.slicing, before[1] or decision.tiling
        tiled = vae.use_tiling and max(request.height, request.width) > tile
        sliced = vae.use_slicing and len(request.prompts) > 1
        if tiled:
            self.notes.append(f"the VAE works in tiles of {tile} pixels: lossy, seams may show")
        if sliced:
            self.notes.append("the VAE works on one picture at a time")
        for station in self._stations.values():
            if station.need.stage == VAE_STAGE:
                station.pieces = {"slicing": sliced, "tiling": tile if tiled else None}
        try:
            yield
        finally:
            vae.use_slicing, vae.use_tiling = before

    def _refuse_pieces(self, vae: object) -> None:
        """Refuse to cut the work of a VAE that is only run whole."""
        for option in ("vae_tiling", "vae_slicing"):
            if getattr(self._placement, option) == "on":
                message = f"{option} does nothing here: {type(vae).__name__} is run whole"
                raise UsageError(message, fix=f"leave out {option}")

    def _decide(self, request: Request | None, tile: int | None = None) -> Decision:
        """Decide for a request; `tile` is the VAE's, in pixels along a side."""
        starts = request is not None and request.image is not None
        stations = [s for s in self._stations.values() if starts or s.runtime or s.part.name != _STARTS]
        needs = [station.need for station in stations]
        decoding = None if request is None or tile is None else self._decoding(request, tile)
        self._decision = decide(self._placement, needs, decoding, footprint.usable_bytes())
        self.notes = [*self._decision.notes, *self._lossy]
        for name, station in self._stations.items():
            station.mapped = name in self._decision.mapped
        self._on_devices = self._decide_on_devices(stations)
        return self._decision

    def _decide_on_devices(self, stations: Sequence[Station]) -> dict[str, DeviceDecision]:
        """Decide for the memory of each device that isn't the host's."""
        found = {}
        for device in sorted({station.device for station in stations} - {"cpu"}):
            usable = footprint.device_usable_bytes(device)
            there = [station for station in stations if station.device == device]
            needs = [station.device_need for station in there]
            found[device] = decide_on_device(self._placement.offload, device, needs, usable)
            self.notes += found[device].notes
            for station in there:
                station.blocks = station.part.name in found[device].blocks
        return found

    def _decoding(self, request: Request, tile: int) -> Decoding | None:
        """Predict what the VAE's activations take."""
        station = self._stations.get("vae_decoder")
        if station is None:
            return None
        config = self._configs[station.part.module]
        row = station.decoding_bytes(config, request.height, request.width)
        tiled = station.decoding_bytes(config, min(tile, request.height), min(tile, request.width))
        return None if row is None or tiled is None else Decoding(len(request.prompts), row, tiled)

    def _make_room(self, station: Station) -> None:
        """Before a part is opened, close those that are done, where parts take turns."""

        def close(name: str) -> None:
            self._stations[name].unload()
            self.notes.append(f"{name} was unloaded before {station.part.name} was opened")

        device = station.device
        if self._decision.unload:
            needs = [each.need for each in self._stations.values()]
            make_room(station.need, needs, close, footprint.usable_bytes)
        elif device in self._on_devices and self._on_devices[device].unload:
            needs = [each.device_need for each in self._stations.values() if each.device == device]
            make_room(station.device_need, needs, close, lambda: footprint.device_usable_bytes(device) or 0)
