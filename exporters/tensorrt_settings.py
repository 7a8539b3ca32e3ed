"""What a recipe says to TensorRT's builder, with all defaults written out."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..components.component import PROOF_SIZES
from ..errors import RecipeError, unknown
from ..quantize.calibration import EVEN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..components.component import Port

Triple = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Least, best and largest shape of an input."""
Range = tuple[int, int, int]
DEFAULTS: dict[str, Range] = {
    "batch": (1, 2, 6),
    "height": (8, 64, 128),
    "width": (8, 64, 128),
    "sequence": (1, 77, 512),
    "tokens": (16, 1024, 4096),
}
"""Named dimension -> least, best and largest size; of latents, not pixels. Guidance doubles the batch.

TensorRT takes no convolution of 2**31 elements or more: eight rows of a VAE's 256 channels at 1024² would be.
"""
_GUIDED = 2
"""By how much guidance multiplies rows."""
_PADDED = 512
"""Tokens that the longest texts are padded to by pipelines of T5, whatever a prompt's length."""


def _proof_range(name: str) -> Range:
    """Return the sizes of a dimension in what an artifact is proved with: made-up tensors, and those of real drawings."""
    sizes = [each.as_dict()[name] for each in PROOF_SIZES]
    times = _GUIDED if name == "batch" else 1
    return min(sizes), sizes[0], max(_PADDED if name == "sequence" else 0, times * max(sizes))


_PROOF = {name: _proof_range(name) for name in DEFAULTS}
COMPUTE = ("bf16", "fp16", "fp32")
HARDWARE = ("exact", "same_compute_capability", "ampere_plus")
_LEVELS = tuple(str(level) for level in range(6))
_FLAG = ("",)
_DIMENSION = re.compile(r"(\w+)[:=](\d+)(?::(\d+):(\d+))?")
_MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How an engine is built."""

    OPTIONS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "activations": EVEN,
        "compute": COMPUTE,
        "hardware": HARDWARE,
        "level": _LEVELS,
        "profiles": (),
        "refit": _FLAG,
        "strip": _FLAG,
        "version_compatible": _FLAG,
        "weight_streaming": _FLAG,
        "workspace_mib": (),
    }
    """Option -> its values; none: any text, which `read` checks."""

    compute: str
    """What is computed in where nothing is rounded."""
    profiles: tuple[Mapping[str, Range], ...]
    """Named dimension -> least, best and largest size, once or more."""
    level: int
    """Builder optimization level, 0 to 5."""
    workspace_bytes: int | None
    """Most scratch memory that a layer may ask for; None: all of the device's."""
    refit: bool
    """Weights can be exchanged, which LoRAs need; the weights stay beside the plan for that."""
    strip: bool
    """The plan has no weights: they come from beside it when it is opened."""
    weight_streaming: bool
    """Weights may stay in host memory where the device's is short."""
    hardware: str
    """`exact`: this GPU alone; or what else it may run on."""
    version_compatible: bool
    """Later TensorRT versions may open it."""

    @classmethod
    def read(cls, precision: str, options: Mapping[str, str]) -> Settings:
        """Read a recipe's options.

        Raises:
            RecipeError: one can't be meant.
        """
        plain = precision in COMPUTE
        if plain and options.get("compute", precision) != precision:
            message = f"got compute={options['compute']} in tensorrt:{precision}, which computes in {precision}"
            raise RecipeError(message, fix=f"--recipe tensorrt:{options['compute']}")
        return cls(
            compute=precision if plain else options.get("compute", COMPUTE[0]),
            profiles=_profiles(options.get("profiles", "")),
            level=int(options.get("level", "3")),
            workspace_bytes=_mib(options["workspace_mib"]) if "workspace_mib" in options else None,
            refit="refit" in options,
            strip="strip" in options,
            weight_streaming="weight_streaming" in options,
            hardware=options.get("hardware", HARDWARE[0]),
            version_compatible="version_compatible" in options,
        )

    @property
    def keeps_weights(self) -> bool:
        """Whether the graph's weights stay beside the plan."""
        return self.refit or self.strip

    def as_dict(self) -> dict[str, Any]:
        """Return JSON."""
        profiles = [{name: list(sizes) for name, sizes in sorted(each.items())} for each in self.profiles]
        return {**asdict(self), "profiles": profiles}

    def shapes(self, ports: tuple[Port, ...], limits: Mapping[str, int]) -> list[dict[str, Triple]]:
        """Return, for each profile, input -> its least, best and largest shape; inputs of one fixed shape are left out.

        Where none of the recipe's profiles holds all shapes that an export is proved at, one more does.

        Args:
            ports: the part's inputs.
            limits: named dimension -> the largest size that the model can take.
        """
        found: list[dict[str, Triple]] = []
        for profile in self.profiles:
            triples = _triples(ports, profile, limits)
            if triples not in found:
                found.append(triples)
        proof = _triples(ports, _PROOF, limits)
        if not any(_holds(each, proof) for each in found):
            found.append(proof)
        return found


def _triples(ports: tuple[Port, ...], profile: Mapping[str, Range], limits: Mapping[str, int]) -> dict[str, Triple]:
    """Return input -> its least, best and largest shape in a profile, cut to what the model can take."""
    sizes = [
        {name: min(each[index], limits.get(name, each[index])) for name, each in profile.items()} for index in range(3)
    ]
    triples = {}
    for port in ports:
        if any(isinstance(dim, str) for dim in port.dims):
            least, best, most = (port.shape(each) for each in sizes)
            triples[port.name] = (least, best, most)
    return triples


def _holds(profile: Mapping[str, Triple], other: Mapping[str, Triple]) -> bool:
    """Whether a profile takes all shapes that another one does."""
    return all(
        low <= least and most <= high
        for name, (lows, _, highs) in profile.items()
        for low, least, most, high in zip(lows, other[name][0], other[name][2], highs, strict=True)
    )


def _profiles(text: str) -> tuple[Mapping[str, Range], ...]:
    """Read `batch:1:2:4/height:64|…`: dimensions between slashes or spaces, profiles between bars."""
    return tuple(_profile(each) for each in text.split("|"))


def _profile(text: str) -> Mapping[str, Range]:
    given: dict[str, Range] = {}
    for piece in re.split(r"[/\s]+", text.strip()):
        if not piece:
            continue
        match = _DIMENSION.fullmatch(piece)
        if not match:
            message = (
                f"got {piece!r} in profiles, expected a dimension and its least, best and largest size: batch:1:2:4"
            )
            raise RecipeError(message)
        if match[1] not in DEFAULTS:
            raise RecipeError(unknown("dimension in profiles", match[1], DEFAULTS))
        least = int(match[2])
        sizes = (least, int(match[3] or least), int(match[4] or least))
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            message = f"got {piece!r} in profiles, expected sizes that rise from 1"
            raise RecipeError(message, fix=f"{match[1]}:{':'.join(map(str, sorted(sizes)))}")
        given[match[1]] = sizes
    return {**DEFAULTS, **given}


def _mib(text: str) -> int:
    if not text.isdecimal() or not int(text):
        message = f"got workspace_mib={text}, expected a whole number of MiB"
        raise RecipeError(message, fix="workspace_mib=4096")
    return int(text) * _MIB
