"""A worker's process, seen from outside: started, told, timed out, and its death explained."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

_PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "BAKEOFF_HOME", "HF_HOME",
    "HF_HUB_OFFLINE", "CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "SYSTEMROOT",
)  # fmt: skip
_STDERR_KEPT = 4000
WORKER = Path(__file__).with_name("worker.py")


class ArmFailedError(Exception):
    """An arm that raised, crashed or hung; never more than its own row's end."""

    def __init__(self, reason: str, stderr: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.stderr = stderr


class Process:
    """A context manager around one worker. While it works the parent sleeps on a pipe."""

    def __init__(self, python: str, adapter: Path, log: Path, threads: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._log = log
        self._stderr = log.open("wb")
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the interpreter that the experiment names
                [python, "-I", str(WORKER), str(adapter)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment(threads),
            )
        except OSError as error:
            self._stderr.close()
            raise ArmFailedError(str(error), "") from error
        self.pid = self._process.pid

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
        """Give an order and wait for its answer.

        Raises:
            ArmFailedError: the worker answered with an error, died, or said nothing for too long.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None  # noqa: S101 - both are pipes, see __init__
        assert stdout is not None  # noqa: S101
        try:
            stdin.write(json.dumps({"do": what, "with": arguments}).encode() + b"\n")
            stdin.flush()
            ready, _, _ = select.select([stdout], [], [], self._timeout_s)
        except BrokenPipeError:
            ready = [stdout]
        if not ready:
            self._process.kill()
            reason = f"hung: no answer to {what} in {self._timeout_s:g} s"
            raise ArmFailedError(reason, self._said())
        line = stdout.readline()
        if not line:
            raise ArmFailedError(_death(self._process.wait()), self._said())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ArmFailedError(answer["error"], self._said())
        return answer

    def kill(self) -> None:
        """End the worker, if it hasn't ended."""
        self._process.kill()

    def _said(self) -> str:
        self._stderr.flush()
        return self._log.read_text(errors="replace")[-_STDERR_KEPT:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


def environment(threads: int) -> Mapping[str, str]:
    """Return what a worker sees of the environment: a few names, and the same number of threads for every library."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"PYTHONUNBUFFERED": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    return passed | counts | quiet


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    often = ", most often because memory ran out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{often}"
