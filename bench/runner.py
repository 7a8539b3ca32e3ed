"""Runs an experiment: bakes what isn't there, judges quality, takes memory and stages, then times the arms interleaved."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BakeoffError
from ..hardware import describe, usable_cores
from ..memory import Watch, in_child
from ..recipe import parse
from ..reports.record import AGAIN, FLOOR, REFERENCE, entry_name
from . import guard
from .experiment import Arm, Experiment
from .process import ArmFailedError, Process
from .record import open_record, write_record
from .work import prompts, seed_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[str], None]

_HALF = {"bf16", "fp16"}
_ADAPTERS = Path(__file__).parent / "adapters"
_QUALITY_BATCH = 8


@dataclass(frozen=True)
class Entry:
    """An arm at a point of the sweep."""

    name: str
    arm: Arm
    point: str
    experiment: Experiment


def run(experiment: Experiment, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run an experiment, or go on with it, and return its record; `record.json` and the pictures are in `folder`.

    Raises:
        UsageError: the folder holds another experiment, or the experiment can't be meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _Run(experiment, folder, progress).all()


class _Run:
    def __init__(self, experiment: Experiment, folder: Path, progress: Progress) -> None:
        self._declared = experiment
        self._folder = folder
        self._progress = progress
        self._record = open_record(folder, experiment)
        self._blocks_began = time.monotonic()
        self._finished_before = len(self._record["blocks"])
        self._threads = experiment.threads or usable_cores()
        for name in ("pictures", "latents", "logs"):
            (folder / name).mkdir(exist_ok=True)

    def all(self) -> dict[str, Any]:
        self._record["machine"] = describe()
        self._record["prompts"] = [
            {"id": each, "text": text} for each, text in prompts(self._declared.prompts, self._prompt_count())
        ]
        self._draw_latents()
        for arm in self._arms():
            self._bake(arm)
        entries = self._entries()
        for entry in entries:
            self._once(entry, "quality", self._take_quality)
        timed = [entry for entry in entries if entry.arm.name not in {REFERENCE, FLOOR}]
        self._judge(entries)
        for entry in timed:
            if entry.arm.name != AGAIN:
                self._once(entry, "memory", self._take_memory)
                self._once(entry, "stages", self._take_stages)
        self._blocks_began = time.monotonic()
        while len(self._record["blocks"]) < self._declared.blocks:
            self._run_block(timed)
        self._progress("done")
        return self._record

    def _prompt_count(self) -> int:
        return max(self._declared.timed_prompts, self._declared.quality_prompts)

    def _write(self) -> None:
        write_record(self._folder, self._record)

    def _draw_latents(self) -> None:
        drawn = self._record.setdefault("latents", {})
        ids = [prompt["id"] for prompt in self._record["prompts"]]
        for point in self._declared.points().values():
            name = _size(point)
            file = self._folder / "latents" / f"{name}.npy"
            if name not in drawn or not file.exists():
                self._progress(f"drawing latents for {name}")
                arguments = {"model": point.model, "ids": ids, "height": point.height, "width": point.width}
                drawn[name], _ = in_child("bakeoff.bench.work:write_latents", {**arguments, "file": str(file)})
                self._write()

    def _arms(self) -> list[Arm]:
        """Return the declared arms, and those that the experiment adds."""
        arms = list(self._declared.arms)
        arms.append(replace(self._declared.arm(self._declared.baseline), name=AGAIN))
        named = {arm.name: arm for arm in self._declared.arms}
        reference = self._declared.reference
        arms.append(
            replace(named[reference], name=REFERENCE) if reference in named else Arm(REFERENCE, recipe=reference)
        )
        if any(_precisions(arm) & _HALF for arm in arms):
            arms.append(Arm(FLOOR, recipe="torch:bf16"))
        return arms

    def _bake(self, arm: Arm) -> None:
        """Export an arm's recipe if that hasn't been done; note where it lies."""
        about = self._record["arms"].setdefault(arm.name, {"entries": {}})
        if "artifact" in about or "failure" in about or arm.recipe is None:
            return
        self._progress(f"baking {arm.recipe}")
        try:
            about["artifact"], peak = in_child(
                "bakeoff.bench.work:bake", {"model": self._declared.model, "recipe": arm.recipe}
            )
            about["artifact"]["export_peak_anon_bytes"] = peak.anon_bytes
        except BakeoffError as error:
            about["failure"] = {"during": "export", "reason": error.message, "stderr": ""}
            self._progress(f"{arm.name} failed: {error.message}")
        self._write()

    def _entries(self) -> list[Entry]:
        return [
            Entry(entry_name(arm.name, point), arm, point, experiment)
            for point, experiment in self._declared.points().items()
            for arm in self._arms()
        ]

    def _about(self, entry: Entry) -> dict[str, Any]:
        about: dict[str, Any] = self._record["arms"][entry.arm.name]["entries"].setdefault(entry.name, {})
        return about

    def _failed(self, entry: Entry) -> bool:
        return "failure" in self._record["arms"][entry.arm.name] or "failure" in self._about(entry)

    def _once(self, entry: Entry, what: str, take: Callable[[Entry], dict[str, Any]]) -> None:
        """Take one kind of measurement, unless the record has it; a failure is the entry's own."""
        if self._failed(entry) or what in self._about(entry):
            return
        self._progress(f"{what}: {entry.name}")
        try:
            self._about(entry)[what] = take(entry)
        except ArmFailedError as error:
            self._fail(entry, what, error)
        self._write()

    def _fail(self, entry: Entry, during: str, error: ArmFailedError) -> None:
        self._about(entry)["failure"] = {"during": during, "reason": error.reason, "stderr": error.stderr}
        self._progress(f"{entry.name} failed: {error.reason}")

    def _start(self, entry: Entry, purpose: str) -> Process:
        arm, threads = entry.arm, entry.experiment.threads or self._threads
        named = _ADAPTERS / f"{arm.adapter}.py"
        adapter = named if named.is_file() else Path(arm.adapter or _ADAPTERS / "bakeoff_engine.py").resolve()
        log = self._folder / "logs" / f"{_file_name(entry.name)}-{purpose}.txt"
        return Process(arm.python or sys.executable, adapter, log, threads, self._declared.timeout_s)

    def _options(self, entry: Entry) -> dict[str, Any]:
        arm, threads = entry.arm, entry.experiment.threads or self._threads
        if arm.adapter:
            return {**arm.options, "threads": threads}
        if arm.folder:
            return {"threads": threads, **arm.options, "folder": str(Path(arm.folder).resolve())}
        artifact = self._record["arms"][arm.name]["artifact"]
        placement = {**artifact["placement"], "threads": artifact["placement"]["threads"] or threads}
        return {**placement, **arm.options, "folder": artifact["folder"]}

    def _work(self, entry: Entry) -> dict[str, Any]:
        e, given = entry.experiment, self._record["prompts"]
        return {
            "prompts": [prompt["text"] for prompt in given],
            "seeds": [seed_of(prompt["id"]) for prompt in given],
            "latents": str((self._folder / "latents" / f"{_size(e)}.npy").resolve()),
            "steps": e.steps,
            "height": e.height,
            "width": e.width,
            "guidance_scale": e.guidance_scale,
            "negative_prompt": e.negative_prompt,
            "scheduler": e.scheduler,
        }

    def _take_quality(self, entry: Entry) -> dict[str, Any]:
        """Make all pictures once, and keep them."""
        count, file = self._declared.quality_prompts, self._picture_file(entry)
        import numpy as np

        with self._start(entry, "quality") as process:
            process.ask("open", options=self._options(entry))
            process.ask("prepare", work=self._work(entry))
            batches = []
            for first in range(0, count, _QUALITY_BATCH):
                process.ask("generate", rows=list(range(first, min(first + _QUALITY_BATCH, count))))
                process.ask("save", file=str(file.resolve()))
                batches.append(np.load(file))
            np.save(file, np.concatenate(batches))
            configuration = process.ask("configuration")
        self._record.setdefault("pictures", {})[entry.name] = str(file.relative_to(self._folder))
        return {"configuration": configuration}

    def _picture_file(self, entry: Entry) -> Path:
        return self._folder / "pictures" / f"{_file_name(entry.name)}.npy"

    def _judge(self, entries: list[Entry]) -> None:
        """Compare each entry's pictures with the reference's, and with what their prompts say; all in one child."""
        reference = {entry.point: entry for entry in entries if entry.arm.name == REFERENCE}
        pending = [
            entry
            for entry in entries
            if not self._failed(entry)
            and not self._failed(reference[entry.point])
            and "figures" not in self._about(entry)["quality"]
        ]
        if not pending:
            return
        self._progress(f"judging the pictures of {len(pending)} arms")
        pairs = [[str(self._picture_file(each)) for each in (reference[entry.point], entry)] for entry in pending]
        texts = [prompt["text"] for prompt in self._record["prompts"][: self._declared.quality_prompts]]
        arguments = {"pairs": pairs, "prompts": texts, "scorer": self._declared.model == "shapes"}
        found, _ = in_child("bakeoff.bench.quality:figures_of_all", arguments)
        for entry, figures in zip(pending, found, strict=True):
            self._about(entry)["quality"]["figures"] = figures
        self._write()

    def _take_memory(self, entry: Entry) -> dict[str, Any]:
        """Open and run once more, with another process sampling anonymous memory; the first load is a cold one."""
        folder = self._options(entry).get("folder")
        evicted = _evict(Path(folder)) if folder else False
        rows = list(range(entry.experiment.batch))
        with self._start(entry, "memory") as process:
            with Watch(process.pid) as watch:
                opened = process.ask("open", options=self._options(entry))
                opened_anon = watch.peak.anon_bytes
                process.ask("prepare", work=self._work(entry))
                first = process.ask("generate", rows=rows)
                steady = process.ask("generate", rows=rows)
            return {
                "cold_load_s": opened["seconds"],
                "page_cache_evicted": evicted,
                "first_image_s": first["seconds"],
                "peak_bytes": {
                    "load": opened["peak_bytes"],
                    "first": first["peak_bytes"],
                    "steady": steady["peak_bytes"],
                },
                "peak_anon_bytes": watch.peak.anon_bytes,
                "load_peak_anon_bytes": opened_anon,
            }

    def _take_stages(self, entry: Entry) -> dict[str, Any]:
        """Time the parts in a second pass; the timed runs know nothing of it."""
        rows = list(range(entry.experiment.batch))
        with self._start(entry, "stages") as process:
            process.ask("open", options=self._options(entry))
            process.ask("prepare", work=self._work(entry))
            process.ask("stages", rows=rows)
            plain = [process.ask("generate", rows=rows)["seconds"] for _ in range(3)]
            told = [process.ask("stages", rows=rows) for _ in range(3)]
        overhead = (
            statistics.median(each["seconds"] for each in told if "seconds" in each) if told[0]["stages"] else None
        )
        return {"seconds": told[-1]["stages"], "overhead": overhead and overhead / statistics.median(plain) - 1}

    def _run_block(self, timed: list[Entry]) -> None:
        """Run every entry once, in an order of this block's own; write the record at its end."""
        index = len(self._record["blocks"])
        order = [entry for entry in timed if not self._failed(entry)]
        random.Random(f"{self._declared.seed}/{index}").shuffle(order)
        runs = {}
        for number, entry in enumerate(order, 1):
            at = f"block {index + 1} of {self._declared.blocks}, {number} of {len(order)}"
            self._progress(f"{at}: {entry.name}{self._outlook(index, number - 1, len(order))}")
            try:
                runs[entry.name] = self._time(entry, index)
            except ArmFailedError as error:
                self._fail(entry, f"block {index + 1}", error)
        self._record["blocks"].append({"index": index, "order": [entry.name for entry in order], "runs": runs})
        self._write()

    def _outlook(self, block: int, done: int, count: int) -> str:
        """Say how long the blocks will still take, and how far the repetitions of an arm lie apart."""
        finished = block * count + done
        if finished == self._finished_before * count:
            return ""
        took = (time.monotonic() - self._blocks_began) / (finished - self._finished_before * count)
        left = took * (self._declared.blocks * count - finished)
        runs = [run for each in self._record["blocks"] for run in each["runs"].values()]
        spreads = [statistics.pstdev(run["samples_s"]) / statistics.fmean(run["samples_s"]) for run in runs]
        noise = f", noise {statistics.median(spreads):.1%}" if spreads else ""
        return f" ({left / 60:.0f} min left{noise})"

    def _time(self, entry: Entry, block: int) -> dict[str, Any]:
        """Time one arm in a fresh process: load, first pictures, warm-up, repetitions, and one prompt over and over."""
        e = entry.experiment

        def rows(repetition: int) -> list[int]:
            first = (block * e.repetitions + repetition) * e.batch
            return [(first + row) % e.timed_prompts for row in range(e.batch)]

        sample = self._folder / "pictures" / f"{_file_name(entry.name)}-timed.npy"
        with self._start(entry, "timed") as process:
            load = process.ask("open", options=self._options(entry))["seconds"]
            process.ask("prepare", work=self._work(entry))
            first = process.ask("generate", rows=rows(0))["seconds"]
            warm = [process.ask("generate", rows=rows(i))["seconds"] for i in range(e.warmups)]
            before = guard.read(process.pid)
            parent = os.times()
            samples = [process.ask("generate", rows=rows(i))["seconds"] for i in range(e.repetitions)]
            after = guard.read(process.pid)
            used = os.times()
            process.ask("save", file=str(sample.resolve()))
            same = [process.ask("generate", rows=rows(0))["seconds"] for _ in range(3)]
            configuration = process.ask("configuration")
        busy = (used.user - parent.user + used.system - parent.system) / max(after.at - before.at, 1e-9)
        return {
            "load_s": load,
            "first_s": first,
            "warmup_s": warm,
            "samples_s": samples,
            "same_prompt_s": same,
            "sample_rows": rows(e.repetitions - 1),
            "sample_db": self._sample_db(entry, sample, rows(e.repetitions - 1)),
            "guard": guard.between(before, after) | {"parent_cores": round(busy, 4)},
            "configuration": configuration,
        }

    def _sample_db(self, entry: Entry, sample: Path, rows: list[int]) -> float | None:
        """Return how near the timed run's last pictures are to the quality run's of the same prompts: worst PSNR."""
        import numpy as np

        from ..pictures import psnr

        kept = np.load(self._picture_file(entry), mmap_mode="r")
        got = np.load(sample)
        sample.unlink()
        pairs = [(kept[row], picture) for row, picture in zip(rows, got, strict=True) if row < len(kept)]
        return min((psnr(a, b) if a.shape == b.shape else 0.0 for a, b in pairs), default=None)


def _precisions(arm: Arm) -> set[str]:
    if arm.recipe is None:
        return set()
    recipe, _ = parse(arm.recipe)
    return {recipe.default.precision, *(part.precision for part in recipe.parts.values())}


def _size(experiment: Experiment) -> str:
    return (
        "default"
        if experiment.height is None or experiment.width is None
        else f"{experiment.height}x{experiment.width}"
    )


def _file_name(entry: str) -> str:
    import hashlib
    import re

    return f"{re.sub(r'[^A-Za-z0-9]+', '-', entry).strip('-')[:60]}-{hashlib.sha256(entry.encode()).hexdigest()[:6]}"


def _evict(folder: Path) -> bool:
    """Ask the kernel to drop a folder's files from its page cache, so that the next load is a cold one."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return True
