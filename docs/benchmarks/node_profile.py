"""Where the time of one step goes, as the runtime's own profiler tells it: seconds by node class and precision."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

LEAST_SHARE = 0.005
"""Of the step: what takes less is summed up."""
FINAL = "other"
STEPS = 4
"""That OpenVINO's profile is the mean of."""


def openvino_here(folder: str, inputs: str, threads: int, arm: dict[str, str]) -> dict[str, Any]:
    """Take steps of an IR of `static` shapes as the runtime does, and return the profile of all but the first one."""
    import torch
    from unet_arms import Arm, fed_to, opened

    with opened(Arm(**arm), Path(folder), Path(folder), threads) as runtime:
        runtime._settings["PERF_COUNT"] = True  # noqa: SLF001 - nothing else asks for it; what is static is compiled later
        fed = fed_to(runtime, {name: torch.from_numpy(value) for name, value in _fed(inputs).items()})
        runtime.run(fed)
        (request,) = runtime._requests.values()  # noqa: SLF001
        first = _spent(request)
        started = time.perf_counter()
        for _ in range(STEPS):
            runtime.run(fed)
        ended = time.perf_counter()
        means = _spent(request)
        nodes = [
            (_kind(node), node.exec_type, ((STEPS + 1) * mean - before) / STEPS)
            for node, mean, before in zip(request.profiling_info, means, first, strict=True)
            if mean
        ]
    return {"step_seconds": round((ended - started) / STEPS, 3), "nodes": summed(nodes)}


def _kind(node: Any) -> str:  # noqa: ANN401
    """Return a node's class, attention's apart: it is a Subgraph as other fused operations are."""
    return f"{node.node_type} (attention)" if "attention" in node.node_name else str(node.node_type)


def _spent(request: Any) -> list[float]:  # noqa: ANN401 - openvino is untyped
    """Return each node's seconds: means over all steps until now."""
    return [node.real_time.total_seconds() for node in request.profiling_info]


def onnx_here(folder: str, inputs: str, threads: int, arm: dict[str, str]) -> dict[str, Any]:
    """Take two steps of an ONNX model as the runtime opens it, and return the second one's profile."""
    import onnxruntime
    from unet_arms import Arm, opened

    with tempfile.TemporaryDirectory() as work:

        class Profiling(onnxruntime.SessionOptions):
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling, self.profile_file_prefix = True, f"{work}/profile"

        onnxruntime.SessionOptions = Profiling
        with opened(Arm(**arm), Path(folder), Path(folder), threads) as runtime:
            session, fed = runtime._session, _fed(inputs)  # noqa: SLF001 - nothing else ends the profile
            session.run(None, fed)
            started = time.perf_counter()
            session.run(None, fed)
            ended = time.perf_counter()
            events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    last = kernels[len(kernels) // 2 :]
    nodes = [(event["args"]["op_name"], _dtype(event["args"]), event["dur"] / 1e6) for event in last]
    return {"step_seconds": round(ended - started, 3), "nodes": summed(nodes)}


def torch_here(folder: str, inputs: str, threads: int, arm: dict[str, str]) -> dict[str, Any]:
    """Take steps of a module as the runtime does, and return a third one's profile, by torch's operators."""
    import torch
    from unet_arms import Arm, fed_to, opened

    with opened(Arm(**arm), Path(folder), Path(folder), threads) as runtime:
        fed = fed_to(runtime, {name: torch.from_numpy(value) for name, value in _fed(inputs).items()})
        runtime.run(fed)
        started = time.perf_counter()
        runtime.run(fed)
        ended = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            runtime.run(fed)
    nodes = [(event.name, "", event.self_cpu_time_total / 1e6) for event in profile.events()]
    return {"step_seconds": round(ended - started, 3), "nodes": summed(nodes)}


def _dtype(arguments: Mapping[str, Any]) -> str:
    """Return the dtype of a node's first input."""
    kinds = [kind for shape in arguments.get("input_type_shape", []) for kind in shape]
    return kinds[0] if kinds else ""


def _fed(inputs: str) -> dict[str, np.ndarray]:
    import numpy as np

    return dict(np.load(inputs))


def summed(nodes: Iterable[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Sum nodes up by class and kernel, longest first; `share` is of all nodes' time."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind, kernel, seconds in nodes:
        totals[kind, kernel].append(seconds)
    whole = sum(map(sum, totals.values()))
    small = [seconds for spent in totals.values() if sum(spent) < LEAST_SHARE * whole for seconds in spent]
    rows = [
        _row(kind, kernel, spent, whole)
        for (kind, kernel), spent in totals.items()
        if sum(spent) >= LEAST_SHARE * whole
    ]
    return [*sorted(rows, key=lambda row: -row["seconds"]), _row(FINAL, "", small, whole)]


def _row(kind: str, kernel: str, spent: list[float], whole: float) -> dict[str, Any]:
    seconds = sum(spent)
    return {
        "node": kind,
        "kernel": kernel,
        "count": len(spent),
        "seconds": round(seconds, 3),
        "share": round(seconds / whole, 3),
    }
