"""Opens entries in worker processes, each with what the experiment says: its artifact, its threads, the same work."""

from __future__ import annotations

import hashlib
import re
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..hardware import usable_cores
from ..reports.record import FLOOR_FP32
from .lineup import UNTIMED
from .process import Process
from .work import local, seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .experiment import Experiment
    from .lineup import Entry

_ADAPTERS = Path(__file__).parent / "adapters"


class Opener:
    """Knows the run's folder, and how each entry is started. A context manager: its end ends the resident workers."""

    def __init__(self, declared: Experiment, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.declared = declared
        self._record = record
        self._resident: dict[str, Process] = {}
        self._started: list[Process] = []
        self._ended = False
        self._kept = ExitStack()
        for name in ("pictures", "latents", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._resident.clear()
        self._kept.close()

    @contextmanager
    def opened(self, entry: Entry, purpose: str) -> Iterator[tuple[Process, dict[str, Any]]]:
        """Start an entry's worker and open it; yield it and what opening told.

        Raises:
            ArmFailedError: it couldn't be started or opened.
        """
        with self.started(entry, purpose) as process:
            yield process, self.open(process, entry)

    @contextmanager
    def timed(self, entry: Entry) -> Iterator[tuple[Process, dict[str, Any] | None]]:
        """As `opened`; but resident workers stay alive and idle between blocks, and tell of opening in their first.

        Those that drew the judged pictures beside others tell nothing of it.
        """
        if not self.declared.resident:
            with self.opened(entry, "timed") as opened:
                yield opened
        elif entry.name in self._resident:
            yield self._resident[entry.name], None
        else:
            yield self._staying(entry, "timed")

    @contextmanager
    def drawing(self, entry: Entry) -> Iterator[Process]:
        """As `opened`, for judged pictures; a resident entry's worker stays, if it is to be timed."""
        if self.declared.resident and entry.arm.name not in UNTIMED:
            yield self._staying(entry, "pictures")[0]
        else:
            with self.opened(entry, "pictures") as (process, _):
                yield process

    def _staying(self, entry: Entry, purpose: str) -> tuple[Process, dict[str, Any]]:
        process = self._kept.enter_context(self.started(entry, purpose))
        self._resident[entry.name] = process
        return process, self.open(process, entry)

    @property
    def holds_workers(self) -> bool:
        return bool(self._resident)

    def drop(self, entry: Entry) -> None:
        """End an entry's resident worker, if there is one: a failed one keeps its memory from others."""
        process = self._resident.pop(entry.name, None)
        if process is not None:
            process.kill()

    def open(self, process: Process, entry: Entry) -> dict[str, Any]:
        """Open an entry in its worker and give it the work; return what opening told."""
        told = process.ask("open", options=self.options(entry))
        process.ask("prepare", work=self._work(entry))
        return told

    def started(self, entry: Entry, purpose: str) -> Process:
        """Start an entry's worker, which has opened nothing yet."""
        arm = entry.arm
        shipped = _ADAPTERS / f"{arm.adapter}.py"
        adapter = shipped if shipped.is_file() else Path(arm.adapter or _ADAPTERS / "bakeoff_engine.py").resolve()
        log = self.folder / "logs" / f"{_file_name(entry.name)}-{purpose}.txt"
        python = arm.python or sys.executable
        process = Process(python, adapter, log, self._threads(entry), self.declared.timeout_s)
        self._started.append(process)
        if self._ended:  # another thread was about to start it
            process.kill()
        return process

    def kill(self) -> None:
        """End every worker at once, whatever it is at, and those to come; who waits for one learns that it died."""
        self._ended = True
        for process in self._started:
            process.kill()

    def _threads(self, entry: Entry) -> int:
        threads = entry.experiment.threads or usable_cores()
        if entry.arm.name == FLOOR_FP32:  # another count, so that sums are cut in other places
            return threads - 1 or threads + 1
        return threads

    def options(self, entry: Entry) -> dict[str, Any]:
        """Return what the entry's adapter is given."""
        arm, threads = entry.arm, self._threads(entry)
        if arm.adapter:
            return {**arm.options, "threads": threads}
        artifact = self._record["arms"][arm.name]["artifact"]
        placement = {**artifact["placement"], "threads": artifact["placement"].get("threads") or threads}
        return {**placement, **arm.options, "folder": str(local(artifact["folder"]))}

    def _work(self, entry: Entry) -> dict[str, Any]:
        e, given = entry.experiment, self._record["prompts"]
        return {
            "prompts": [prompt["text"] for prompt in given],
            "seeds": [seed_of(prompt["id"]) for prompt in given],
            "latents": str((self.folder / "latents" / f"{size_name(e)}.npy").resolve()),
            "steps": e.steps,
            "height": e.height,
            "width": e.width,
            "guidance_scale": e.guidance_scale,
            "negative_prompt": e.negative_prompt,
            "scheduler": e.scheduler,
        }

    def file(self, entry: Entry, kind: str = "") -> Path:
        """Return where an entry's pictures are kept; those that it shares lie under the other's name."""
        return self.folder / "pictures" / f"{_file_name(entry.shares or entry.name)}{kind and '-'}{kind}.npy"


def size_name(experiment: Experiment) -> str:
    """Return the name of a size, under which its latents are kept."""
    if experiment.height is None or experiment.width is None:
        return "default"
    return f"{experiment.height}x{experiment.width}"


def _file_name(entry: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", entry).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(entry.encode()).hexdigest()[:6]}"
