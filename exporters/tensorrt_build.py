"""Build a TensorRT plan from a typed ONNX file: profiles, settings, timing cache, progress, and what went wrong where."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import nvinfer
from ..errors import Cancelled, LoweringError, ResourceError
from ..home import home
from .tensorrt_progress import Bars, monitor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from .tensorrt_settings import Settings, Triple

BUILD_TIMES = 2.1
"""Device memory of a build for a byte that the engine holds when it runs: what other exporters were seen to take. Not
measured here."""
_EVERY_S = 0.2
_NO_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|memory is insufficient|requested (size was|amount of gpu memory)",
    re.IGNORECASE,
)
"""What TensorRT says where memory is short."""


@dataclass(frozen=True)
class Request:
    """What is to be built."""

    part: str
    onnx: Path
    plan: Path
    settings: Settings
    shapes: Sequence[Mapping[str, Triple]]
    """A profile each: input -> least, best and largest shape."""
    nodes: Sequence[str]
    """Names of the graph's nodes, to know them in messages."""
    needed_bytes: int | None = None
    """Predicted device memory, with the activations of the largest shapes, nothing fused; None: not known."""
    log: list[str] = field(default_factory=list)
    """Gets the builder's warnings and errors."""


def check_room(part: str, weight_bytes: int, free: int) -> None:
    """Refuse a build that can't fit on the device; not for engines that stream weights, whose builds aren't predicted.

    Raises:
        ResourceError: with the figures.
    """
    needed = int(BUILD_TIMES * weight_bytes)
    if needed > free:
        message = (
            f"building {part} takes about {needed / 1e9:.1f} GB of device memory ({BUILD_TIMES} times its weights), "
            f"{free / 1e9:.1f} GB are free"
        )
        fix = (
            "close what uses the GPU; a smaller precision; or +weight_streaming, with which the builder itself is asked"
        )
        raise ResourceError(message, fix=fix)


def build(request: Request) -> None:
    """Build a plan and write it; runs in a thread of its own, so that it can be interrupted.

    Raises:
        LoweringError: TensorRT can't take the graph; with the node, and where the log is.
        Cancelled: it was interrupted.
        UnavailableError: there is no TensorRT, or no GPU.
    """
    stop = threading.Event()
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            _build(request, stop)
            outcome.append(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again, in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=work, name=f"build {request.part}")
    with _stopping(stop):
        thread.start()
        while thread.is_alive():
            thread.join(_EVERY_S)
    if stop.is_set():
        message = f"the build of {request.part} was interrupted"
        raise Cancelled(message)
    if outcome[0] is not None:
        raise outcome[0]


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set an event, rather than raise what is lost where it comes while an object is finalized.

    In the main thread alone: in others Python takes no signals.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _build(request: Request, stop: threading.Event) -> None:
    trt = nvinfer.library()
    logger = nvinfer.logger(trt, request.log)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.onnx)):
        raise _refused(request, _parser_errors(parser))
    config = builder.create_builder_config()
    _configure(trt, config, request.settings)
    for number, shapes in enumerate(request.shapes):
        _add_profile(builder, config, shapes, number)
    cache = _use_timing_cache(config)
    with Bars(request.part) as bars:
        config.progress_monitor = monitor(trt, bars, stop)
        plan = builder.build_serialized_network(network, config)
    if stop.is_set():
        return
    if plan is None:
        raise _refused(request, [line for line in request.log if "ERROR" in line.partition(":")[0]])
    request.plan.write_bytes(memoryview(plan))
    _keep_timing_cache(config, cache)


def _configure(trt: Any, config: Any, settings: Settings) -> None:  # noqa: ANN401 - tensorrt is untyped
    """Set what a recipe asks for. TF32 is off: what is float32 in a typed graph is so on purpose.

    Without the preview feature a run takes the device memory of its profile's largest shapes, whatever its own are.
    """
    config.builder_optimization_level = settings.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, enable=True)
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    flags = {
        trt.BuilderFlag.REFIT: settings.refit,
        trt.BuilderFlag.STRIP_PLAN: settings.strip,
        trt.BuilderFlag.REFIT_IDENTICAL: settings.strip and not settings.refit,
        trt.BuilderFlag.WEIGHT_STREAMING: settings.weight_streaming,
        trt.BuilderFlag.VERSION_COMPATIBLE: settings.version_compatible,
    }
    for flag in [flag for flag, wanted in flags.items() if wanted]:
        config.set_flag(flag)
    config.hardware_compatibility_level = {
        "exact": trt.HardwareCompatibilityLevel.NONE,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }[settings.hardware]


def _add_profile(builder: Any, config: Any, shapes: Mapping[str, Triple], number: int) -> None:  # noqa: ANN401
    if not shapes:
        return
    profile = builder.create_optimization_profile()
    said: RuntimeError | None = None
    try:
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        taken = config.add_optimization_profile(profile) >= 0
    except RuntimeError as error:
        taken, said = False, error
    if not taken:
        message = f"TensorRT doesn't take profile {number}: {dict(shapes)}{f': {said}' if said else ''}"
        raise LoweringError(message, fix="give other sizes with +profiles=…") from said


def timing_cache_file() -> Path:
    """Return where timings for this GPU and TensorRT are kept."""
    bound = nvinfer.binding()
    words = [str(bound[key]) for key in ("gpu", "compute_capability", "tensorrt", "driver")]
    return home() / "tensorrt" / "timing" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', '_'.join(words))}.cache"


def _use_timing_cache(config: Any) -> Path:  # noqa: ANN401
    """Let the builder reuse timings of earlier builds; start anew where they are another's."""
    file = timing_cache_file()
    known = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return file


def _keep_timing_cache(config: Any, file: Path) -> None:  # noqa: ANN401
    cache = config.get_timing_cache()
    if cache is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".partial-{threading.get_ident()}")
    partial.write_bytes(memoryview(cache.serialize()))
    partial.replace(file)


def _parser_errors(parser: Any) -> list[str]:  # noqa: ANN401
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"ERROR: node {error.node_name()} ({error.node_operator()}): {error.desc()}")
    return found


def _refused(request: Request, errors: list[str]) -> LoweringError:
    """Return an error that names the node, and where all that the builder said is kept."""
    file = home() / "tensorrt" / "logs" / f"{request.part}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*request.log, *(line for line in errors if line not in request.log)]) + "\n")
    said = " ".join(errors) or "nothing said why"
    node = _named(said, request.nodes)
    where = f" at node {node}" if node else ""
    message = f"TensorRT can't build {request.part}{where}: {said[:500]}"
    if _NO_MEMORY.search(said):
        needed = "an unknown amount" if request.needed_bytes is None else f"up to {request.needed_bytes / 1e9:.1f} GB"
        message += (
            f"; at its largest sizes it was predicted to take {needed} of device memory, "
            f"{nvinfer.free_bytes() / 1e9:.1f} GB are free"
        )
        fix = f"narrower sizes with +profiles=…, or +workspace_mib=…; the whole log is in {file}"
        return LoweringError(message, fix=fix)
    return LoweringError(message, fix=f"the whole log is in {file}; another backend for this part may take it")


def _named(text: str, nodes: Sequence[str]) -> str | None:
    """Return the longest name of a node that a message has in it."""
    return max((name for name in nodes if name and name in text), key=len, default=None)
