"""How much memory a process takes, by kind, as Linux accounts it; and running work in a child to account it apart."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .errors import BakeoffError

SAMPLE_EVERY_S = 0.01
_RESULT = "bakeoff-result:"


def rss_bytes(kind: str, pid: int | str = "self") -> int:
    """Read one figure of `/proc/PID/status`: `RssAnon`, `RssFile`, `VmRSS` or `VmHWM`; 0 where it can't be read."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line for line in text.splitlines() if line.startswith(f"{kind}:"))
    return next((int(line.split()[1]) * 1024 for line in lines), 0)


def available_bytes() -> int:
    """Return the memory that can be taken without swapping, in bytes, container limits considered."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return free


def give_back() -> None:
    """Collect what is unreachable, and have the C library return freed memory to the system, where it is glibc.

    Freed blocks under 32 MB stay with the process otherwise: of a closed part in bfloat16, nearly all. On a GPU torch
    keeps whatever it had, where neither TensorRT nor ONNX Runtime could take it.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Peak:
    """Peak of anonymous memory, sampled every 10 ms, and of all resident memory as the kernel keeps it."""

    anon_bytes: int = 0
    rss_bytes: int = 0


class Watch:
    """Context manager that samples a process's anonymous memory from another thread (of another process, at best)."""

    def __init__(self, pid: int | None = None) -> None:
        self.peak = Peak()
        self._pid = os.getpid() if pid is None else pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak.anon_bytes = max(self.peak.anon_bytes, rss_bytes("RssAnon", self._pid))
            self.peak.rss_bytes = max(self.peak.rss_bytes, rss_bytes("VmHWM", self._pid))
            if self._done.wait(SAMPLE_EVERY_S):
                return


def in_child(function: str, arguments: dict[str, Any], *, extra_path: str | None = None) -> tuple[Any, Peak]:
    """Call `module:function` with JSON arguments in a new Python process; return its JSON result and its peak memory.

    `extra_path` is a folder of modules besides the installed ones.

    Raises:
        BakeoffError: as the child raised it, or with the end of its stderr if it died.
    """
    command = [sys.executable, "-P", "-m", "bakeoff.memory", function]
    environment = None
    if extra_path:
        paths = [extra_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with (
        subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
        Watch(process.pid) as watch,
    ):
        try:
            output, errors = process.communicate(json.dumps(arguments))
        except BaseException:
            process.kill()
            raise
    return _read_result(function, process.returncode, output, errors or "", watch.peak), watch.peak


def _read_result(function: str, returncode: int, output: str, errors: str, peak: Peak) -> Any:  # noqa: ANN401 - any JSON
    lines = [line for line in output.splitlines() if line.startswith(_RESULT)]
    if not lines:
        reason = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        message, fix = f"{function} died in its child process ({reason}): {errors.strip()[-2000:]}", None
        if returncode == -signal.SIGKILL:
            fix = f"close what uses memory, for which it was most likely killed: it held {peak.anon_bytes / 1e9:.2f} GB"
        raise BakeoffError(message, fix=fix)
    result = json.loads(lines[-1].removeprefix(_RESULT))
    if "error" in result:
        from . import errors as tree

        raised: type[BakeoffError] = getattr(tree, result["error"])
        raise raised(result["message"], fix=result["fix"])
    return result["value"]


def _child_main() -> None:
    module, _, name = sys.argv[1].partition(":")
    arguments = json.loads(sys.stdin.read())
    try:
        result = {"value": getattr(importlib.import_module(module), name)(**arguments)}
    except BakeoffError as error:
        result = {"error": type(error).__name__, "message": error.message, "fix": error.fix}
    sys.stdout.write(f"\n{_RESULT}{json.dumps(result)}\n")


if __name__ == "__main__":
    _child_main()
