"""`make gpu`'s experiment on the embedded model: every arm that can run, timed in turn and judged by its gates.

It takes as many prompts and blocks as fit its time. What is there when the time is up is summed up, and run again it
goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff import plugins
from bakeoff.errors import BakeoffError
from bakeoff.exporters.exporter import BoundExporter
from bakeoff.recipe import parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from bakeoff.bench.experiment import Experiment
    from bakeoff.recipe import PartRecipe, Placement, Recipe

PROMPT = "a large red circle on a white background"
_REPETITIONS = 3
_OPEN_S, _SLOWER, _JUDGE_S = 10.0, 2.5, 0.02
"""Guesses: seconds in which a process opens an arm, what a batch takes of float32's on average, seconds of a picture's judge."""
_ADDED = 3
"""Entries that draw besides the arms: floors, and the reference."""
_FEWER = (512, 256, 128, 64, 32, 16, 8)
"""Judged prompts that are tried, if more don't fit."""
_DRAWING = 0.5
"""Share of the time in which pictures are to be drawn and judged; timing goes on when it is run again."""
_HUNG_S = 150.0
_CALIBRATION = {"count": 16, "steps": 10}


class _TimeUpError(BaseException):
    """Nobody's to catch but `shapes`'s."""


def shapes(
    work: str,
    device: str,
    arms: list[str],
    blocks: int,
    prompts: int,
    batch: int,
    steps: int,
    jobs: int,
    budget_s: float,
) -> dict[str, Any]:
    """Run an experiment on the embedded model, or go on with it, as far as the seconds reach; `jobs` arms draw at once."""
    from bakeoff.bench.runner import run
    from bakeoff.reports.record import FILE

    found, left_out = _possible(arms, device)
    folder = _folder(work, found)
    told: dict[str, Any] = {"left_out": left_out}
    ends = time.monotonic() + budget_s
    try:
        declared = _again(folder / FILE) or _declared(
            Path(work),
            found,
            arms[0],
            device,
            budget_s,
            blocks=blocks,
            prompts=prompts,
            batch=batch,
            steps=steps,
            jobs=jobs,
        )
        run(declared, folder, _until(ends), jobs)
    except _TimeUpError:
        told["unfinished"] = f"{budget_s:.0f} s were too few; run it again, and it goes on"
    return told | _summed_up(folder / FILE)


def so_far(work: str, device: str, arms: list[str]) -> dict[str, Any]:
    """Sum up what the experiment recorded before its process ended; nothing if it hadn't begun."""
    from bakeoff.reports.record import FILE

    found, left_out = _possible(arms, device)
    return {"left_out": left_out} | _summed_up(_folder(work, found) / FILE)


def _folder(work: str, arms: list[str]) -> Path:
    return Path(work) / f"shapes-{hashlib.sha256(' '.join(arms).encode()).hexdigest()[:8]}"


def bake(work: str, device: str, arms: list[str], budget_s: float) -> dict[str, Any]:  # noqa: ARG001 - an item's arguments
    """Bake arms beforehand, where the experiment will look for them; the calibration, too, if they take one."""
    from bakeoff.bench import work as arms_work

    found, left_out = _possible(arms, device)
    calibration, baked = _calibration(Path(work), found), {}
    for arm in found:
        try:
            baked[arm] = arms_work.bake("shapes", arm, calibration=calibration, prove=False)["export_s"]
        except BakeoffError as error:
            left_out[arm] = error.message
    return {"export_s": baked, "left_out": left_out}


def jobs(arms: list[str], count: int) -> list[list[str]]:
    """Deal what can be baked beside other work into so many jobs; those that a calibration changes are one more.

    Arms whose artifacts are the same count once. TensorRT times kernels as it builds: it gets a quiet machine later.
    """
    recipes = {repr(parse(arm)[0]): arm for arm in reversed(arms)}
    distinct = [arm for arm in recipes.values() if parse(arm)[0].default.backend != "tensorrt"][::-1]
    calibrated = [arm for arm in distinct if is_calibrated(arm)]
    if calibrated:
        calibrated += [arm for arm in distinct if arm not in calibrated and _uses_inputs(arm)]
    others = [arm for arm in distinct if arm not in calibrated]
    return [job for job in (calibrated, *(others[number::count] for number in range(count))) if job]


def is_calibrated(arm: str) -> bool:
    """Say whether an arm's recipe takes a calibration."""
    from bakeoff import plan

    return plan.is_calibrated(parse(arm)[0].default)


def _uses_inputs(arm: str) -> bool:
    from bakeoff import plan

    return plan.uses_inputs(parse(arm)[0].default)


def _until(ends: float) -> Callable[[str, int, int], None]:
    """Return what tells of progress, and raises `_TimeUpError` once the time is up: between steps, where nothing is half done."""

    def say(text: str, done: int, total: int) -> None:
        print(f"{done}/{total} {text}", file=sys.stderr, flush=True)
        if time.monotonic() > ends:
            raise _TimeUpError

    return say


def _again(record: Path) -> Experiment | None:
    """Return the experiment that a record is of, so that it can go on."""
    from bakeoff.bench.experiment import from_dict

    return from_dict(json.loads(record.read_text())["experiment"]) if record.is_file() else None


def _declared(
    work: Path,
    found: list[str],
    reference: str,
    device: str,
    seconds: float,
    *,
    blocks: int,
    prompts: int,
    batch: int,
    steps: int,
    jobs: int,
) -> Experiment:
    from bakeoff.bench.experiment import from_dict

    started = time.monotonic()
    calibration = _calibration(work, found)
    pace = _pace(device, steps, batch)
    left = _DRAWING * seconds - (time.monotonic() - started)
    prompts = fitting(prompts, batch, len(found), jobs, pace, left)
    return from_dict(
        {
            "model": "shapes",
            "arms": found,
            "baseline": found[0],
            "reference": reference,
            "calibration": calibration,
            "prove": False,
            "blocks": blocks,
            "repetitions": _REPETITIONS,
            "prompts": "shapes-1024",
            "quality_prompts": prompts,
            "timed_prompts": min(2 * batch, prompts),
            "batch": min(batch, prompts),
            "steps": steps,
            "guidance_scale": 3.0,
            "timeout_s": _HUNG_S,
            "resident": True,
        }
    )


def fitting(prompts: int, batch: int, arms: int, jobs: int, pace_s: float, seconds: float) -> int:
    """Return the most prompts, up to those asked for, whose pictures can be drawn and judged in the seconds; at least the fewest.

    `pace_s` are a batch's in float32.
    """
    possible = [prompts, *(each for each in _FEWER if each < prompts)]
    fits = [
        many
        for many in possible
        if (arms + _ADDED) * (_OPEN_S + many * (_SLOWER * pace_s / batch + _JUDGE_S)) <= jobs * seconds
    ]
    return (fits or possible[-1:])[0]


def _pace(device: str, steps: int, batch: int) -> float:
    """Return the seconds of a batch of torch's float32, once it is open."""
    from bakeoff.runtimes.engine import load
    from bakeoff.sources.source import Source

    asked = {"seeds": range(batch), "steps": steps, "max_batch": batch}
    with load(Source.open("shapes").folder, device=device) as engine:
        engine.generate([PROMPT] * batch, **asked)
        started = time.perf_counter()
        engine.generate([PROMPT] * batch, **asked)
        return time.perf_counter() - started


def _calibration(work: Path, arms: list[str]) -> str | None:
    """Calibrate the model once, if a recipe takes that; return the file."""
    if not any(map(is_calibrated, arms)):
        return None
    from bakeoff.models.prompts import default_prompts, read_prompts
    from bakeoff.tuning.calibrate import calibrate

    file = work / "shapes-calibration.safetensors"
    if not file.exists():
        chosen = read_prompts(default_prompts("shapes"), _CALIBRATION["count"])
        calibrate("shapes", chosen, steps=_CALIBRATION["steps"]).save(file)
    return str(file)


def _summed_up(file: Path) -> dict[str, Any]:
    """Sum up what a record holds; nothing before there is an arm in one."""
    from bakeoff.reports.summary import summarize
    from bakeoff.reports.tables import as_json, markdown

    record = json.loads(file.read_text()) if file.is_file() else {"arms": {}}
    if not record["arms"]:
        return {}
    summary = summarize(record)
    return {"arms": json.loads(as_json(summary)), "markdown": markdown(summary), "bench_record": str(file)}


def _possible(arms: list[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Return the arms that can run on the device, and why others can't."""
    reasons = {arm: obstacle(*parse(arm), device) for arm in arms}
    return [arm for arm in arms if reasons[arm] is None], {arm: reason for arm, reason in reasons.items() if reason}


def obstacle(recipe: Recipe, placement: Placement, device: str) -> str | None:
    """Say why a recipe can't be baked, or run on the device as it is placed; None if it can."""
    reasons = (_part_obstacle(part, placement, device) for part in (recipe.default, *recipe.parts.values()))
    return next((reason for reason in reasons if reason), None)


def _part_obstacle(recipe: PartRecipe, placement: Placement, device: str) -> str | None:
    backend = recipe.backend
    if backend not in plugins.names("runtimes"):
        return f"no backend {backend} is installed"
    runtime, exporter = plugins.runtime(backend), plugins.exporter(backend)
    available = runtime.probe()
    if not available.ok:
        return f"{available.reason}: {available.fix}"
    chosen = runtime.device_for(placement)
    if chosen != device:
        return f"it would run on {chosen}, not on {device}"
    if recipe.precision not in exporter.precisions:
        return f"{backend} doesn't bake {recipe.precision}"
    try:
        if isinstance(exporter, BoundExporter):
            exporter.check(recipe.precision, recipe.options)
    except BakeoffError as error:
        return f"{error.message}: {error.fix}"
    return _option_obstacle(runtime, backend, placement)


def _option_obstacle(runtime: Any, backend: str, placement: Placement) -> str | None:  # noqa: ANN401 - a Runtime's class
    asked = [option for option in ("compile", "cuda_graphs", "attention") if getattr(placement, option)]
    asked += ["blocks"] if placement.offload == "blocks" else []
    for option in asked:
        found = runtime.option_obstacle(option, placement)
        if option not in runtime.options:
            return f"{backend} has no {option}"
        if found:
            return f"{found[0]}: {found[1]}"
    return None
