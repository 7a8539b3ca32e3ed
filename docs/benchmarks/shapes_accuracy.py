"""Measure how often `shapes` draws what its prompt says: `python shapes_accuracy.py RECORD.json`.

All of the held-out prompts at the model's usual steps and guidance, torch fp32; then a part of them over steps and
guidance, where rows that the record already has are kept, as long as model and scorer are the same. Draws the plots, the
first 64 prompts' pictures, and those that are wrong.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import bakeoff
from bakeoff.hardware import describe
from bakeoff.models.prompts import Prompt, prompt_set
from bakeoff.models.scorer import ATTRIBUTES, score, scorer_hash
from bakeoff.weights import sha256

PROMPTS = "shapes-256"
STEPS, GUIDANCE = 20, 3.0
SWEPT_STEPS = (1, 2, 4, 8, 12, 20, 35, 50)
SWEPT_GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
SWEPT_PROMPTS = 64
SEED = 1000
MODEL = Path(bakeoff.__file__).parent / "models" / "shapes"
_SHEET = 8
_CELL, _TEXT = 128, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    record_file = parser.parse_args().record
    docs = record_file.parent.parent
    record = _open(record_file)
    with bakeoff.load(MODEL, device="cpu") as engine:
        pictures = _draw(engine, STEPS, GUIDANCE, len(prompt_set(PROMPTS)))
        record["rows"] = {_name(STEPS, GUIDANCE, len(pictures)): _row(STEPS, GUIDANCE, pictures), **record["rows"]}
        for steps, guidance in _swept():
            name = _name(steps, guidance, SWEPT_PROMPTS)
            if name not in record["rows"]:
                record["rows"][name] = _row(steps, guidance, _draw(engine, steps, guidance, SWEPT_PROMPTS))
                record_file.write_text(json.dumps(record, indent=1) + "\n")
                print(name, record["rows"][name]["right"])
    judged = [
        (prompt, picture, score(prompt.text, picture).right)
        for prompt, picture in zip(prompt_set(PROMPTS), pictures, strict=True)
    ]
    record_file.write_text(json.dumps(record, indent=1) + "\n")
    _sheet(judged[: _SHEET**2]).save(docs / "shapes-held-out.png")
    _sheet([each for each in judged if not each[2]][: _SHEET * 2]).save(docs / "shapes-failures.png")
    _plot(record, docs / "shapes-accuracy.png")
    _plot_training(docs / "shapes-training.png")


def _open(file: Path) -> dict[str, Any]:
    """Return the record to go on with: empty, if it is of another model or scorer."""
    weights = {str(path.relative_to(MODEL)): sha256(path) for path in sorted(MODEL.rglob("*.safetensors"))}
    head = {
        "command": "make bench-shapes",
        "weights": weights,
        "scorer": scorer_hash(),
        "prompts": PROMPTS,
        "seeds": f"{SEED} + number of the prompt",
        "recipe": "torch:fp32",
        "scheduler": "as stored (DDIM)",
    }
    old = json.loads(file.read_text()) if file.exists() else {}
    same = all(old.get(key) == value for key, value in head.items())
    return head | {"machine": describe(), "rows": old["rows"] if same else {}}


def _name(steps: int, guidance: float, count: int) -> str:
    return f"steps {steps}, guidance {guidance:g}, {count} prompts"


def _swept() -> list[tuple[int, float]]:
    others = [guidance for guidance in SWEPT_GUIDANCE if guidance != GUIDANCE]
    return [*((steps, GUIDANCE) for steps in SWEPT_STEPS), *((STEPS, guidance) for guidance in others)]


def _draw(engine: bakeoff.Engine, steps: int, guidance: float, count: int) -> np.ndarray:
    texts = [prompt.text for prompt in prompt_set(PROMPTS)[:count]]
    return engine.generate(texts, seeds=SEED, steps=steps, guidance_scale=guidance, max_batch=16).images


def _row(steps: int, guidance: float, pictures: np.ndarray) -> dict[str, Any]:
    prompts = prompt_set(PROMPTS)[: len(pictures)]
    verdicts = [score(prompt.text, picture) for prompt, picture in zip(prompts, pictures, strict=True)]
    return {
        "steps": steps,
        "guidance_scale": guidance,
        "right": round(float(np.mean([verdict.right for verdict in verdicts])), 4),
        "attributes": {
            name: round(float(np.mean([getattr(verdict, name) for verdict in verdicts])), 4) for name in ATTRIBUTES
        },
        "wrong": [prompt.id for prompt, verdict in zip(prompts, verdicts, strict=True) if not verdict.right],
    }


def _sheet(judged: list[tuple[Prompt, np.ndarray, bool]]) -> Image.Image:
    """Lay out prompts with their pictures, framed green where right and red where not."""
    rows = max(-(-len(judged) // _SHEET), 1)
    sheet = Image.new("RGB", (_SHEET * (_CELL + 12), rows * (_CELL + _TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for number, (prompt, picture, right) in enumerate(judged):
        x, y = number % _SHEET * (_CELL + 12) + 6, number // _SHEET * (_CELL + _TEXT) + 4
        draw.rectangle((x - 3, y - 3, x + _CELL + 2, y + _CELL + 2), fill="green" if right else "red")
        sheet.paste(Image.fromarray(picture).resize((_CELL, _CELL), Image.Resampling.NEAREST), (x, y))
        draw.text(
            (x, y + _CELL + 4), textwrap.fill(prompt.text.removesuffix(" background"), 27), fill="black", font=font
        )
    return sheet


def _plot(record: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for name, row in record["rows"].items() if name.endswith(f" {SWEPT_PROMPTS} prompts")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, field, values in ((left, "steps", SWEPT_STEPS), (right, "guidance_scale", SWEPT_GUIDANCE)):
        other, fixed = ("guidance_scale", GUIDANCE) if field == "steps" else ("steps", STEPS)
        chosen = sorted((row for row in rows if row[other] == fixed), key=lambda row: row[field])
        for name in ATTRIBUTES:
            axis.plot(values, [row["attributes"][name] for row in chosen], lw=1, alpha=0.7, label=name)
        axis.plot(values, [row["right"] for row in chosen], "k.-", lw=2, label="all right")
        axis.set_xlabel(field.replace("_", " "))
        axis.grid(alpha=0.3)
    left.set_xscale("log")
    left.set_xticks(SWEPT_STEPS, map(str, SWEPT_STEPS))
    left.set_ylabel(f"share of {SWEPT_PROMPTS} held-out prompts")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _plot_training(file: Path) -> None:
    """Plot each stage's loss over its steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    stages = json.loads((MODEL / "training.json").read_text())["stages"]
    figure, axes = plt.subplots(1, len(stages), figsize=(10, 2.8))
    for axis, (name, stage) in zip(axes, stages.items(), strict=True):
        axis.plot(*zip(*stage["curve"], strict=True))
        axis.set_yscale("log")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("smoothed loss")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
