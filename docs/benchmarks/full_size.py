"""Export pipelines of real models' sizes: memory, disk and time as predicted and as measured, and one denoising step.

`python full_size.py RECORD.json [--work DIR] [--only MODEL …] [--recipe RECIPE …]`; rows that the record has are kept,
and the table of `docs/exports.md` is written anew.
Weights are random bfloat16, built on the spot. Each export runs in a child process whose anonymous memory its parent
samples every 10 ms; so does the step, in another. `--holes` has sparse files for weights: an ONNX or torch export in
their dtype links them and reads them for their hashes alone, so only these seconds are fewer; no step is run then.
`--predict` only renews the predictions, from headers of sparse files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bakeoff.bake import export
from bakeoff.components.component import Sizes
from bakeoff.errors import ResourceError
from bakeoff.hardware import describe
from bakeoff.memory import available_bytes, in_child
from bakeoff.models import fullsize
from bakeoff.plan import plan
from bakeoff.recipe import Placement, parse

HERE = str(Path(__file__).parent)
MODELS = ("sdxl", "sd-3.5-medium", "z-image", "sd-3.5-large", "flux.1-dev")
RECIPES = ("torch:bf16", "onnx:bf16", "openvino:bf16", "openvino:int8")
STEP = Sizes(batch=1, height=64, width=64, sequence=77)
"""512 pixels a side."""
DENOISERS = ("unet", "transformer")
PAGE = Path(__file__).parent.parent / "exports.md"
BEGIN, END = "<!-- table: make bench-full-size -->", "<!-- end of table -->"


def export_here(source: str, output: str, recipe: str) -> dict[str, Any]:
    """Export in this process; return the seconds of each part."""
    started = time.perf_counter()
    marks: list[tuple[str, float]] = []

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if line.startswith("["):
            marks.append((line.partition("] ")[2].partition(":")[0], time.perf_counter()))

    with tempfile.TemporaryDirectory() as home:  # no graph of an earlier export
        os.environ["BAKEOFF_HOME"] = home
        export(source, output, parse(recipe)[0], prove=False, progress=say)
    ended = time.perf_counter()
    ends = [begin for _, begin in marks[1:]] + [ended]
    parts = {name: round(end - begin, 1) for (name, begin), end in zip(marks, ends, strict=True)}
    return {"seconds": round(ended - started, 1), "cpu_seconds": round(time.process_time(), 1), "parts": parts}


def step_here(output: str, offload: str) -> dict[str, Any]:
    """Open the denoiser in this process and run it once."""
    import torch

    from bakeoff.runtimes.opening import open_part, read_folder

    baked = read_folder(Path(output))
    part = next(part for part in baked.family.parts if part.name in DENOISERS)
    config = baked.config(part.module)
    inputs = part.component.example(config, part.component.limit(config, STEP), seed=0)
    started = time.perf_counter()
    placement = Placement(device="cpu", offload=offload)
    with open_part(baked.folders[part.name], part, baked.parts[part.name], placement) as runtime:
        opened = time.perf_counter()
        fed = {
            port.name: inputs[port.name].to(getattr(torch, port.dtype)).reshape([1] * port.rank)
            if inputs[port.name].ndim == 0
            else inputs[port.name]
            for port in runtime.inputs
        }
        outputs = runtime.run(fed)
        ended = time.perf_counter()
    finite = all(bool(tensor.isfinite().all()) for tensor in outputs.values())
    return {"open_seconds": round(opened - started, 1), "step_seconds": round(ended - opened, 1), "finite": finite}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--work", type=Path, help="folder for weights and exports; a temporary one by default")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--recipe", nargs="+", default=RECIPES)
    parser.add_argument("--holes", action="store_true")
    parser.add_argument("--predict", action="store_true")
    options = parser.parse_args()
    rows = json.loads(options.record.read_text())["rows"] if options.record.exists() else []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for model in options.only:
            left = [
                recipe for recipe in options.recipe if (model, recipe) not in {(r["model"], r["recipe"]) for r in rows}
            ]
            source = Path(work) / model
            if options.predict or left:
                fullsize.build(model, source, hollow=options.predict or options.holes)
            for row in rows:
                if options.predict and row["model"] == model:
                    row["predicted"] = _predict(source, row["recipe"], Path(work))
            for recipe in [] if options.predict else left:
                rows.append(_measure(model, source, recipe, holes=options.holes))
                _write(options.record, rows)
            shutil.rmtree(source, ignore_errors=True)
    _write(options.record, rows)
    PAGE.write_text(with_table(PAGE.read_text(), rows))


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """Return the page with its table made anew: predicted and measured, side by side."""
    lines = [
        "| model | weights | recipe | peak anonymous memory, GB | written, GB | CPU seconds | one step of the denoiser |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "refused" in row:
            lines.append(
                f"| {row['model']} | {row['source_bytes'] / 1e9:.1f} GB | {row['recipe']} | refused: {row['refused']} | | | |"
            )
            continue
        predicted, measured, step = row["predicted"], row["measured"], row["step"]
        done = step.get("skipped") or (
            f"{step['step_seconds']:.0f} s after {step['open_seconds']:.0f} s to open, {step['peak_anon_bytes'] / 1e9:.1f} GB"
            + (", weights mapped" if step.get("offload") == "mapped" else "")
        )
        lines.append(
            f"| {row['model']} | {row['source_bytes'] / 1e9:.1f} GB | {row['recipe']} "
            f"| {predicted['peak_anon_bytes'] / 1e9:.2f} → **{measured['peak_anon_bytes'] / 1e9:.2f}** "
            f"| {predicted['disk_bytes'] / 1e9:.2f} → **{measured['disk_bytes'] / 1e9:.2f}** "
            f"| {predicted['seconds']:.0f} → **{measured['cpu_seconds']:.0f}** | {done} |"
        )
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"])


def _write(record: Path, rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda row: (MODELS.index(row["model"]), RECIPES.index(row["recipe"])))
    content = {"machine": describe(), "command": "make bench-full-size", "rows": rows}
    record.write_text(json.dumps(content, indent=1) + "\n")


def _predict(source: Path, recipe: str, work: Path) -> dict[str, Any]:
    return plan(str(source), parse(recipe)[0]).forecast(work).as_dict()


def _measure(model: str, source: Path, recipe: str, *, holes: bool) -> dict[str, Any]:
    output = source.parent / "artifact"
    predicted = _predict(source, recipe, source.parent)
    arguments = {"source": str(source), "output": str(output), "recipe": recipe}
    row = {
        "model": model,
        "recipe": recipe,
        "source_bytes": sum(file.stat().st_size for file in source.rglob("*.safetensors")),
        "predicted": predicted,
    }
    try:
        made, peak = in_child("full_size:export_here", arguments, extra_path=HERE)
    except ResourceError as error:
        return {**row, "refused": error.message}
    row |= {
        "measured": {
            "peak_anon_bytes": peak.anon_bytes,
            "disk_bytes": sum(f.stat().st_size for f in output.rglob("*") if f.is_file() and f.stat().st_nlink == 1),
            "seconds": made["seconds"],
            "cpu_seconds": made["cpu_seconds"],
        },
        "part_seconds": made["parts"],
        "step": {"skipped": "its weights are holes"} if holes else _step(output, predicted),
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    shutil.rmtree(output)
    return row


def _step(output: Path, predicted: dict[str, Any]) -> dict[str, Any]:
    """Run one step if it fits, with mapped weights where it fits only so."""
    free = available_bytes()
    held, mapped = (
        max(size for name, size in predicted[kind].items() if name in DENOISERS)
        for kind in ("running_bytes", "mapped_bytes")
    )
    if min(held, mapped) > free:
        return {"skipped": f"would hold {held / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"}
    arguments = {"output": str(output), "offload": "none" if held <= free else "mapped"}
    step, peak = in_child("full_size:step_here", arguments, extra_path=HERE)
    return {**step, "offload": arguments["offload"], "peak_anon_bytes": peak.anon_bytes}


if __name__ == "__main__":
    main()
