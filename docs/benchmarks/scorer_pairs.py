"""What rounding costs in meaning: `python scorer_pairs.py BENCH_FOLDER RECORD.json`.

Reads the pictures that `bakeoff bench` left in its folder: arms that are artifact folders, on `shapes-1024`, same prompts
and latents. Per arm: the share of pictures that show all of their prompt, the paired difference to the baseline in points
with its 95 % interval over prompts, PSNR, which words are got wrong that the baseline got right, each prompt's score as a digit, and
the artifact's key; and the machine, when it was, and the experiment's hash.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bakeoff.models.prompts import prompt_set
from bakeoff.models.scorer import score
from bakeoff.pictures import psnr
from bakeoff.verdict import mean_interval

PROMPTS = "shapes-1024"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the bench, beside its experiment's .toml file")
    parser.add_argument("record", type=Path)
    options = parser.parse_args()
    declared = tomllib.loads(options.folder.with_suffix(".toml").read_text())
    drawn_with = json.loads((options.folder / "record.json").read_text())
    prompts = [prompt.text for prompt in prompt_set(PROMPTS)][: declared["quality_prompts"]]
    pictures = {arm: np.load(_pictures(options.folder, arm)) for arm in declared["arms"]}
    baseline = declared["baseline"]
    scores = {
        arm: [score(prompt, picture) for prompt, picture in tqdm(list(zip(prompts, drawn, strict=True)), desc=arm)]
        for arm, drawn in pictures.items()
    }
    record = {
        "prompts": f"{PROMPTS}, {len(prompts)} of them",
        "steps": declared["steps"],
        "baseline": baseline,
        **{name: drawn_with[name] for name in ("started", "machine", "hash")},
        "arms": {
            arm: {"key": drawn_with["arms"][arm]["artifact"]["key"], **_figures(arm, baseline, scores, pictures)}
            for arm in pictures
        },
    }
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def _pictures(folder: Path, arm: str) -> Path:
    return next(file for file in (folder / "pictures").glob(f"{arm}-??????.npy") if "steps" not in file.name)


def _figures(arm: str, baseline: str, scores: dict[str, list[Any]], pictures: dict[str, Any]) -> dict[str, Any]:
    right = {name: [100.0 * each.right for each in scores[name]] for name in (arm, baseline)}
    found: dict[str, Any] = {"right": round(float(np.mean(right[arm])), 2)}
    found["scores"] = "".join("1" if each.right else "0" for each in scores[arm])
    if arm != baseline:
        mean, low, high = mean_interval(list(np.subtract(right[arm], right[baseline])))
        distances = [psnr(a, b) for a, b in zip(pictures[baseline], pictures[arm], strict=True)]
        lost = [
            mine for mine, theirs in zip(scores[arm], scores[baseline], strict=True) if theirs.right and not mine.right
        ]
        found |= {
            "points": {"mean": round(mean, 2), "low": round(low, 2), "high": round(high, 2)},
            "psnr_db": {"median": round(float(np.median(distances)), 1), "least": round(float(np.min(distances)), 1)},
            "lost": dict(Counter(name for each in lost for name, holds in asdict(each).items() if not holds)),
        }
    return found


if __name__ == "__main__":
    main()
