"""Measure what the engine costs: `python engine_overhead.py RECORD.json`; cases that the record already has are kept.

The bench times the engine and `direct_loop.py` on the same folder, in workers that stay alive: many short blocks see a
difference of 1 % on a machine whose repetitions lie 5 % apart. Milliseconds a step are those of a whole picture over
its steps, so that what the engine does once a picture is in them. `within` says that the upper end of the ratio's 95 %
interval is at most 1.01, or that of the difference's at most 0.5 ms a step: the engine may cost the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import bakeoff
from bakeoff.bench.experiment import Arm, Experiment
from bakeoff.bench.runner import run
from bakeoff.hardware import describe
from bakeoff.pictures import SAME_DB
from bakeoff.reports.record import AGAIN
from bakeoff.reports.summary import summarize
from bakeoff.verdict import mean_interval, paired_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MOST_SHARE = 0.01
MOST_MS_A_STEP = 0.5
DIRECT = Path(__file__).with_name("direct_loop.py")
SHAPES = Path(bakeoff.__file__).parent / "models" / "shapes"
SMALL = {
    "model": "shapes",
    "steps": 20,
    "guidance_scale": 3.0,
    "blocks": 120,
    "repetitions": 3,
    "warmups": 0,
    "quality_prompts": 4,
    "resident": True,
}
LARGE = {
    "steps": 2,
    "guidance_scale": 3.0,
    "blocks": 40,
    "repetitions": 1,
    "warmups": 0,
    "quality_prompts": 2,
    "timed_prompts": 2,
    "resident": True,
}


@dataclass(frozen=True)
class Case:
    """How the folder that both arms open is made, in an empty folder, and the fields of the experiment."""

    make: Callable[[Path], Path]
    fields: Mapping[str, Any]


def bake_shapes(recipe: str, work: Path) -> Path:
    parsed, _ = bakeoff.parse(recipe)
    bakeoff.export("shapes", work / "artifact", parsed)
    return work / "artifact"


def write_large(work: Path) -> Path:
    """Write a pipeline with SD 1.5's UNet at 32x32 latents, a text encoder of its width, and the rest of `shapes`."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from bakeoff.models.fullsize import SD15_UNET, write_module

    folder = work / "model"
    shutil.copytree(SHAPES, folder, ignore=shutil.ignore_patterns("unet", "text_encoder", "training.json"))
    write_module({**SD15_UNET, "sample_size": 32}, folder / "unet")
    width = SD15_UNET["cross_attention_dim"]
    config = CLIPTextConfig.from_pretrained(
        SHAPES / "text_encoder", hidden_size=width, intermediate_size=4 * width, num_attention_heads=12
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


CASES = {
    **{
        f"shapes, {backend}:fp32": Case(partial(bake_shapes, f"{backend}:fp32"), SMALL)
        for backend in ("torch", "onnx", "openvino")
    },
    "SD 1.5-size UNet, torch:fp32": Case(write_large, LARGE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--work", type=Path, help="folder for artifacts and runs; a temporary one by default")
    options = parser.parse_args()
    rows = json.loads(options.record.read_text())["rows"] if options.record.exists() else {}
    for name, case in CASES.items():
        if name not in rows:
            with tempfile.TemporaryDirectory(dir=options.work) as work:
                rows[name] = measure(case, Path(work), partial(_progress, name))
            record = {"machine": describe(), "command": "make bench-engine", "rows": rows}
            options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def _progress(name: str, line: str, done: int, total: int) -> None:
    print(f"{name} [{done}/{total}]: {line}", file=sys.stderr, flush=True)


def measure(case: Case, work: Path, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run a case's experiment and return its row."""
    folder = str(case.make(work))
    arms = (Arm("engine", folder=folder), Arm("direct", adapter=str(DIRECT), options={"folder": folder}))
    fields = {"model": folder, **case.fields}
    record = run(Experiment(arms=arms, baseline="engine", reference="direct", **fields), work / "run", progress)
    failures = [row.failure for row in summarize(record).rows if row.failure]
    if failures:
        raise SystemExit("; ".join(failures))
    return {**case.fields, **_costs(record), **_conditions(record)}


def _costs(record: dict[str, Any]) -> dict[str, Any]:
    """Compare the engine with the loop, and with itself."""
    steps = record["experiment"]["steps"]
    engine, direct, again = ([run["samples_s"] for run in _runs(record, arm)] for arm in ("engine", "direct", AGAIN))
    ratio, floor = paired_ratio(direct, engine), paired_ratio(engine, again)
    ms_a_step = [1000 * np.median(blocks, axis=1) / steps for blocks in (engine, direct)]
    more = mean_interval(ms_a_step[0] - ms_a_step[1])
    return {
        "direct_ms_a_step": round(float(np.median(ms_a_step[1])), 3),
        "ratio": _interval(ratio.ratio, ratio.low, ratio.high),
        "more_ms_a_step": _interval(*more),
        "within": ratio.high <= 1 + MOST_SHARE or more[2] <= MOST_MS_A_STEP,
        "engine_against_itself": _interval(floor.ratio, floor.low, floor.high),
    }


def _conditions(record: dict[str, Any]) -> dict[str, Any]:
    """Say whether both did the same work, and what measuring itself cost."""
    entry = record["arms"]["engine"]["entries"]["engine"]
    runs = [run for arm in ("engine", "direct") for run in _runs(record, arm)]
    return {
        "pictures_identical": min(entry["quality"]["figures"]["psnr_db"]) == SAME_DB,
        "most_parent_cores": max(run["guard"]["parent_cores"] for run in runs),
        "disturbed_runs": sum(bool(run["guard"]["tainted"]) for run in runs),
        "stage_pass_overhead": round(entry["stages"]["overhead"], 4),
    }


def _runs(record: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    return [block["runs"][arm] for block in record["blocks"]]


def _interval(middle: float, low: float, high: float) -> dict[str, float]:
    return {"middle": round(middle, 5), "low": round(low, 5), "high": round(high, 5)}


if __name__ == "__main__":
    main()
