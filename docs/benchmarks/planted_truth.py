"""Simulate experiments of known truth and say how often the verdicts are right: `python planted_truth.py RECORD.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bakeoff.bench.simulation import outcomes

EXPERIMENTS = 10_000
RATIOS = (1.0, 1.02, 1.05, 1.10, 2.0)


def main() -> None:
    cases = [(ratio, blocks, stalls) for stalls in (False, True) for blocks in (5, 10) for ratio in RATIOS]
    rows = [_row(*case) for case in tqdm(cases, desc="cases")]
    record = {"command": "make bench-statistics", "experiments": EXPERIMENTS, "seed": 0, "rows": rows}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


def _row(ratio: float, blocks: int, stalls: bool) -> dict[str, Any]:  # noqa: FBT001 - a column of the table
    found = outcomes(ratio, blocks, experiments=EXPERIMENTS, stalls=stalls)
    covered = [each.ratio.low <= ratio <= each.ratio.high for each in found]
    words = {word: sum(each.word == word for each in found) / EXPERIMENTS for word in ("faster", "slower")}
    return {"ratio": ratio, "blocks": blocks, "stalls": stalls, "covered": sum(covered) / EXPERIMENTS, **words}


main()
