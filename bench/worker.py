"""The process of one arm: opens it and makes pictures when told to. Standard library and NumPy alone.

It may run in any Python environment from 3.9 on: `python worker.py ADAPTER.py`. Commands come as JSON lines on stdin,
answers go as JSON lines to what was stdout (which is then stderr's, so that a library's prints don't spoil them).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

_TOLD_VERSIONS = (
    "bakeoff", "diffusers", "numpy", "onnxruntime", "openvino", "openvino_genai", "optimum", "tensorrt", "torch",
    "torchao", "transformers",
)  # fmt: skip


class Worker:
    """One arm, and what may be asked of it."""

    def __init__(self, adapter_file: str) -> None:
        spec = importlib.util.spec_from_file_location("bakeoff_bench_adapter", adapter_file)
        started = time.perf_counter_ns()
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        self.imported_ns = time.perf_counter_ns() - started
        self.make = module.Adapter
        self.adapter: Any = None
        self.work: dict[str, Any] = {}

    def open(self, options: dict[str, Any]) -> dict[str, Any]:
        """Open the arm; seconds are those of a process that has just started, imports included."""
        started = time.perf_counter_ns()
        reset_peak()
        self.adapter = self.make(options)
        taken = time.perf_counter_ns() - started + self.imported_ns
        return {"seconds": taken / 1e9, "peak_bytes": peak()}

    def prepare(self, work: dict[str, Any]) -> dict[str, Any]:
        """Take the work: prompts, the file of their latents, steps, size, guidance."""
        self.work = {**work, "latents": np.load(work["latents"])}
        return {}

    def generate(self, rows: list[int]) -> dict[str, Any]:
        """Make the pictures of some prompts in one batch; time it from prompts to uint8 pixels in host memory."""
        latents = np.ascontiguousarray(self.work["latents"][rows])
        prompts = [self.work["prompts"][row] for row in rows]
        reset_peak()
        started = time.perf_counter_ns()
        images = self.adapter.generate(prompts, latents, self.work)
        ended = time.perf_counter_ns()
        self.images = np.asarray(images)
        if self.images.dtype != np.uint8 or self.images.shape[3:] != (3,) or len(self.images) != len(rows):
            message = f"the adapter gave {self.images.shape} {self.images.dtype}, expected ({len(rows)}, H, W, 3) uint8"
            raise ValueError(message)
        return {"seconds": (ended - started) / 1e9, "peak_bytes": peak()}

    def save(self, file: str) -> dict[str, Any]:
        """Keep the last pictures."""
        np.save(file, self.images)
        return {"shape": list(self.images.shape)}

    def stages(self, rows: list[int]) -> dict[str, Any]:
        """Make pictures once more, by part: seconds of each part and between steps, where the adapter can tell."""
        tell = getattr(self.adapter, "stages", None)
        if tell is None:
            return {"stages": None}
        latents = np.ascontiguousarray(self.work["latents"][rows])
        started = time.perf_counter_ns()
        told = tell([self.work["prompts"][row] for row in rows], latents, self.work)
        return {"stages": told, "seconds": (time.perf_counter_ns() - started) / 1e9}

    def trajectory(self, rows: list[int], file: str) -> dict[str, Any]:
        """Keep the latents after each step, (steps, B, …) float32, where the adapter can tell them."""
        tell = getattr(self.adapter, "trajectory", None)
        if tell is None:
            return {"steps": 0}
        latents = np.ascontiguousarray(self.work["latents"][rows])
        told = np.asarray(tell([self.work["prompts"][row] for row in rows], latents, self.work), np.float32)
        np.save(file, told)
        return {"steps": len(told)}

    def device_memory(self) -> dict[str, Any]:
        """Say what the adapter's own allocator took of a device at most, in bytes, where there is one."""
        told: dict[str, Any] = getattr(self.adapter, "device_memory", dict)()
        return told

    def gpu(self) -> dict[str, Any]:
        """Say which GPU the adapter computes on, by its UUID; None where it doesn't tell, or uses none."""
        return {"uuid": getattr(self.adapter, "gpu", lambda: None)()}

    def configuration(self) -> dict[str, Any]:
        """Say what the adapter read back: threads, devices, precision executed; and this process's own."""
        told: dict[str, Any] = getattr(self.adapter, "configuration", dict)()
        versions = {name: version(name) for name in _TOLD_VERSIONS if importlib.util.find_spec(name)}
        return {"adapter": told, "python": sys.version.split()[0], "affinity": affinity(), "versions": versions}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name, such as onnxruntime-gpu
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def reset_peak() -> None:
    """Set the kernel's high-water mark of resident memory back to what is resident now."""
    try:
        with Path("/proc/self/clear_refs").open("w") as stream:
            stream.write("5")
    except OSError:
        pass


def peak() -> int:
    """Return the high-water mark of resident memory since the last reset, in bytes; 0 where the kernel keeps none."""
    try:
        with Path("/proc/self/status").open() as stream:
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            worker = worker or Worker(sys.argv[1])
            answer = getattr(worker, order["do"])(**order["with"])
        except Exception as error:  # noqa: BLE001 - whatever an adapter raises is its arm's result
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
