"""Measure what opened parts take of memory: `python running_memory.py RECORD.json`; rows that the record has are kept.

Modules of full size with random weights are built on the spot and exported. Each is opened and run in a child process
whose anonymous memory the parent samples every 10 ms: what the process had before opening is taken off. Weights that
stay mapped from their file are no anonymous memory: the kernel can drop their pages and read them again.

`opened` is what is held after opening and one run at the smallest size, `opening` the peak until then, and `running`
the peak of a run at the full size over `opened`: activations. Runtimes take their factors from this record.

`pipelines` has the peak of a whole picture, two steps at 256×256, over what the process had before: the SD 1.5 UNet and
the VAE decoder in ONNX Runtime, and a small text encoder of the UNet's width in torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bakeoff
from bakeoff.hardware import describe
from bakeoff.memory import Watch, in_child, rss_bytes

HERE = Path(__file__).parent
CASES = {
    "SD 1.5 UNet": {
        "config": ("sd-1.5", "unet", {}),
        "component": "unet_2d_condition:UNet2DCondition",
        "sizes": {"batch": 2, "height": 64, "width": 64, "sequence": 77},
    },
    "SD 3.5 Large, 2 of 38 blocks": {
        "config": ("sd-3.5-large", "transformer", {"num_layers": 2}),
        "component": "sd3_transformer_2d:SD3Transformer2D",
        "sizes": {"batch": 2, "height": 32, "width": 32, "sequence": 154},
    },
    "VAE decoder": {
        "config": ("sd-1.5", "vae", {}),
        "component": "autoencoder_kl:VaeDecoder",
        "weights": ("decoder.", "post_quant_conv."),
        "sizes": {"batch": 1, "height": 48, "width": 48, "sequence": 1},
    },
}
SMALL = {"batch": 1, "height": 8, "width": 8, "sequence": 8}
ARMS = [
    ("torch", "fp32", False),
    ("torch", "bf16", False),
    ("torch", "bf16", True),
    ("onnx", "fp32", False),
    ("onnx", "fp32", True),
    ("onnx", "bf16", False),
    ("onnx", "bf16", True),
    ("openvino", "fp32", False),
    ("openvino", "bf16", False),
    ("openvino", "int8", False),
    ("onnx", "int8", False),
    ("onnx", "nf4", False),
    ("openvino", "nf4", False),
]
"""Backend, precision, and whether weights are to stay mapped."""


def lower_here(component: str, source: str, output: str, exporter: str, precision: str) -> None:
    """Export one module in this process."""
    import importlib

    from bakeoff import plugins
    from bakeoff.exporters.capture import module_on_hollow, on_hollow
    from bakeoff.exporters.exporter import Subject
    from bakeoff.weights import Checkpoint

    module, _, name = component.partition(":")
    made = getattr(importlib.import_module(f"bakeoff.components.modules.{module}"), name)()
    folder = Path(source)
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory(dir=output) as work:
        subject = Subject(
            part=made.name,
            mixture=plugins.mixture(precision),
            activations={},
            inputs=made.inputs(config),
            outputs=made.outputs(config),
            source=folder,
            checkpoint=Checkpoint.open(folder),
            capture=on_hollow(made.name, made, config, folder, Path(work) / "hollow"),
            module=module_on_hollow(made, folder, Path(work) / "hollow"),
            weights="auto",
        )
        plugins.exporter(exporter).lower(subject, Path(output))


def run_here(component: str, folder: str, backend: str, precision: str, sizes: dict[str, int], mapped: bool) -> Any:  # noqa: ANN401, FBT001 - JSON
    """Open and run one part in this process; return bytes by moment, and seconds of the run."""
    import importlib

    import torch

    from bakeoff import plugins
    from bakeoff.components.component import Sizes
    from bakeoff.recipe import Placement
    from bakeoff.runtimes.runtime import PartFiles

    module, _, name = component.partition(":")
    made = getattr(importlib.import_module(f"bakeoff.components.modules.{module}"), name)()
    config = json.loads((Path(folder) / "config.json").read_text())
    small, full = (made.example(config, Sizes(**each), 0) for each in (SMALL, sizes))
    files = PartFiles(
        name=made.name,
        folder=Path(folder),
        precision=precision,
        inputs=made.inputs(config),
        outputs=made.outputs(config),
        build=lambda dtype: made.flat(made.load(Path(folder), getattr(torch, dtype))).eval(),
    )
    runtime_class = plugins.runtime(backend)
    runtime_class.probe()
    getattr(importlib.import_module("diffusers"), config["_class_name"])
    before = rss_bytes("RssAnon")
    with Watch() as opening:
        runtime = runtime_class(files, Placement(device="cpu", threads=1, offload="mapped" if mapped else "none"))
        runtime.run(small)
    opened = rss_bytes("RssAnon") - before
    started = time.perf_counter()
    with Watch() as running:
        runtime.run(full)
    return {
        "opening_bytes": opening.peak.anon_bytes - before,
        "opened_bytes": opened,
        "running_bytes": running.peak.anon_bytes - before - opened,
        "seconds": round(time.perf_counter() - started, 2),
    }


def generate_here(folder: str, offload: str) -> Any:  # noqa: ANN401 - JSON
    """Make a picture in this process; return the peak over what it had before, in bytes, and seconds."""
    bakeoff.load(folder, device="cpu", threads=1, offload="mapped").close()  # imports what is needed, and holds little
    before = rss_bytes("RssAnon")
    started = time.perf_counter()
    with Watch() as watch, bakeoff.load(folder, device="cpu", threads=1, offload=offload) as engine:
        made = engine.generate("a large red circle", seeds=1, steps=2, size=(256, 256))
    return {
        "peak_bytes": watch.peak.anon_bytes - before,
        "seconds": round(time.perf_counter() - started, 1),
        "pixels_sha256": hashlib.sha256(made.images.tobytes()).hexdigest()[:16],
        "notes": made.notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--work", type=Path, help="folder for weights and exports, 25 GB; a temporary one by default")
    parser.add_argument("--keep", action="store_true", help="keep what is in --work, and use what is there")
    options = parser.parse_args()
    found = json.loads(options.record.read_text()) if options.record.exists() else {}
    record: dict[str, Any] = {
        "machine": describe(),
        "command": "make bench-memory",
        "rows": [],
        "pipelines": {},
        **found,
    }
    done = {(row["module"], row["backend"], row["precision"], row["mapped"]) for row in record["rows"]}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        work = options.work if options.keep else Path(temporary)
        for title, case in CASES.items():
            for backend, precision, mapped in ARMS:
                if (title, backend, precision, mapped) not in done:
                    record["rows"].append(_measure(title, case, work, backend, precision, mapped))
                    options.record.write_text(json.dumps(record, indent=1) + "\n")
        for offload in [each for each in ("none", "parts", "mapped") if each not in record["pipelines"]]:
            arguments = {"folder": str(_pipeline(work)), "offload": offload}
            record["pipelines"][offload], _ = in_child("running_memory:generate_here", arguments, extra_path=str(HERE))
            options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def _pipeline(work: Path) -> Path:
    """Return a folder with the UNet and the decoder as ONNX, and the rest of `shapes` at the UNet's width."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    folder, shapes = work / "pipeline", Path(bakeoff.__file__).parent / "models" / "shapes"
    if folder.exists():
        return folder
    shutil.copytree(shapes, folder, ignore=shutil.ignore_patterns("unet", "vae", "text_encoder", "training.json"))
    config = CLIPTextConfig.from_pretrained(
        shapes / "text_encoder", hidden_size=768, intermediate_size=3072, num_attention_heads=12
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    for title, name in (("SD 1.5 UNet", "unet"), ("VAE decoder", "vae_decoder")):
        made = _made(CASES[title], work, "onnx", "fp32")
        shutil.copytree(made, folder / name, copy_function=os.link)
    return folder


def _measure(title: str, case: dict[str, Any], work: Path, backend: str, precision: str, mapped: bool) -> Any:  # noqa: ANN401, FBT001
    folder = _made(case, work, backend, precision)
    told, _ = in_child(
        "running_memory:run_here",
        {
            "component": case["component"],
            "folder": str(folder),
            "backend": backend,
            "precision": precision,
            "sizes": case["sizes"],
            "mapped": mapped,
        },
        extra_path=str(HERE),
    )
    row = {"module": title, "backend": backend, "precision": precision, "mapped": mapped}
    row |= {"weight_bytes": _weight_bytes(case, work, precision), **told}
    row["factor"] = round(max(row["opening_bytes"], row["opened_bytes"]) / row["weight_bytes"], 3)
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _made(case: dict[str, Any], work: Path, backend: str, precision: str) -> Path:
    """Return the folder of the part as the backend opens it; build and export it unless it is there."""
    source = _source(case, work, precision)
    if backend == "torch":
        return source
    folder = source.with_name(f"{source.name}-{backend}-{precision}")
    if not folder.exists():
        folder.mkdir()
        arguments = {"component": case["component"], "source": str(source), "output": str(folder)}
        arguments |= {"exporter": backend, "precision": precision}
        in_child("running_memory:lower_here", arguments, extra_path=str(HERE))
        shutil.copy(source / "config.json", folder)
    return folder


def _source(case: dict[str, Any], work: Path, precision: str) -> Path:
    from bakeoff.models import fullsize

    model, module, changes = case["config"]
    folder: Path = work / f"{model}-{module}-{precision}"
    if not folder.exists():
        library, name, config = fullsize.config(model, module)
        dtype = "float32" if precision == "fp32" else "bfloat16"
        fullsize.write_module(library, name, {**config, **changes}, folder, dtype=dtype)
    return folder


def _weight_bytes(case: dict[str, Any], work: Path, precision: str) -> int:
    """Sum the weights that the part has: of those in the file, by the beginnings of their names."""
    from bakeoff.weights import Checkpoint

    entries = Checkpoint.open(_source(case, work, precision)).entries
    return sum(entry.length for name, entry in entries.items() if name.startswith(case.get("weights", ("",))))


if __name__ == "__main__":
    main()
