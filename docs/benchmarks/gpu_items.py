"""What `gpu.py` runs in child processes: `python gpu_items.py KIND [CORES]`, its arguments on stdin, the result on stdout.

An item that can't run here returns `skipped` with the reason; one that fails returns `failed`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from bakeoff import nvidia, plugins
from bakeoff.bench import energy, guard
from bakeoff.errors import BakeoffError
from bakeoff.models import fullsize
from bakeoff.recipe import Placement

if TYPE_CHECKING:
    from collections.abc import Callable

    from bakeoff.runtimes.engine import Engine

PROMPT = "a large red circle on a white background, a photograph, daylight"
_ROOM = 0.92
"""Share of the device's memory that weights and activations may take together."""
_ACTIVATIONS = 6_000_000_000
"""Counted for a picture of 1024² on top of weights: the VAE decoder's feature maps for the most part."""
_FEW = 3
"""Layers that are alike in what is compiled beforehand: the first and the last may differ from others."""
_SHARES = {"nf4": 0.29, "int8": 0.51, "w8a8-dynamic": 0.51, "fp8": 0.51}
"""Bytes of a denoiser in a precision for one in bfloat16, scales included."""


_SLOW_TO_IMPORT = (
    "torch",
    "diffusers.pipelines.pipeline_utils",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
"""What takes seconds, in which another item may still run; none of it touches the device."""


@dataclass(frozen=True)
class Deadline:
    """When the item has to be done: it stops between pictures rather than being stopped."""

    at: float

    @property
    def left_s(self) -> float:
        return self.at - time.monotonic()


def picture(
    model: str,
    work: str,
    precision: str,
    device: str,
    placement: dict[str, Any],
    steps: int,
    size: int,
    pictures: int,
    budget_s: float,
    *,
    tiny: bool,
) -> dict[str, Any]:
    """Time pictures of a full-size model whose weights are drawn on the device, first one apart."""
    deadline = Deadline(time.monotonic() + budget_s)
    folder = _hollow(model, work, precision, tiny=tiny)
    weights = _weight_bytes(folder, precision)
    placement = {**placement, **_room(weights, device)}
    if "skipped" in placement:
        return placement
    opened = partial(_opened, folder, precision, Placement(device, **placement))
    return {
        **_timed(opened, pictures, deadline, steps=steps, size=size),
        "weight_bytes": sum(weights.values()),
        "offload": placement.get("offload", "none"),
    }


def diffusers_alone(
    model: str,
    work: str,
    device: str,
    steps: int,
    size: int,
    pictures: int,
    budget_s: float,
    *,
    compiled: bool,
    tiny: bool,
) -> dict[str, Any]:
    """Time pictures of Diffusers' own pipeline, in bfloat16 with weights that are drawn as ours are."""
    deadline = Deadline(time.monotonic() + budget_s)
    folder = _hollow(model, work, "bf16", tiny=tiny)
    room = _room(_weight_bytes(folder, "bf16"), device)
    if room.get("offload") != "none":
        return {"skipped": room.get("skipped", "its parts don't fit on the device together")}
    opened = partial(_DiffusersAlone, folder, device, compiled=compiled)
    return _timed(opened, pictures, deadline, steps=steps, size=size)


class _DiffusersAlone:
    """Diffusers' own pipeline, asked for pictures as an engine is."""

    def __init__(self, folder: Path, device: str, *, compiled: bool) -> None:
        import torch
        from diffusers import DiffusionPipeline

        from bakeoff.models.drawn import draw

        self._pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
        )
        self._pipeline.set_progress_bar_config(disable=True)
        for module in self._pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                draw(module, device, "bf16")
        if compiled:
            (getattr(self._pipeline, "unet", None) or self._pipeline.transformer).compile_repeated_blocks()
        name = type(self._pipeline).__name__
        self.configuration = {"class": name, "device": str(self._pipeline.device), "compile": compiled}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._pipeline

    def generate(
        self,
        prompt: str,
        *,
        steps: int,
        size: tuple[int, int],
        seeds: int,
        stages: bool = False,  # noqa: ARG002 - an engine's
    ) -> SimpleNamespace:
        import torch

        started = time.perf_counter()
        images = self._pipeline(
            [prompt],
            num_inference_steps=steps,
            height=size[0],
            width=size[1],
            generator=torch.Generator().manual_seed(seeds),
            output_type="np",
        ).images
        pixels = (images * 255).round().astype("uint8")
        return SimpleNamespace(images=pixels, seconds={"total": time.perf_counter() - started}, notes=())


def compiled(
    model: str,
    work: str,
    precision: str,
    device: str,
    placement: dict[str, Any],
    size: int,
    budget_s: float,  # noqa: ARG001 - an item's arguments
    *,
    tiny: bool,
) -> dict[str, Any]:
    """Compile a model's blocks for later processes: draw with one of its widths that has few of each."""
    folder = _hollow(model, work, precision, tiny=tiny, depth=_FEW)
    started = time.perf_counter()
    with _opened(folder, precision, Placement(device, offload="none", **placement)) as engine:
        engine.generate(PROMPT, steps=max(2, engine.family.fewest_steps), size=(size, size), seeds=1)
    return {"compiled_s": round(time.perf_counter() - started, 1)}


def _opened(folder: Path, precision: str, placement: Placement) -> Engine:
    """Open a model whose weights are drawn where they run."""
    from bakeoff.models.drawn import drawn
    from bakeoff.runtimes.engine import Engine
    from bakeoff.runtimes.opening import read_folder

    return Engine(drawn(read_folder(folder), precision, placement.device), placement)


def _hollow(model: str, work: str, precision: str, *, tiny: bool, depth: int | None = None) -> Path:
    """Return a folder of a model whose weights are holes; it is written, if it isn't there."""
    dtype = "float16" if precision == "fp16" else "bfloat16"
    folder = Path(work) / f"{model}-{dtype}{'-tiny' if tiny else ''}{f'-of-{depth}' if depth else ''}"
    try:
        if not folder.exists():
            fullsize.build(model, folder, dtype=dtype, hollow=True, small=tiny, depth=depth)
    except (BakeoffError, OSError):
        if not folder.exists():  # else another process wrote it meanwhile
            raise
    return folder


def _timed(
    open_engine: Callable[[], Engine | _DiffusersAlone],
    pictures: int,
    deadline: Deadline,
    *,
    steps: int,
    size: int,
) -> dict[str, Any]:
    """Open an engine, draw a picture, then one by stages, and time more of them, in which nothing waits for the device between."""
    import torch

    from bakeoff.models.drawn import DENOISERS

    asked = {"steps": steps, "size": (size, size), "seeds": 1}
    started = time.perf_counter()
    with open_engine() as engine:
        engine.generate(PROMPT, **asked)
        first_s = time.perf_counter() - started
        _reset_peak()
        staged = engine.generate(PROMPT, **asked, stages=True)
        gpu, timed = nvidia.in_use(), []
        with guard.Watch(os.getpid(), gpu) as watch:
            counted = energy.read(gpu)
            while len(timed) < pictures and (not timed or deadline.left_s > 1.3 * timed[-1].seconds["total"]):
                timed.append(engine.generate(PROMPT, **asked))
            spent = energy.between(counted, energy.read(gpu))
        told, memory = engine.configuration, device_memory()
    denoiser = next((name for name in staged.seconds if name in DENOISERS), None)
    seconds = [result.seconds["total"] for result in timed]
    others = sum(each for name, each in staged.seconds.items() if name not in {denoiser, "total"})
    return {
        "first_picture_s": round(first_s, 3),
        "picture_s": [round(each, 4) for each in seconds],
        "median_picture_s": round(statistics.median(seconds), 4),
        "step_s": denoiser and round((statistics.median(seconds) - others) / steps, 5),  # the stage's waits in between
        "stages_s": {name: round(value, 4) for name, value in staged.seconds.items()},
        "pixels_std": round(float(timed[-1].images.std()), 3),
        "memory": memory,
        "energy_j_per_picture": {name: round(each / len(timed), 2) for name, each in (spent or {}).items()} or None,
        "guard": watch.told(),
        "configuration": told[denoiser] if denoiser else told,
        "notes": list(timed[-1].notes),
        "versions": {"torch": torch.__version__},
    }


def _weight_bytes(folder: Path, precision: str) -> dict[str, int]:
    """Return module -> bytes of its weights as they will lie on the device."""
    from bakeoff.models.drawn import DENOISERS

    sizes = {
        module.name: sum(file.stat().st_size for file in module.glob("*.safetensors"))
        for module in folder.iterdir()
        if module.is_dir()
    }
    return {
        name: round(size * (_SHARES.get(precision, 1.0) if name in DENOISERS else 1.0))
        for name, size in sizes.items()
        if size
    }


def _room(weights: dict[str, int], device: str) -> dict[str, Any]:
    """Choose whether parts stay on the device together, take turns, or can't be had."""
    if device != "cuda":
        return {"offload": "none"}
    import torch

    free = torch.cuda.mem_get_info()[0] * _ROOM - _ACTIVATIONS
    if sum(weights.values()) <= free:
        return {"offload": "none"}
    largest = max(weights, key=lambda name: weights[name])
    if weights[largest] <= free:
        return {"offload": "parts"}
    needed, there = weights[largest] / 1e9, (free + _ACTIVATIONS) / 1e9
    return {
        "skipped": f"{largest} takes {needed:.1f} GB and {_ACTIVATIONS / 1e9:.0f} GB to run, {there:.1f} GB are free"
    }


def _reset_peak() -> None:
    """Forget what opening took: blocks that torch keeps, which count as reserved and as the process's, and the peaks."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_memory() -> dict[str, int | None]:
    """Return what torch's tensors and its allocator took at most, and what the driver says of this process, in bytes."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "allocator_peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
        "process_bytes": nvidia.process_bytes(os.getpid()),
    }


def onnx_picture(
    model: str,
    work: str,
    recipe: str,
    device: str,
    steps: int,
    size: int,
    pictures: int,
    budget_s: float,
    *,
    tiny: bool,
) -> dict[str, Any]:
    """Export a denoiser to ONNX from random weights on disk, and time pictures with it on ONNX Runtime's provider."""
    from bakeoff.recipe import parse
    from bakeoff.runtimes.engine import load

    deadline = Deadline(time.monotonic() + budget_s)
    placement = parse(f"{recipe}@{device}")[1]
    artifact = onnx_export(model, work, recipe, device, budget_s, tiny=tiny)
    if "skipped" in artifact:
        return artifact
    opened = partial(load, artifact["folder"], **placement.as_dict())
    return {"export_s": artifact["export_s"], **_timed(opened, pictures, deadline, steps=steps, size=size)}


def onnx_export(model: str, work: str, recipe: str, device: str, budget_s: float, *, tiny: bool) -> dict[str, Any]:  # noqa: ARG001 - an item's arguments
    """Export a denoiser to ONNX from random weights on disk, unless it is there; return its folder."""
    from bakeoff.bake import export
    from bakeoff.recipe import parse

    chosen, placement = parse(f"{recipe}@{device}")
    runtime_class = plugins.runtime(chosen.default.backend)
    available = runtime_class.probe()
    if not available.ok:
        return {"skipped": f"{available.reason}: {available.fix}"}
    if device != "cpu" and runtime_class.device_for(placement) != device:
        return {"skipped": f"this ONNX Runtime has no provider for {device}: pip install 'bakeoff[onnx-gpu]'"}
    source, target = (
        Path(work) / f"{model}-random{'-tiny' if tiny else ''}",
        Path(work) / f"{model}-onnx-{_plain(recipe)}",
    )
    if not source.exists():
        fullsize.build(model, source, dtype="bfloat16", small=tiny)
    present, started = target.is_dir(), time.perf_counter()
    artifact = export(str(source), target, _denoiser_alone(chosen, source), prove=False)
    export_s = None if present else round(time.perf_counter() - started, 1)
    return {"export_s": export_s, "folder": str(artifact.folder)}


def _denoiser_alone(recipe: Any, source: Path) -> Any:  # noqa: ANN401 - a Recipe
    """Return the recipe for the denoiser; all else stays torch's, which is linked."""
    from bakeoff.recipe import PartRecipe, Recipe

    name = "unet" if (source / "unet").is_dir() else "transformer"
    return Recipe(PartRecipe("torch", "bf16"), {name: recipe.default})


def _plain(text: str) -> str:
    return "".join(each if each.isalnum() else "-" for each in text)


KINDS = {
    "picture": picture,
    "diffusers": diffusers_alone,
    "compiled": compiled,
    "onnx_picture": onnx_picture,
    "onnx_export": onnx_export,
}
"""Other kinds have files of their own: `shapes` is the function of that name in `gpu_shapes.py`, `shapes.bake` its `bake`."""


def _function(kind: str) -> Any:  # noqa: ANN401 - a function
    file, _, name = kind.partition(".")
    return KINDS.get(kind) or runpy.run_path(str(Path(__file__).with_name(f"gpu_{file}.py")))[name or kind]


def main() -> None:
    if len(sys.argv) > 2:  # noqa: PLR2004 - the kind, and cores
        os.sched_setaffinity(0, map(int, sys.argv[2].split(",")))
    function = _function(sys.argv[1])
    for name in _SLOW_TO_IMPORT:
        importlib.import_module(name)
    arguments = json.load(sys.stdin)
    try:
        result = function(**arguments)
    except BakeoffError as error:
        result = {"skipped": error.message, "fix": error.fix}
    sys.stdout.write(f"\n{json.dumps(result, default=str)}\n")


if __name__ == "__main__":
    main()
