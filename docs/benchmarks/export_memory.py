"""Measure what exports of full-size modules take: peak anonymous memory, seconds, bytes written.

`python export_memory.py RECORD.json`; rows that the record already has are kept. Weights are random, built on the spot.
Each export runs in a child process whose anonymous memory its parent samples every 10 ms; the proof runs in another.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bakeoff.hardware import describe
from bakeoff.memory import in_child, rss_bytes

CASES = {
    "SD 1.5 UNet (0.86 B parameters)": ("SD15_UNET", "unet_2d_condition:UNet2DCondition"),
    "SD 3.5 Large, 6 of 38 blocks": ("SD35_BLOCKS", "sd3_transformer_2d:SD3Transformer2D"),
}
EXPORTERS = {"onnx": "fp32", "openvino": "fp32", "openvino-bf16": "bf16"}


def lower_here(component: str, source: str, output: str, exporter: str, precision: str) -> dict[str, Any]:
    """Capture, lower and write one module in this process."""
    import importlib

    from bakeoff import plugins
    from bakeoff.exporters.capture import capture
    from bakeoff.exporters.exporter import Subject
    from bakeoff.weights import Checkpoint

    baseline = rss_bytes("RssAnon")
    started = time.perf_counter()
    module, _, name = component.partition(":")
    made = getattr(importlib.import_module(f"bakeoff.components.modules.{module}"), name)()
    folder = Path(source)
    config = json.loads((folder / "config.json").read_text())
    subject = Subject(
        part=made.name,
        precision=precision,
        inputs=made.inputs(config),
        outputs=made.outputs(config),
        source=folder,
        checkpoint=Checkpoint.open(folder),
        program=lambda: capture(made.name, made, config, folder, "float32"),
        weights="auto",
    )
    lowered = plugins.exporter(exporter).lower(subject, Path(output))
    return {"seconds": time.perf_counter() - started, "weights": lowered.weights, "anon_before_bytes": baseline}


def prove_here(component: str, source: str, output: str, exporter: str, precision: str) -> dict[str, Any]:
    """Run the lowered module and eager fp32 at the proof's shapes, each after the other."""
    import importlib

    import torch

    from bakeoff import parity, plugins
    from bakeoff.components.component import PROOF_SIZES
    from bakeoff.recipe import Placement
    from bakeoff.runtimes.runtime import PartFiles

    module, _, name = component.partition(":")
    made = getattr(importlib.import_module(f"bakeoff.components.modules.{module}"), name)()
    config = json.loads((Path(source) / "config.json").read_text())
    cases = [made.example(config, sizes, seed) for seed, sizes in enumerate(PROOF_SIZES)]
    flat = made.flat(made.load(Path(source), torch.float32))
    with torch.no_grad():
        expected = [flat(*case.values())[0] for case in cases]
    del flat
    port = made.outputs(config)[0].name
    files = PartFiles(made.name, Path(output), precision, made.inputs(config), made.outputs(config), lambda _: None)
    with plugins.runtime(exporter)(files, Placement(device="cpu")) as runtime:
        errors = [parity.relative_error(runtime.run(c)[port], e) for c, e in zip(cases, expected, strict=True)]
    return {"relative_errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--work", type=Path, help="folder for weights and exports; a temporary one by default")
    options = parser.parse_args()
    sys.path.append(str(Path(__file__).parent))
    rows = json.loads(options.record.read_text())["rows"] if options.record.exists() else []
    done = {(row["module"], row["exporter"]) for row in rows}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for title, (config, component) in CASES.items():
            left = {name: precision for name, precision in EXPORTERS.items() if (title, name) not in done}
            source = Path(work) / config
            if left:
                _build(config, source)
            for name, precision in left.items():
                rows.append(_measure(title, component, source, name, precision))
                record = {"machine": describe(), "command": "make bench-export", "rows": rows}
                options.record.write_text(json.dumps(record, indent=1) + "\n")
            shutil.rmtree(source, ignore_errors=True)
    print(json.dumps(rows, indent=1))


def _build(config: str, folder: Path) -> None:
    from bakeoff.models import fullsize

    fullsize.write_module(getattr(fullsize, config), folder)


def _measure(title: str, component: str, source: Path, name: str, precision: str) -> dict[str, Any]:
    output = source.parent / f"{source.name}-{name}"
    output.mkdir()
    arguments = {
        "component": component,
        "source": str(source),
        "output": str(output),
        "exporter": name.partition("-")[0],
        "precision": precision,
    }
    result, peak = in_child("export_memory:lower_here", arguments, extra_path=str(Path(__file__).parent))
    proof, proof_peak = in_child("export_memory:prove_here", arguments, extra_path=str(Path(__file__).parent))
    own = [f for f in output.iterdir() if f.stat().st_nlink == 1]
    weights = sum(f.stat().st_size for f in source.iterdir())
    row = {
        "module": title,
        "exporter": name,
        "weights_bytes": weights,
        "seconds": round(result["seconds"], 1),
        "peak_anon_bytes": peak.anon_bytes,
        "peak_rss_bytes": peak.rss_bytes,
        "written_bytes": sum(f.stat().st_size for f in own),
        "weights": result["weights"],
        "relative_errors": proof["relative_errors"],
        "proof_peak_anon_bytes": proof_peak.anon_bytes,
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    for file in output.iterdir():
        file.unlink()
    return row


if __name__ == "__main__":
    main()
