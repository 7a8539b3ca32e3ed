"""Write the table of `docs/families.md` from `families.json`, which `make families` records while it runs the tests.

`python families.py RECORD.json PAGE.md` replaces what stands between the page's two markers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table: make families -->", "<!-- end of table -->"
BACKENDS = ("torch", "onnx", "openvino")
LEAST_DB = 45.0


def table(record: dict[str, Any]) -> str:
    """Render a line a family and task: PSNR of the artifact's picture to Diffusers' own, in dB, by backend."""
    lines = [f"| pipeline | task | {' | '.join(BACKENDS)} |", "| --- | --- |" + " --- |" * len(BACKENDS)]
    for family, tasks in sorted(record.items()):
        for task, found in tasks.items():
            cells = " | ".join(_cell(found.get(backend)) for backend in BACKENDS)
            lines.append(f"| {family} | {task} | {cells} |")
    return "\n".join(lines)


def _cell(decibels: float | None) -> str:
    if decibels is None:
        return "not run"
    return f"{decibels:.0f} dB" if decibels >= LEAST_DB else f"**{decibels:.0f} dB: not the same picture**"


def with_table(page: str, record: dict[str, Any]) -> str:
    """Return the page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    options.page.write_text(with_table(options.page.read_text(), json.loads(options.record.read_text())))


if __name__ == "__main__":
    main()
