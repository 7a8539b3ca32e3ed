"""`make gpu`: everything that an NVIDIA GPU can show, in ten minutes: `python gpu.py RECORD.json`.

First what needs no quiet machine is done at once, each on cores of its own: exports, compiling, features that pass or fail. Then
what is timed runs alone, one after another in processes of their own, most telling first; the record is written after each, and the
page beside it. Run again, it goes on with what is missing. Full-size models have random weights that are drawn on the
device: their seconds, memory and energy are those of the real ones, their pictures are noise.

`--device cpu --tiny` runs the same code with tiny models on a CPU: to try it, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bakeoff import footprint, hardware, nvidia
from bakeoff.errors import BakeoffError

if TYPE_CHECKING:
    from collections.abc import Iterator

ITEMS_SCRIPT = Path(__file__).with_name("gpu_items.py")
PAGE = runpy.run_path(str(ITEMS_SCRIPT.with_name("gpu_page.py")))
SCHEMA = 1
_UNDONE = {"failed", "not_run", "unfinished"}
_WITHOUT_FIGURES = {"failed", "not_run", "skipped"}
_FIGURES = {"arms", "features", "median_picture_s"}
"""Words of outcomes: what runs again, what tells that a try came to nothing, and what one came to."""
_LEAST_S = 15.0
"""Less than this isn't worth starting a process for."""
_BUDGETS = {None: 60.0, "regional": 120.0, "full": 180.0}
"""Seconds of an item by what it compiles."""
_PREPARING = 0.3
"""Share of the time that may go by before anything is timed."""
_CORES, _JOB_BYTES, _JOB_DEVICE_BYTES = 2, 4_000_000_000, 8_000_000_000
"""Cores of a job that is done beside others, and memory that most take of the host and of the device, about."""
_UNKNOWN_GPU = 2
"""Jobs at once on a GPU of which nothing is told."""
_GRACE_S = 20.0
"""What an item may take beyond its budget before its process is ended."""
PACKAGES = (
    "bakeoff", "torch", "triton", "diffusers", "transformers", "bitsandbytes", "torchao", "onnx", "onnxscript",
    "onnxruntime-gpu", "onnxruntime", "tensorrt-cu13", "nvidia-ml-py",
)  # fmt: skip
ANCHORS = {
    "model": "FLUX.1-dev, 28 steps, 1024×1024, bfloat16, one H200",
    "seconds": {"Diffusers": 5.58, "Diffusers, compiled": 4.32, "Diffusers, compiled, FlashAttention 3": 3.73},
    "label": "published by others for the real weights on their machine; not measured here",
}
_BATCH = 32
"""Pictures of the embedded model in a batch: one by one they would keep no GPU busy."""
_PROFILES = (
    f"profiles=batch:1:{2 * _BATCH}:{2 * _BATCH}/height:8:16:16/width:8:16:16"  # guidance doubles its UNet's rows
)
SHAPES_ARMS = (
    "torch:fp32", "torch:bf16", "torch:fp16", "torch:bf16+cuda_graphs", "torch:int8", "torch:nf4", "torch:int4",
    "torch:w8a8-dynamic", "torch:w8a8", "torch:fp8", "onnx:fp32", "onnx:fp16+compute=half",
    *(f"tensorrt:{each}+{_PROFILES}" for each in ("fp32", "bf16", "fp16", "w8a8", "fp8", "int4")),
)  # fmt: skip
"""Those whose backend isn't here are left out, with the reason in the record.

Compiled blocks are measured at full size; weights that ONNX Runtime widens to float32 are a processor's to judge.
"""
TRIED_ARMS = ("torch:fp32", "torch:bf16", "torch:bf16+cuda_graphs", "torch:nf4", "tensorrt:fp16")
"""With `--tiny`."""
_JUDGED = {"blocks": 3, "prompts": 1024, "batch": _BATCH, "steps": 10}
_TRIED = {"blocks": 2, "prompts": 2, "batch": 1, "steps": 2}
"""What the embedded model draws, and with `--tiny`: gates of quantized recipes take 1,024 prompts."""


@dataclass(frozen=True)
class Model:
    """A full-size model, and the work that it gets."""

    name: str
    steps: int


MODELS = {
    model.name: model
    for model in (
        Model("flux.1-dev", 28),
        Model("sdxl", 30),
        Model("sd-3.5-medium", 28),
        Model("z-image", 20),
        Model("sd-3.5-large", 28),
    )
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "eager bf16": ("bf16", {}),
    "compiled blocks": ("bf16", {"compile": "regional"}),
    "fp8, compiled blocks": ("fp8", {"compile": "regional"}),
    "nf4": ("nf4", {}),
    "w8a8-dynamic, compiled blocks": ("w8a8-dynamic", {"compile": "regional"}),
    "int8": ("int8", {}),
    "CUDA graphs": ("bf16", {"cuda_graphs": True}),
    "compiled blocks, CUDA graphs": ("bf16", {"compile": "regional", "cuda_graphs": True}),
    "compiled whole": ("bf16", {"compile": "full"}),
}
"""Arm -> precision, placement; a model's are run in this order, but for those that are most telling."""


@dataclass(frozen=True)
class Item:
    """One thing to run: a function of `gpu_items.py`, its arguments, and the seconds that it may take."""

    name: str
    kind: str
    budget_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    chores: tuple[Item, ...] = ()
    """What of it can be done beforehand."""


def items(device: str, work: Path, *, tiny: bool) -> list[Item]:
    """Return all that there is to run, most telling first."""
    common = {"work": str(work), "device": device}
    arms = [f"{arm}@{device}" for arm in (TRIED_ARMS if tiny else SHAPES_ARMS)]
    judged = {"arms": arms, "jobs": _jobs_at_once(device), **(_TRIED if tiny else _JUDGED)}
    pictures = {(name, arm): _picture(model, arm, common, tiny=tiny) for name, model in MODELS.items() for arm in ARMS}
    first = [pictures.pop(("flux.1-dev", arm)) for arm in ("eager bf16", "compiled blocks", "fp8, compiled blocks")]
    second = [pictures.pop(("sdxl", arm)) for arm in ("eager bf16", "compiled blocks")]
    recipe = "onnx:fp16+compute=half" + ("" if device == "cpu" else "+attention=flash")
    sdxl = MODELS["sdxl"]
    onnx = {**common, "model": sdxl.name, "recipe": recipe}
    exported = Item("sdxl, exporting to ONNX", "onnx_export", 240, {**onnx, "tiny": tiny})
    alone = [
        _alone(MODELS[name], common, tiny=tiny, compiled=each)
        for name in ("flux.1-dev", "sdxl")
        for each in (False, True)
    ]
    eager = [pictures.pop((name, "eager bf16")) for name, arm in [*pictures] if arm == "eager bf16"]
    return [
        *first,
        *second,
        Item("shapes", "shapes", 420, {**common, **judged}, _bakes(arms, common)),
        Item(
            "features", "features", 180, common, (Item("features beside", "features", 180, {**common, "beside": True}),)
        ),
        *alone,
        *eager,
        Item(
            "sdxl, UNet in ONNX Runtime, float16", "onnx_picture", 240, {**onnx, **_work(sdxl, tiny=tiny)}, (exported,)
        ),
        *pictures.values(),
    ]


def _bakes(arms: list[str], common: dict[str, Any]) -> tuple[Item, ...]:
    """Return what bakes the arms, in about as many jobs as are done at once."""
    jobs = runpy.run_path(str(ITEMS_SCRIPT.with_name("gpu_shapes.py")))["jobs"](arms, _jobs_at_once(common["device"]))
    return tuple(Item(f"baking {job[0]}", "shapes.bake", 180, {**common, "arms": job}) for job in jobs)


def _work(model: Model, *, tiny: bool) -> dict[str, Any]:
    pictures = {"steps": 2, "size": 64, "pictures": 2} if tiny else {"steps": model.steps, "size": 1024, "pictures": 3}
    return {**pictures, "tiny": tiny}


def _alone(model: Model, common: dict[str, Any], *, tiny: bool, compiled: bool) -> Item:
    """Return the item of Diffusers by itself, which others are to be compared with."""
    arguments = {**common, "model": model.name, "compiled": compiled, **_work(model, tiny=tiny)}
    name = f"{model.name}, Diffusers alone, {'compiled' if compiled else 'eager'}"
    return Item(name, "diffusers", _BUDGETS["regional" if compiled else None], arguments)


def _picture(model: Model, arm: str, common: dict[str, Any], *, tiny: bool) -> Item:
    precision, placement = ARMS[arm]
    arguments = {
        **common,
        "model": model.name,
        "precision": precision,
        "placement": placement,
        **_work(model, tiny=tiny),
    }
    chores: tuple[Item, ...] = ()
    if placement.get("compile") == "regional":
        taken = {name: value for name, value in arguments.items() if name not in {"steps", "pictures"}}
        taken["placement"] = {"compile": "regional"}
        chores = (Item(f"{model.name}, compiling {precision}", "compiled", 180, taken),)
    return Item(f"{model.name}, {arm}", "picture", _BUDGETS[placement.get("compile")], arguments, chores)


def start(item: Item, logs: Path, cores: list[int] | None = None) -> subprocess.Popen[str]:
    """Start an item's process, which gets ready without touching the device, and waits for its arguments.

    `cores`: those that it may run on.
    """
    on = [] if cores is None else [",".join(map(str, cores))]
    with _log(item, logs).open("w") as stream:
        return subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-P", str(ITEMS_SCRIPT), item.kind, *on],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            errors="replace",
            start_new_session=True,
        )


def run(item: Item, process: subprocess.Popen[str], seconds: float, logs: Path) -> dict[str, Any]:
    """Run an item in its process, which ends when its time is over."""
    started = time.monotonic()
    try:
        output, _ = process.communicate(json.dumps({**item.arguments, "budget_s": seconds}), timeout=seconds + _GRACE_S)
    except BaseException as error:
        end(process)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        late = {"failed": f"took longer than {seconds + _GRACE_S:.0f} s", "wall_s": round(seconds + _GRACE_S, 1)}
        return _so_far(item) | late
    wall = {"wall_s": round(time.monotonic() - started, 1)}
    told = _result(output)
    if process.returncode or told is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it had started
        said = _log(item, logs).read_text(errors="replace")[-1500:]
        return _so_far(item) | {"failed": said, "exit_code": process.returncode, **wall}
    return {**told, **wall}


def _result(output: str) -> dict[str, Any] | None:
    """Return the last line that is an item's result: libraries may print after it, as they end."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(told := json.loads(line), dict):
                return told
    return None


def _so_far(item: Item) -> dict[str, Any]:
    """Return what an item had found before its process ended, if it keeps that."""
    if item.kind not in PAGE["OWN_TABLES"]:
        return {}
    found: dict[str, Any] = runpy.run_path(str(ITEMS_SCRIPT.with_name(f"gpu_{item.kind}.py")))["so_far"](
        **{name: item.arguments[name] for name in ("work", "device", "arms") if name in item.arguments}
    )
    return found


def end(process: subprocess.Popen[str] | None) -> None:
    """End a process, with those that it started."""
    if process is not None and process.poll() is None:
        kill(process)
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process, with those that it started; who waits for it learns that it ended."""
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:  # else its number may be another's by now
            os.killpg(process.pid, signal.SIGKILL)


def is_installed() -> bool:
    """Say whether an isolated interpreter finds the package, as the bench's workers must."""
    found = subprocess.run([sys.executable, "-I", "-c", "import bakeoff"], capture_output=True, check=False)
    return found.returncode == 0


def _log(item: Item, logs: Path) -> Path:
    return logs / f"{''.join(c if c.isalnum() else '-' for c in item.name)}.txt"


def is_done(outcome: dict[str, Any] | None, versions: dict[str, str]) -> bool:
    """Say whether an item needn't run again: it has all its figures, or still lacks what it lacked.

    What was skipped or left out may run once another package is installed, or another version.
    """
    if outcome is None or _UNDONE & set(outcome):
        return False
    return not (outcome.get("skipped") or outcome.get("left_out")) or outcome.get("tried_with") == versions


def kept(before: dict[str, Any] | None, outcome: dict[str, Any]) -> dict[str, Any]:
    """Return what the record keeps: figures that it has aren't given for a try that came to nothing, or to less."""
    if before is None or not _FIGURES & set(before):
        return outcome
    came_to_less = _WITHOUT_FIGURES & set(outcome) and not _UNDONE & set(before)
    return before if came_to_less or not _FIGURES & set(outcome) else outcome


def open_record(file: Path, device: str, *, tiny: bool) -> dict[str, Any]:
    """Return the record so far, or a new one.

    Raises:
        BakeoffError: it is another machine's, or of another size.
    """
    machine = hardware.describe()
    fresh = {"schema": SCHEMA, "machine": machine, "device": device, "tiny": tiny, "versions": _versions()}
    if not file.exists():
        return {**fresh, "anchors": ANCHORS, "items": {}}
    found: dict[str, Any] = json.loads(file.read_text())
    gpus = _gpu_names(machine)
    for name, had, value in (
        ("device", found["device"], device),
        ("tiny", found["tiny"], tiny),
        ("cpu", found["machine"]["cpu"], machine["cpu"]),
        ("gpus", _gpu_names(found["machine"]) or gpus, gpus or _gpu_names(found["machine"])),
    ):
        if had != value:
            message = f"{file} was recorded with {name} = {had}, here it is {value}"
            raise BakeoffError(message, fix="choose another file, or remove this one")
    return {**found, "versions": fresh["versions"]}


def _gpu_names(machine: dict[str, Any]) -> list[str]:
    """Return the names of GPUs, which need NVML to be told; drivers may change between two runs."""
    return [gpu["name"] for gpu in machine["gpus"]]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write(file: Path, record: dict[str, Any]) -> None:
    """Write the record and its page, each at once."""
    for path, text in ((file, json.dumps(record, indent=1) + "\n"), (file.with_suffix(".md"), PAGE["page"](record))):
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)


def _jobs_at_once(device: str) -> int:
    """Return how many jobs the cores, the host's memory and the device's are enough for."""
    counts = [len(os.sched_getaffinity(0)) // _CORES, footprint.usable_bytes() // _JOB_BYTES]
    if device != "cpu":
        gpus = nvidia.describe()
        counts.append(gpus[0]["memory_bytes"] // _JOB_DEVICE_BYTES if gpus else _UNKNOWN_GPU)
    return max(1, min(counts))


def prepare(due: list[Item], seconds: float, work: Path, device: str) -> dict[str, dict[str, Any]]:
    """Do chores at once, each on cores of its own, until the seconds are over; those that take longest come first.

    Returns:
        What came of each, by its name.
    """
    chores = {job.name: job for item in due for job in item.chores}
    jobs = dict(sorted(chores.items(), key=lambda each: -each[1].budget_s))
    cores, ends = sorted(os.sched_getaffinity(0)), time.monotonic() + seconds
    count, free = _jobs_at_once(device), queue.SimpleQueue[list[int]]()
    for number in range(count):
        free.put(cores[number::count])
    running: list[subprocess.Popen[str]] = []
    starting, stopped = threading.Lock(), threading.Event()

    def do(job: Item) -> dict[str, Any]:
        own = free.get_nowait()
        try:
            with starting:
                if (left := ends - time.monotonic()) < _LEAST_S + _GRACE_S or stopped.is_set():
                    return {"not_run": "the time to prepare was up"}
                running.append(process := start(job, work, own))
            return run(job, process, min(job.budget_s, left) - _GRACE_S, work)
        finally:
            free.put(own)

    with ThreadPoolExecutor(count) as pool:
        try:
            return dict(zip(jobs, pool.map(do, jobs.values()), strict=True))
        except BaseException:
            with starting:
                stopped.set()
                for process in running:
                    kill(process)
            raise


def _outcomes(due: list[Item], ends: float, work: Path) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Run items while there is time; the next one's process imports what it needs while one runs."""
    waiting = start(due[0], work) if due else None
    try:
        for item, following in itertools.zip_longest(due, due[1:]):
            left = ends - time.monotonic() - _GRACE_S
            if waiting is None or left < _LEAST_S:
                yield item, {"not_run": f"{max(left, 0):.0f} s were left; run it again"}
                continue
            process, waiting = waiting, start(following, work) if following else None
            yield item, run(item, process, min(item.budget_s, left), work)
    finally:
        end(waiting)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models: to try the script")
    parser.add_argument("--minutes", type=float, default=10.0, help="after which nothing more is started (10)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="items with one of these words in their names")
    parser.add_argument("--work", type=Path, help="folder for what is built; by default beside the record")
    options = parser.parse_args()
    there = hardware.devices()[options.device]
    if not there.ok:
        print(f"make gpu runs on {options.device}, but {there.reason}.\n  hint: {there.fix}", file=sys.stderr)
        print("  hint: --device cpu --tiny tries the script here", file=sys.stderr)
        return 5
    if not is_installed():
        print(f"bakeoff isn't installed in {sys.executable}, which a bench's processes read alone.", file=sys.stderr)
        print(
            "  hint: python -m pip install -e . in the folder of this repository; PYTHONPATH isn't enough",
            file=sys.stderr,
        )
        return 2
    ends = time.monotonic() + 60 * options.minutes
    options.record.parent.mkdir(parents=True, exist_ok=True)
    work = (options.work or options.record.parent / "gpu-work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    record = open_record(options.record, options.device, tiny=options.tiny)
    known = items(options.device, work, tiny=options.tiny)
    wanted = [item for item in known if not options.only or any(word in item.name for word in options.only)]
    if not wanted:
        print(f"nothing is called {' or '.join(options.only)}; there are:", file=sys.stderr)
        print(*(f"  {item.name}" for item in known), sep="\n", file=sys.stderr)
        return 2
    due = [item for item in wanted if not is_done(record["items"].get(item.name), record["versions"])]
    write(options.record, record)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes end with this one
    prepared = prepare(due, _PREPARING * 60 * options.minutes, work, options.device)
    for item, outcome in _outcomes(due, ends, work):
        outcome["prepared"] = {chore.name: prepared[chore.name] for chore in item.chores}
        arguments = {name: value for name, value in item.arguments.items() if name != "work"}
        outcome |= {"arguments": arguments, "tried_with": record["versions"]}
        record["items"][item.name] = kept(record["items"].get(item.name), outcome)
        print(f"{item.name}: {PAGE['said'](outcome)}", file=sys.stderr)
        write(options.record, record)
    print(options.record.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
