"""What is measured of one entry: memory, stages and pictures in one worker, the timed repetitions in others."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import nvidia
from ..memory import SAMPLE_EVERY_S, Watch
from ..pictures import psnr
from ..reports.record import FLOOR_FP32
from . import energy, guard

if TYPE_CHECKING:
    from .lineup import Entry
    from .opening import Opener
    from .process import Process

_LEAST_BATCH = 3
"""Prompts in a batch of the floor of fp32, where the experiment has fewer in one: else it is one less."""
_TRACED = 4
"""Prompts whose latents are kept after each step."""
_AGAIN = 3


def profile(opener: Opener, entry: Entry, *, is_drawn: bool = False) -> dict[str, Any]:
    """Take memory, then stages, then pictures, unless these are drawn, in one worker; the timed runs know nothing of it.

    Its load is a cold one, unless resident workers hold the files that it reads.
    """
    folder = opener.options(entry).get("folder")
    evicted = _evict(Path(folder)) if folder and not opener.holds_workers else False
    with opener.started(entry, "profile") as process:
        memory = _memory(opener, entry, process) | {"page_cache_evicted": evicted}
        told = {"memory": memory, "stages": _stages(entry, process)}
        return told if is_drawn else told | {"quality": _quality(opener, entry, process)}


def pictures(opener: Opener, entry: Entry) -> dict[str, Any]:
    """Take pictures alone."""
    with opener.drawing(entry) as process:
        return {"quality": _quality(opener, entry, process)}


def _quality(opener: Opener, entry: Entry, process: Process) -> dict[str, Any]:
    """Make all pictures once, and keep them; and of a few prompts the latents after each step.

    In batches as they are timed: where a backend rounds activations as they come, a picture depends on its batch.
    """
    import numpy as np

    count, file, batch = opener.declared.quality_prompts, opener.file(entry), entry.experiment.batch
    if entry.arm.name == FLOOR_FP32:
        batch = batch - 1 if batch >= _LEAST_BATCH else _LEAST_BATCH
    batches = []
    for first in range(0, count, batch):
        process.ask("generate", rows=list(range(first, min(first + batch, count))))
        process.ask("save", file=str(file.resolve()))
        batches.append(np.load(file))
    np.save(file, np.concatenate(batches))
    rows = list(range(min(_TRACED, count)))
    traced = process.ask("trajectory", rows=rows, file=str(opener.file(entry, "steps").resolve()))
    return {
        "pictures": str(file.relative_to(opener.folder)),
        "traced": traced["steps"],
        "configuration": process.ask("configuration"),
    }


def _memory(opener: Opener, entry: Entry, process: Process) -> dict[str, Any]:
    """Open the arm and run it twice, with another process sampling anonymous memory."""
    rows = list(range(entry.experiment.batch))
    with Watch(process.pid) as watch:
        opened = opener.open(process, entry)
        load_anon = watch.peak.anon_bytes
        first = process.ask("generate", rows=rows)
        steady = process.ask("generate", rows=rows)
        device = process.ask("device_memory") | {"process_bytes": nvidia.process_bytes(process.pid)}
    return {
        "cold_load_s": opened["seconds"],
        "first_image_s": first["seconds"],
        "peak_bytes": {"load": opened["peak_bytes"], "first": first["peak_bytes"], "steady": steady["peak_bytes"]},
        "peak_anon_bytes": watch.peak.anon_bytes,
        "load_peak_anon_bytes": load_anon,
        "sampled_every_s": SAMPLE_EVERY_S,
        "device": {name: value for name, value in device.items() if value is not None},
    }


def _stages(entry: Entry, process: Process) -> dict[str, Any]:
    """Time the parts, and say what the timing itself costs."""
    rows = list(range(entry.experiment.batch))
    process.ask("stages", rows=rows)
    plain = [process.ask("generate", rows=rows)["seconds"] for _ in range(_AGAIN)]
    told = [process.ask("stages", rows=rows) for _ in range(_AGAIN)]
    if told[-1]["stages"] is None:
        return {"seconds": None, "overhead": None}
    overhead = statistics.median(each["seconds"] for each in told) / statistics.median(plain) - 1
    return {"seconds": told[-1]["stages"], "overhead": overhead}


def repetitions(opener: Opener, entry: Entry, block: int) -> dict[str, Any]:
    """Time one arm in one block: load, first pictures, warm-up, repetitions, and one prompt over and over."""
    e = entry.experiment
    sample = opener.file(entry, "timed")
    with opener.timed(entry) as (process, opened):
        first = process.ask("generate", rows=_rotated(entry, block, 0))["seconds"] if opened else None
        warm = [_generate(process, entry, block, i) for i in range(e.warmups)]
        gpu = process.ask("gpu")["uuid"]
        with guard.Watch(process.pid, gpu) as watch:
            parent, joules = os.times(), energy.read(gpu)
            samples = [_generate(process, entry, block, i) for i in range(e.repetitions)]
            used, own = energy.between(joules, energy.read(gpu)), os.times()
        process.ask("save", file=str(sample.resolve()))
        same = [_generate(process, entry, block, 0) for _ in range(_AGAIN)]
        configuration = process.ask("configuration")
    busy = (own.user - parent.user + own.system - parent.system) / max(watch.seconds, 1e-9)
    rows = _rotated(entry, block, e.repetitions - 1)
    return {
        "load_s": opened and opened["seconds"],
        "first_s": first,
        "warmup_s": warm,
        "samples_s": samples,
        "same_prompt_s": same,
        "energy_j": used,
        "sample_rows": rows,
        "sample_db": _sample_db(opener, entry, sample, rows),
        "guard": watch.told() | {"parent_cores": round(busy, 4)},
        "configuration": configuration,
    }


def _generate(process: Process, entry: Entry, block: int, repetition: int) -> float:
    return float(process.ask("generate", rows=_rotated(entry, block, repetition))["seconds"])


def _rotated(entry: Entry, block: int, repetition: int) -> list[int]:
    """Return the prompts of a repetition: each takes up where the one before ended."""
    e = entry.experiment
    first = (block * e.repetitions + repetition) * e.batch
    return [(first + row) % e.timed_prompts for row in range(e.batch)]


def _sample_db(opener: Opener, entry: Entry, sample: Path, rows: list[int]) -> float | None:
    """Return how near the timed run's last pictures are to the judged ones of the same prompts: worst PSNR."""
    import numpy as np

    kept = np.load(opener.file(entry), mmap_mode="r")
    got = np.load(sample)
    sample.unlink()
    pairs = [(kept[row], picture) for row, picture in zip(rows, got, strict=True) if row < len(kept)]
    return min((psnr(a, b) if a.shape == b.shape else 0.0 for a, b in pairs), default=None)


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
