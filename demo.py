"""The demo: bake the embedded model for each backend, show its pictures side by side, then hold a short bake-off."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from .memory import in_child
from .pictures import decibels, psnr
from .recipe import parse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from .artifact import Artifact

    Pictures = NDArray[np.uint8]

RECIPES = ("torch:fp32", "onnx:fp32", "openvino:fp32")
"""Whose pictures should be the same."""
BENCHED = (*RECIPES, "torch:bf16", "openvino:bf16")
"""Every arm for a CPU."""
PROMPTS = (
    "a large red star on a white background",
    "a small blue circle left of a large yellow square on a gray background",
    "a large green ring above a small purple triangle on a black background",
    "a large cyan triangle right of a large red ring on a white background",
    "a large yellow star below a small blue circle on a gray background",
    "a large purple square right of a small green star on a black background",
)
"""Every shape, relation and background; how often the model draws what it is told is in docs/embedded-model.md."""
SEED = 7
STEPS = 20
GUIDANCE = 3.0
_SCALE = 3
_LABEL_HEIGHT = 18
_CAPTION_WIDTH = 250


def bake(folder: Path, progress: Callable[[str], None]) -> dict[str, Artifact]:
    """Export every arm for a CPU into `folder`; return the artifacts by recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    return {recipe: _export(folder, recipe, progress) for recipe in BENCHED}


def run(folder: Path, artifacts: dict[str, Artifact], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Generate and compare; write `contact-sheet.png` and `demo.json` into `folder`; return the table's rows."""
    import numpy as np

    rows, columns = [], []
    for recipe in RECIPES:
        artifact = artifacts[recipe]
        target = artifact.folder
        progress(f"generating with {recipe}")
        pictures = folder / f"{target.name}.npy"
        arguments = {"artifact": str(target), "pictures": str(pictures)}
        measured, peak = in_child("bakeoff.demo:generate_here", arguments)
        columns.append(np.load(pictures))
        rows.append(
            {
                "recipe": recipe,
                "sqnr_db": _worst_sqnr(artifact),
                "psnr_db": [psnr(columns[0][i], columns[-1][i]) for i in range(len(PROMPTS))],
                "seconds": measured,
                "peak_anon_bytes": peak.anon_bytes,
                "peak_rss_bytes": peak.rss_bytes,
            }
        )
        pictures.unlink()
    _contact_sheet(columns).save(folder / "contact-sheet.png")
    (folder / "demo.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _export(folder: Path, recipe: str, progress: Callable[[str], None]) -> Artifact:
    from .bake import export

    progress(f"exporting {recipe}")
    target = folder / recipe.replace(":", "-")
    return export("shapes", target, parse(recipe)[0], progress=progress, force=_outdated(target, recipe))


def bench(folder: Path, artifacts: dict[str, Artifact]) -> list[str]:
    """Compare every arm for a CPU in a short experiment, from nothing; write its report; return the verdict."""
    import shutil

    from .bench.display import Display
    from .bench.experiment import Arm, Experiment
    from .bench.runner import run
    from .reports.command import write
    from .reports.summary import summarize

    arms = tuple(Arm(recipe, folder=str(artifact.folder)) for recipe, artifact in artifacts.items())
    output = folder / "bench"
    if output.exists():
        shutil.rmtree(output)
    declared = Experiment(
        "shapes",
        arms,
        baseline=arms[0].name,
        reference=arms[0].name,
        timed_prompts=4,
        quality_prompts=8,
        steps=4,
        guidance_scale=GUIDANCE,
        blocks=2,
        repetitions=3,
        resident=True,
    )
    with Display() as display:
        record = run(declared, output, display)
    summary = summarize(record)
    write(summary, output, output)
    return summary.headline()


def _outdated(target: Path, recipe: str) -> bool:
    from .artifact import Artifact
    from .plan import plan

    return target.exists() and Artifact.open(target).manifest.key != plan("shapes", parse(recipe)[0]).key


def generate_here(artifact: str, pictures: str) -> dict[str, float]:
    """Load an artifact, make the pictures, save them; return seconds. Runs in a child of `run`."""
    import numpy as np

    from .runtimes.engine import load

    started = time.perf_counter()
    with load(artifact, device="cpu") as engine:
        engine.generate(PROMPTS[0], seeds=SEED, steps=1)
        loaded = time.perf_counter() - started
        result = engine.generate(PROMPTS, seeds=SEED, steps=STEPS, guidance_scale=GUIDANCE)
    np.save(pictures, result.images)
    return {"load and first step": loaded, **result.seconds}


def _worst_sqnr(artifact: Artifact) -> dict[str, float]:
    parts = artifact.manifest.proof.get("parts", {})
    return {name: min(case["sqnr_db"] for case in part["cases"]) for name, part in parts.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Render the rows as a Markdown table."""
    parts = list(rows[0]["sqnr_db"])
    heads = [
        "recipe",
        *(f"{part} SQNR" for part in parts),
        "picture PSNR, worst",
        "seconds a picture",
        "of it UNet",
        "peak memory",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        seconds = row["seconds"]
        cells = [
            row["recipe"],
            *(decibels(row["sqnr_db"][part], 0) for part in parts),
            decibels(min(row["psnr_db"]), 0) if row is not rows[0] else "reference",
            f"{seconds['total'] / len(PROMPTS):.2f}",
            f"{seconds['unet'] / len(PROMPTS):.2f}",
            f"{row['peak_anon_bytes'] / 1e6:.0f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _contact_sheet(columns: list[Pictures]) -> Any:  # noqa: ANN401 - a PIL image
    """Lay out rows of prompts and columns of recipes."""
    from PIL import Image, ImageDraw, ImageFont

    side = columns[0].shape[1] * _SCALE
    pad = 6
    width = _CAPTION_WIDTH + len(columns) * (side + pad) + pad
    height = _LABEL_HEIGHT + len(PROMPTS) * (side + pad) + pad
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for column, (recipe, pictures) in enumerate(zip(RECIPES, columns, strict=True)):
        x = _CAPTION_WIDTH + column * (side + pad)
        draw.text((x + side / 2, _LABEL_HEIGHT / 2), recipe, fill="black", font=font, anchor="mm")
        for row, picture in enumerate(pictures):
            y = _LABEL_HEIGHT + row * (side + pad)
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
    for row, prompt in enumerate(PROMPTS):
        y = _LABEL_HEIGHT + row * (side + pad) + side / 2
        draw.text((pad, y), _wrap(prompt), fill="black", font=font, anchor="lm", spacing=4)
    return sheet


def _wrap(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 36))
