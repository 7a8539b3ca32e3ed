"""Hold what is predicted of a graph's activations against what ONNX Runtime takes: `python onnx_memory.py`.

Each graph runs in a child process, on one thread, without ONNX Runtime's arena: the peak of resident memory in the run,
over what was there before, in MB. What it takes beside activations is scratch memory of its kernels.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bakeoff.bake import export
from bakeoff.bench.worker import peak, reset_peak
from bakeoff.exporters.onnx_memory import peak_bytes
from bakeoff.memory import in_child, rss_bytes
from bakeoff.models import tiny
from bakeoff.recipe import parse

CASES = (
    ("shapes", "vae_decoder", {"batch": 4, "height": 96, "width": 96}),
    ("shapes", "unet", {"batch": 4, "height": 128, "width": 128, "sequence": 77}),
    ("z-image", "transformer", {"batch": 2, "height": 96, "width": 96, "sequence": 64}),
    ("flux", "transformer", {"batch": 2, "tokens": 4096, "sequence": 512}),
    ("sana", "transformer", {"batch": 4, "height": 128, "width": 128, "sequence": 64}),
)
"""Model, or family whose tiny pipeline is taken; part; sizes of its named dimensions."""


def taken(file: str, sizes: dict[str, int]) -> dict[str, int]:
    """Run a graph; return the bytes that were predicted and those that it took."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    given = {
        each.name: np.ones(
            [dim if isinstance(dim, int) else sizes[dim] for dim in each.shape],
            np.int64 if "int64" in each.type else np.float32,
        )
        for each in session.get_inputs()
    }
    reset_peak()
    before = rss_bytes("VmRSS")
    session.run(None, given)
    took = peak() - before
    return {"predicted": peak_bytes(Path(file), {name: each.shape for name, each in given.items()}), "taken": took}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for model, part, sizes in CASES:
            work = Path(folder) / model
            source = model if model == "shapes" else str(tiny.build(model, Path(folder) / f"{model}-source"))
            if not work.exists():
                export(source, work, parse("onnx:fp32")[0], prove=False)
            arguments = {"file": str(work / part / "model.onnx"), "sizes": sizes}
            found, _ = in_child("onnx_memory:taken", arguments, extra_path=str(Path(__file__).parent))
            told = {name: round(size / 1e6) for name, size in found.items()}
            print(json.dumps({"model": model, "part": part, **sizes, **told}), flush=True)


if __name__ == "__main__":
    main()
