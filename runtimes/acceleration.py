"""What makes torch launch less or better: torch.compile, CUDA graphs, a chosen attention kernel."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import time
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnavailableError
from ..home import home
from .blocks import blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    Replay = Callable[[], object]

GRAPHS_KEPT = 4
"""Shapes whose graphs are kept at a time: each holds its activations."""
_WARM_RUNS = 3
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_ELF = b"\x7fELF\x02"
_ELF_HEADER = struct.Struct("<40xQ10xHH2x")
"""Where the table of sections begins, the bytes of a section in it, how many there are."""
_NOT_LOADED = re.compile(r"(?:ImportError|OSError): (\S+\.so): ")
_KERNELS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
_NO_KERNEL = ("No available kernel", "No viable backend")
"""What torch says where the kernels that it may choose from can't do it, on GPUs and on CPUs."""
_ON = {"cuda": tuple(_KERNELS), "rocm": ("flash", "efficient", "math"), "cpu": ("flash", "math")}
"""Device -> the kernels that torch has there; elsewhere `math` alone."""


def compile_module(module: nn.Module, how: bool | str) -> tuple[Any, Any]:  # noqa: FBT001 - the placement's own
    """Have torch compile a module when it runs first; what it compiles is kept in the home folder for later processes.

    Returns:
        What to call, and what is compiled: `False`, `full`, or with `regional` how many blocks of each class; none where
        no two are alike, and the part is left as it is.
    """
    import torch

    if not how:
        return module, False
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    usual = default_cache_dir()  # which importing it may have set already
    if os.environ.get(_CACHE, usual) == usual:
        os.environ[_CACHE] = str(home() / "compiled")
    drop_cut_off(Path(os.environ[_CACHE]))
    with warnings.catch_warnings():  # of torch, about itself
        warnings.simplefilter("ignore")
        if how != "regional":
            return torch.compile(module), "full"
        counts: Counter[str] = Counter()
        for layer in _repeated(module):
            layer.compile()
            counts[type(layer).__name__] += 1
    return module, {"regional": dict(counts)}


_LINKING_S = 2.0
"""Seconds since its last byte for which a part of a library may be one that another process is writing. No more: it would be loaded."""


def drop_cut_off(cache: Path) -> None:
    """Remove libraries of which the cache has the beginning alone; torch compiles them again.

    A process that is killed, or whose disk fills up, as it links a library leaves part of it there, which torch takes for
    whole from then on: to load it fails, or ends the process.
    """
    for library in cache.rglob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process's, for a moment
            with library.open("rb") as stream:
                header = stream.read(_ELF_HEADER.size)
            there = library.stat()
            if _is_cut_off(header, there.st_size) and time.time() - there.st_mtime > _LINKING_S:
                library.unlink()


def _is_cut_off(header: bytes, size: int) -> bool:
    """Say whether a file of 64-bit ELF, whose table of sections comes last, ends before that does."""
    if size < len(_ELF):
        return True
    if not header.startswith(_ELF):
        return False
    if size < _ELF_HEADER.size:
        return True
    table, width, count = _ELF_HEADER.unpack(header)
    return size < table + width * count


def heal(call: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it returns
    """Call what torch compiles, anew where a library of its cache can't be loaded: another process may have been linking it."""
    removed: set[Path] = set()
    while True:
        try:
            return call()
        except (RuntimeError, ImportError, OSError) as error:
            library = _unloadable(str(error))
            if library is None or library in removed:
                raise
            library.unlink(missing_ok=True)
            removed.add(library)


def _unloadable(message: str) -> Path | None:
    """Return the library of torch's cache that an error says can't be loaded; None if it says no such thing."""
    found = _NOT_LOADED.search(message)
    if found is None or _CACHE not in os.environ:
        return None
    library = Path(found[1]).resolve()
    return library if library.is_relative_to(Path(os.environ[_CACHE]).resolve()) else None


def _repeated(module: nn.Module) -> list[nn.Module]:
    """Return a module's blocks: those that Diffusers compiles, those that Transformers doesn't split.

    Where neither says, members of the outermost lists that are alike in class and weights.
    """
    names: set[str] = set()
    for layer in module.modules():
        own: Any = getattr(layer, "_repeated_blocks", None)
        if own is None and type(layer).__module__.startswith("transformers."):
            own = getattr(layer, "_no_split_modules", None)
        names |= set(own or ())
    named = [layer for layer in module.modules() if type(layer).__name__ in names]
    if named:
        return named
    alike: dict[Any, list[nn.Module]] = defaultdict(list)
    for block in blocks_of(module):
        shapes = tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())
        alike[type(block), shapes].append(block)
    return [block for blocks in alike.values() if len(blocks) > 1 for block in blocks]


def compiler_obstacle(device: str) -> tuple[str, str] | None:
    """Say what torch.compile lacks for a device, and the fix; None if nothing."""
    if device == "cpu":
        if os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++"))):
            return None
        return "there is no C++ compiler", "apt-get install g++"
    if device in {"cuda", "rocm", "xpu"}:
        from torch.utils._triton import has_triton

        return None if has_triton() else ("Triton can't be used here", "pip install triton")
    return None


def attention_obstacle(kernel: str, device: str) -> tuple[str, str] | None:
    """Say why a device has no such attention kernel, and the fix; None if it has."""
    known = _ON.get(device, ("math",))
    if kernel in known:
        return None
    return f"torch has no {kernel} attention on {device}", f"attention={' or attention='.join(known)}"


def ChosenAttention(kernel: str) -> Any:  # noqa: ANN401, N802 - a context manager whose base needs torch
    """Return a context in which scaled_dot_product_attention runs on one kernel where that can do it; it counts both.

    `counts` has how often the kernel ran, and how often torch chose another one, because that one can't take a mask or
    a width.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.overrides import TorchFunctionMode

    whole = torch.nn.functional.scaled_dot_product_attention
    wanted = getattr(SDPBackend, _KERNELS[kernel])

    class Chosen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            options = kwargs or {}
            if func is not whole:
                return func(*args, **options)
            try:
                with sdpa_kernel([wanted]):
                    result = whole(*args, **options)
            except RuntimeError as error:
                if not any(said in str(error) for said in _NO_KERNEL):
                    raise
                self.counts["other"] += 1
                return whole(*args, **options)
            self.counts[kernel] += 1
            return result

    return Chosen()


class Graphs:
    """Calls a module through CUDA graphs: one a set of shapes, recorded when these come first, then replayed.

    A graph reads and writes memory of its own: what is given is copied in, what it makes is copied out.
    """

    def __init__(self, part: str, module: Callable[..., Sequence[Tensor]], record: Any = None) -> None:  # noqa: ANN401 - as `record`
        self._part, self._module = part, module
        self._record_call = record or record_graph
        self._kept: OrderedDict[Any, tuple[list[Tensor], Replay, Sequence[Tensor]]] = OrderedDict()
        self.recorded = 0
        """How often a graph was recorded."""

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        key = tuple((tuple(each.shape), each.stride(), each.dtype) for each in arguments)
        if key not in self._kept:
            self._kept[key] = self._recorded(arguments)
        self._kept.move_to_end(key)
        inputs, replay, outputs = self._kept[key]
        for own, given in zip(inputs, arguments, strict=True):
            own.copy_(given, non_blocking=True)
        replay()
        return [output.clone() for output in outputs]

    def _recorded(self, arguments: Sequence[Tensor]) -> tuple[list[Tensor], Replay, Sequence[Tensor]]:
        if len(self._kept) == GRAPHS_KEPT:
            self._kept.popitem(last=False)
        inputs = [each.clone() for each in arguments]
        try:
            replay, outputs = self._record_call(lambda: self._module(*inputs))
        except RuntimeError as error:
            message = f"{self._part} can't be recorded as a CUDA graph: {error}"
            raise UnavailableError(message, fix="leave out cuda_graphs") from error
        self.recorded += 1
        return inputs, replay, outputs


def record_graph(call: Callable[[], Sequence[Tensor]]) -> tuple[Replay, Sequence[Tensor]]:
    """Record what a call launches on the current CUDA device; return how to replay it, and the tensors that it writes.

    It runs a few times before, on another stream, as torch asks for: kernels are chosen and compiled then.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_RUNS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs
