"""Where and how an artifact runs: device, threads, compilers, memory. Given when it is loaded, never baked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .errors import RecipeError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

OFFLOADS = ("auto", "none", "parts", "mapped", "blocks")
SWITCHES = ("auto", "on", "off")
COMPILES = ("full", "regional")
ATTENTIONS = ("flash", "efficient", "cudnn", "math")
_MOST_MERGED = 0.75


@dataclass(frozen=True)
class Placement:
    """Where and how an artifact runs. Given to `load`, never part of an artifact's key."""

    device: str = "auto"
    devices: Any = ()
    """Part -> its device, where that isn't `device`: a mapping, or text such as `vae_decoder@cpu,text_encoder@cpu`."""
    threads: int | None = None
    """None: as many as there are physical cores to use, alike for all runtimes."""
    compile: bool | str = False
    """torch.compile, in the torch runtime: `full` (or True), or `regional`: the repeated blocks alone, which takes less
    time to compile. What was compiled is kept between processes."""
    cuda_graphs: bool = False
    """On NVIDIA GPUs, torch, ONNX Runtime and TensorRT: record what is launched once a shape, and replay it."""
    attention: str | None = None
    """The kernel of attention, instead of the runtime's own choice: torch's scaled_dot_product_attention has all four,
    ONNX Runtime `flash` and `math`."""
    channels_last: str = "auto"
    """`on`, `off`, or `auto`: torch lays convolutions out channels-last in all precisions but fp32."""
    static: bool = False
    """OpenVINO: compile anew for each input's shapes, which may run faster, rather than once for any."""
    provider: str | None = None
    """An execution provider of ONNX Runtime, by name."""
    provider_options: str | None = None
    """Options of that provider, as ONNX Runtime names them: `cudnn_conv_algo_search=HEURISTIC;tunable_op_enable=1`."""
    offload: str = "auto"
    """`none`: opened parts stay open; `parts`: those that are done are closed before others are opened; `mapped`: and
    weights stay in their files, where the runtime can; `blocks`: torch on a GPU, weights come from host memory a block
    at a time; `auto`: what the memory that is there asks for."""
    vae_tiling: str = "auto"
    """`on`, `off`, or `auto`: where one picture's activations wouldn't fit. Lossy: seams."""
    vae_slicing: str = "auto"
    """`on`, `off`, or `auto`: a picture at a time where a batch's activations wouldn't fit."""
    attention_slicing: int | str | None = None
    """Heads (of batch × heads) whose attention the torch runtime computes at a time, or `auto`: as many as 256 MB hold."""
    token_merging: float = 0.0
    """Share of tokens that UNets merge before self-attention in the torch runtime, over 0 to 0.75. Lossy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", _devices(self.devices))
        _check_count("threads", self.threads)
        if self.attention_slicing != "auto":
            _check_count("attention_slicing", self.attention_slicing, " or auto")
        _check_word("offload", self.offload, OFFLOADS)
        for name in ("channels_last", "vae_tiling", "vae_slicing"):
            _check_word(name, getattr(self, name), SWITCHES)
        if self.compile not in (True, False):
            _check_word("compile", self.compile, COMPILES)
        if self.attention is not None:
            _check_word("attention", self.attention, ATTENTIONS)
        self.provider_settings()
        self._check_merging()

    def _check_merging(self) -> None:
        if not isinstance(self.token_merging, int | float) or not 0 <= self.token_merging <= _MOST_MERGED:
            message = f"got token_merging = {self.token_merging!r}, expected a share from 0 to {_MOST_MERGED}"
            raise RecipeError(message)
        for option in ("compile", "cuda_graphs"):
            if getattr(self, option) and (self.attention_slicing is not None or self.token_merging):
                message = (
                    f"got {option} with attention_slicing or token_merging, expected one or the other: they change "
                    f"what is {'compiled' if option == 'compile' else 'recorded'}"
                )
                raise RecipeError(message, fix=f"leave out {option}")

    def of(self, part: str) -> Placement:
        """Return where one part goes."""
        return replace(self, device=dict(self.devices).get(part, self.device), devices=())

    def provider_settings(self) -> dict[str, str]:
        """Return `provider_options` by name.

        Raises:
            RecipeError: the text isn't `name=value;name=value`.
        """
        pairs = [pair.partition("=") for pair in (self.provider_options or "").split(";") if pair]
        if not all(name and equals for name, equals, _ in pairs):
            message = f"got provider_options = {self.provider_options!r}, expected name=value;name=value"
            raise RecipeError(message)
        return {name: value for name, _, value in pairs}

    def as_dict(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"devices": dict(self.devices)}


def _devices(given: Any) -> tuple[tuple[str, str], ...]:  # noqa: ANN401 - a mapping, pairs or text
    """Return pairs of part and device, sorted."""
    if isinstance(given, str):
        pairs = [each.strip().partition("@")[::2] for each in given.split(",") if each.strip()]
        if not all(part and device for part, device in pairs):
            message = f"got devices = {given!r}, expected part@device,part@device"
            raise RecipeError(message)
        given = dict(pairs)
    return tuple(sorted(dict(given).items() if isinstance(given, Mapping) else given))


def _check_count(name: str, value: object, other: str = "") -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        message = f"got {name} = {value!r}, expected a whole number from 1{other}"
        raise RecipeError(message)


def _check_word(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        message = unknown(f"value of {name}:", str(value), known)
        raise RecipeError(message)


LOAD_OPTIONS = tuple(each.name for each in fields(Placement) if each.name not in {"device", "devices"})
"""What a recipe may carry after `+` that isn't baked."""


def option_value(key: str, text: str) -> Any:  # noqa: ANN401 - of the option's type
    """Read an option of `Placement` as the command line and recipes spell it."""
    return _READ_OPTION.get(key, str)(text)


def _whole(text: str) -> int | str:
    """Return a whole number; the text itself where it is none, which `Placement` refuses by name."""
    return int(text) if text.isdecimal() else text


def _share(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_READ_OPTION: dict[str, Callable[[str], Any]] = {
    "compile": lambda text: text or True,
    "cuda_graphs": lambda _: True,
    "channels_last": lambda text: text or "on",
    "static": lambda _: True,
    "threads": _whole,
    "attention_slicing": lambda text: _whole(text or "auto"),
    "token_merging": _share,
}
