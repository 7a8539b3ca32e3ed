"""What each recipe costs at real size: `python unet_precisions.py RECORD.json [--model sdxl] [--nncf-python PATH] …`.

A UNet of SD 1.5's (or SDXL's) size with random float32 weights is exported once a recipe, calibrated on four timesteps
of small latents in eager float32. Arms run in groups, each with fp32 and bf16 of the same runtime. All arms of a group
stay open in processes of their own; each block runs every arm once, in another order, with the same inputs. Per arm:
the ratios of its seconds to fp32's and to bf16's, and to NNCF's of the same precision, with their 95 % intervals over blocks, the SQNR of its prediction to
torch's in float32, anonymous memory opened and at the peak of a step, bytes on disk, and what the export took.

`nncf-int8` and `nncf-w8a8` are one call of NNCF (`compress_weights`; `quantize` for transformers) on our fp32 IR,
`plain-nncf-w8a8` is the same file compiled as it is, without what our runtime makes of a graph before, and `ort-dynamic`
and `ort-static` are ONNX Runtime's `quantize_dynamic` and `quantize_static` on our fp32 graph: the same weights, the
same inputs to calibrate with, the same runtime and settings to run. NNCF lives in an environment of its own: without
`--nncf-python` its arms are left out.

With `--in-turn` arms are opened one at a time, anew for each block; what is timed is the first step then, with
`--in-turn later` the median of three steps behind it, so that intervals hold for how processes differ, too. A group's
table says so.

Groups and profiles that the record has are kept; the tables of `docs/precisions.md` are written anew.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from precision_tables import with_tables
from tqdm import tqdm
from unet_arms import PLAIN, SIZES, Arm, Resident, inputs, make, source

from bakeoff.hardware import describe, has_instructions, overflows_bytes
from bakeoff.memory import available_bytes, in_child
from bakeoff.parity.distance import relative_error
from bakeoff.verdict import paired_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

HERE = Path(__file__).parent
PAGE = HERE.parent / "precisions.md"
GROUPS = {
    "openvino, two bytes": ("openvino", ["fp32", "bf16", "fp16"]),
    "openvino, activations too": ("openvino", ["fp32", "bf16", "w8a8", "w8a8-dynamic", "nncf-w8a8", "plain-nncf-w8a8"]),
    "openvino, static shapes": (
        "openvino",
        ["fp32+static", "bf16+static", "w8a8+static", "nncf-w8a8+static", "plain-nncf-w8a8+static"],
    ),
    "openvino, beside NNCF": ("openvino", ["bf16", "w8a8", "nncf-w8a8", "plain-nncf-w8a8"]),
    "openvino, beside NNCF, static shapes": (
        "openvino",
        ["bf16+static", "w8a8+static", "nncf-w8a8+static", "plain-nncf-w8a8+static"],
    ),
    "openvino, weights alone": ("openvino", ["fp32", "bf16", "int8", "nncf-int8"]),
    "openvino, 4 bits": ("openvino", ["fp32", "bf16", "int4", "nf4"]),
    "onnx, two bytes": ("onnx", ["fp32", "bf16", "fp16"]),
    "onnx, activations too": (
        "onnx",
        ["fp32", "bf16", "w8a8", "w8a8+outputs=rounded", "w8a8-dynamic", "ort-dynamic", "ort-static"],
    ),
    "onnx, one call": ("onnx", ["fp32", "ort-dynamic", "ort-static"]),
    "onnx, weights alone": ("onnx", ["fp32", "bf16", "int8", "int4", "nf4"]),
    "onnx, attention": ("onnx", ["fp32", "fp32+attention=math"]),
    "torch, two bytes": ("torch", ["fp32", "bf16", "fp16"]),
    "torch": ("torch", ["fp32", "bf16", "int8", "int4", "nf4", "w8a8", "w8a8-dynamic"]),
    "torch, activations too": ("torch", ["bf16", "w8a8"]),
    "torch, whose codes": ("torch", ["fp32", "bf16", "int8", "int8+codes=bakeoff"]),
}
PROFILED = ["openvino:bf16+static", "openvino:w8a8+static", "openvino:nncf-w8a8+static", "onnx:fp32", "onnx:w8a8"]
PROFILED += ["torch:bf16", "torch:w8a8"]
STEPS = {"first": 0, "later": 3}
"""Which steps `--in-turn` times -> how many are taken behind the first."""
REFERENCE = Arm("torch", "fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--model", choices=SIZES, default="sd-1.5")
    parser.add_argument("--work", type=Path, help="folder for weights and exports, 25 GB; a temporary one by default")
    parser.add_argument("--keep", action="store_true", help="keep what is in --work, and use what is there")
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, "profiles"], default=[*GROUPS, "profiles"])
    parser.add_argument("--again", action="store_true", help="run what --only names although the record has it")
    parser.add_argument(
        "--arms",
        nargs="+",
        help="of these alone: precisions, fp32 among them, which ratios are to; for profiles BACKEND:PRECISION",
    )
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument(
        "--in-turn",
        nargs="?",
        const="first",
        choices=STEPS,
        help="open each arm anew for each block, and time its first step, for arms that don't fit in memory together; or later ones",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nncf-python", help="python of an environment with NNCF")
    options = parser.parse_args()
    if options.blocks < 2:  # noqa: PLR2004 - or there is no interval
        parser.error(f"got --blocks {options.blocks}, expected at least 2: intervals are over blocks")
    record = json.loads(options.record.read_text()) if options.record.exists() else {}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        work = (options.work if options.keep else Path(temporary)).resolve()
        found = record.setdefault(options.model, {"groups": {}, "profiles": {}})
        record["command"] = "make bench-precisions"
        for name in options.only:
            recorded = _recorded_as(name)
            if name == "profiles":
                for _ in _profile(found["profiles"], work, options):
                    options.record.write_text(json.dumps(record, indent=1) + "\n")
            elif options.again or recorded not in found["groups"]:
                found["groups"][recorded] = _compare(*GROUPS[name], work, options)
            options.record.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), record))


def _recorded_as(name: str) -> str:
    """Return what a group or a profile is recorded as: apart by how processors multiply bytes."""
    if has_instructions("amx_int8"):
        return f"{name} (AMX)"
    return f"{name} (no VNNI)" if overflows_bytes() else name


def _compare(backend: str, precisions: list[str], work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make, open and interleave a group's arms; return its rows and how busy the machine was meanwhile."""
    folder = source(options.model, work)
    wanted = [each for each in precisions if _is_possible(each, options) and (not options.arms or each in options.arms)]
    arms = {each: Arm.read(backend, each) for each in wanted}
    made = {each: _attempt(arm, folder, work, options) for each, arm in tqdm(arms.items(), desc="exports")}
    expected = _expected(folder, work, options)

    def opened(name: str) -> Resident:
        return Resident(arms[name], folder, work, options.model, options.threads)

    able = [name for name in arms if "refused" not in made[name]]
    before = psutil.cpu_times()
    taken = _in_turn(able, opened, options) if options.in_turn else _together(able, opened, options.blocks)
    after = psutil.cpu_times()
    seconds = {name: [[each] for each in arm.seconds] for name, arm in taken.items()}
    fp32, bf16 = (_first(seconds, precision) for precision in ("fp32", "bf16"))
    rows = {
        name: {
            **made[name],
            **arm.opened,
            "sqnr_db": round(
                -20 * float(np.log10(max(relative_error(_tensor(arm.output), _tensor(expected)), 1e-9))), 1
            ),
            "step_peak_anon_bytes": arm.peak_anon_bytes,
            "median_s": round(float(np.median(arm.seconds)), 2),
            "seconds": [round(each, 3) for each in arm.seconds],
            "to_fp32": _interval(fp32, seconds[name]),
            "to_bf16": _interval(bf16, seconds[name]),
            "to_nncf": _interval(seconds.get(f"nncf-{name}"), seconds[name]),
            "to_plain_nncf": _interval(seconds.get(f"{PLAIN}nncf-{name}"), seconds[name]),
        }
        for name, arm in taken.items()
    }
    return {
        "arms": made | rows,
        "blocks": options.blocks,
        "in_turn": options.in_turn,
        "threads": options.threads,
        "machine": describe(),
        "machine_time": _shares(before, after),
    }


def _is_possible(precision: str, options: argparse.Namespace) -> bool:
    return "nncf" not in precision or bool(options.nncf_python)


def _attempt(arm: Arm, folder: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make an arm; of another tool's that fails, return what it said."""
    try:
        return make(arm, folder, work, options.nncf_python)
    except Exception as error:
        if arm.precision == arm.opened_as:
            raise
        return {"refused": str(error).strip().splitlines()[-1][:300]}


def _expected(folder: Path, work: Path, options: argparse.Namespace) -> Any:  # noqa: ANN401 - a numpy array
    """Return what eager float32 predicts, and keep it beside the weights."""
    file = work / f"{folder.name}-expected.npy"
    if not file.exists():
        make(REFERENCE, folder, work, None)
        reference = Resident(REFERENCE, folder, work, options.model, options.threads)
        np.save(file, reference.output)
        reference.close()
    return np.load(file)


@dataclass
class Taken:
    """What an arm's steps took."""

    opened: dict[str, Any]
    output: NDArray[np.float32]
    seconds: list[float] = field(default_factory=list)
    peak_anon_bytes: int = 0

    def add(self, seconds: float, peak_anon_bytes: int) -> None:
        self.seconds.append(seconds)
        self.peak_anon_bytes = max(self.peak_anon_bytes, peak_anon_bytes)


def _together(names: list[str], opened: Callable[[str], Resident], blocks: int) -> dict[str, Taken]:
    """Open all arms and keep them open; a block has a step of each."""
    arms: dict[str, Resident] = {}
    for name in names:
        largest = max((arm.opened["opened_anon_bytes"] for arm in arms.values()), default=0)
        if largest > available_bytes():
            told = f"{len(arms)} arms are open, and one like the largest ({largest / 1e9:.1f} GB) wouldn't fit any more"
            message = f"{told}: name fewer with --arms, or open each for its step alone with --in-turn"
            raise SystemExit(message)
        arms[name] = opened(name)
    taken = {name: Taken(arm.opened, arm.output) for name, arm in arms.items()}
    for name in _order(names, blocks):
        taken[name].add(*arms[name].step())
    for arm in arms.values():
        arm.close()
    return taken


def _in_turn(names: list[str], opened: Callable[[str], Resident], options: argparse.Namespace) -> dict[str, Taken]:
    """Open each arm anew in each block: of models of which two don't fit, or where processes differ."""
    taken: dict[str, Taken] = {}
    for name in _order(names, options.blocks):
        arm = opened(name)
        steps = [arm.first, *(arm.step() for _ in range(STEPS[options.in_turn]))]
        arm.close()
        timed = steps[1:] or steps
        of_arm = taken.setdefault(name, Taken(arm.opened, arm.output))
        of_arm.add(median(seconds for seconds, _ in timed), max(peak for _, peak in steps))
    return {name: taken[name] for name in names}


def _order(names: list[str], blocks: int) -> Iterator[str]:
    """Return the names once a block, in another order each, behind a progress bar."""
    order = random.Random(0)  # noqa: S311 - a seeded order, no secrets
    steps = [name for _ in range(blocks) for name in order.sample(names, len(names))]
    return iter(tqdm(steps, desc="steps"))


def _shares(before: Any, after: Any) -> dict[str, float]:  # noqa: ANN401 - psutil's times
    """Return how all cores' time was spent between two readings: by us and others, and stolen by other machines."""
    spent = {name: getattr(after, name) - getattr(before, name) for name in ("user", "nice", "system", "idle", "steal")}
    whole = sum(spent.values())
    return {"busy": round(1 - (spent["idle"] + spent["steal"]) / whole, 3), "stolen": round(spent["steal"] / whole, 3)}


def _first(seconds: dict[str, list[list[float]]], precision: str) -> list[list[float]] | None:
    """Return the seconds of the first arm of a precision, with whatever options; None where there is none."""
    return next((each for name, each in seconds.items() if name.partition("+")[0] == precision), None)


def _interval(baseline: list[list[float]] | None, arm: list[list[float]]) -> dict[str, float] | None:
    if baseline is None or arm is baseline:
        return None
    found = paired_ratio(baseline, arm)
    return {"middle": round(found.ratio, 3), "low": round(found.low, 3), "high": round(found.high, 3)}


def _tensor(values: Any) -> Any:  # noqa: ANN401 - numpy in, torch out
    import torch

    return torch.from_numpy(values)


def _profile(found: dict[str, Any], work: Path, options: argparse.Namespace) -> Iterator[str]:
    """Profile a step of each arm of `PROFILED` that can be made here, and yield its name."""
    folder = source(options.model, work)
    file = work / f"{folder.name}-step.npz"
    given = inputs(folder, SIZES[options.model], 7, 501.0)
    np.savez(file, **{name: tensor.numpy() for name, tensor in given.items()})
    for name in PROFILED:
        arm, recorded = Arm.read(*name.split(":")), _recorded_as(name)
        wanted = (options.again or recorded not in found) and (not options.arms or name in options.arms)
        if not wanted or not _is_possible(arm.precision, options):
            continue
        make(arm, folder, work, options.nncf_python)
        arguments = {"folder": str(arm.folder(folder, work)), "inputs": str(file)}
        arguments |= {"threads": options.threads, "arm": asdict(arm)}
        made, _ = in_child(f"node_profile:{arm.backend}_here", arguments, extra_path=str(HERE))
        found[recorded] = {"machine": describe(), **made}
        yield name


if __name__ == "__main__":
    main()
