"""`make gpu`'s features: one after another on the embedded model, each passed, failed or skipped with the reason.

A feature passes if it took effect, as the runtime reads it back, and draws what is drawn without it. What was done is
kept in a file: a feature that ends the process is the next run's first failure, and the others go on. Beside other work none fails
for good: it is tried once more alone.
"""

from __future__ import annotations

import json
import runpy
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from bakeoff.pictures import psnr
from bakeoff.recipe import Placement, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from bakeoff.recipe import Recipe

PROMPT = "a large red circle on a white background"
LEAST_DB = 25.0
"""A feature's picture against that without it; bfloat16 against itself on another kernel comes to more."""
_QUIET = "TensorRT"
"""What features' names begin with whose engines' kernels are timed as they are built."""
_STEPS, _SIZE = 4, 64
_ASKS_FOR_A_GPU = "No GPU found"
_LARGE = 512
"""Bytes from which a copy is one of latents, token ids or pictures."""
_LEAST_S = 20.0
_LONG_S = {"+aoti": 120.0, "compile=full": 60.0}
"""Seconds that a feature is begun with at least, and those that compile for longer."""
_ENDED = "the process ended while it ran, or the time was up"
_ONNX = "torch:fp32,unet=onnx:fp32"
_ENGINE = "torch:fp32,unet=tensorrt:fp16+profiles=batch:1:2:4/height:8:16:16/width:8:16:16"
_TWO_PROFILES = _ENGINE + "|batch:1:2:4/height:16:32:32/width:16:32:32"
_PLAIN_FP16 = "torch:fp32,unet=torch:fp16"


class Skipped(Exception):  # noqa: N818 - it is no error
    """A feature can't be had here."""


@dataclass(frozen=True)
class Feature:
    """One thing that a placement or a recipe asks for."""

    recipe: str
    took: Callable[[Mapping[str, Any]], Any]
    """Returns, of what the parts read back, what shows that it took effect; nothing if it didn't."""
    placement: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    """The recipe whose picture this one's is compared with; by default its own, placed plainly."""
    sizes: tuple[int, ...] = (_SIZE,)


def _kernel(name: str) -> Feature:
    return Feature("torch:bf16", lambda told: (told["unet"]["attention"] or {}).get(name), {"attention": name})


FEATURES: dict[str, Feature | str] = {
    "attention=flash": _kernel("flash"),
    "attention=efficient": _kernel("efficient"),
    "attention=cudnn": _kernel("cudnn"),
    "attention=math": _kernel("math"),
    "offload=parts": Feature(
        "torch:fp32", lambda told: sum(part["unloaded"] for part in told.values()), {"offload": "parts"}
    ),
    "offload=blocks": Feature("torch:fp32", lambda told: told["unet"]["blocks"], {"offload": "blocks"}),
    "channels_last": Feature("torch:fp32", lambda told: told["unet"]["channels_last"], {"channels_last": "on"}),
    "mixed devices": Feature(
        "torch:fp32", lambda told: told["vae_decoder"]["device"] == "cpu", {"devices": "vae_decoder@cpu"}
    ),
    "latents stay on the GPU": "latents_stay",
    "latents stay on the GPU, ONNX Runtime": "latents_stay_in_onnx",
    "compile=regional": Feature("torch:fp32", lambda told: told["unet"]["compile"], {"compile": "regional"}),
    "compile=full": Feature("torch:fp32", lambda told: told["unet"]["compile"], {"compile": "full"}),
    "bitsandbytes' folders in Diffusers": "bitsandbytes_folders",
    "torchao's folders in Diffusers": "torchao_folders",
    "CUDA graphs in torch": Feature("torch:fp32", lambda told: told["unet"]["cuda_graphs"], {"cuda_graphs": True}),
    "CUDA graphs in ONNX Runtime": Feature(_ONNX, lambda told: told["unet"]["cuda_graphs"], {"cuda_graphs": True}),
    "attention=flash in ONNX Runtime": Feature(
        _ONNX, lambda told: told["unet"]["attention"]["fused"], {"attention": "flash"}
    ),
    "TensorRT": Feature(_ENGINE, lambda told: told["unet"]["runs"]["by_profile"], against=_PLAIN_FP16),
    "TensorRT, CUDA graphs": Feature(
        _ENGINE, lambda told: told["unet"]["runs"]["graph_replays"], {"cuda_graphs": True}
    ),
    "TensorRT, refit": "refitted",
    "TensorRT, weights beside the plan": Feature(
        _ENGINE + "+strip", lambda told: told["unet"]["runs"]["by_profile"], against=_ENGINE
    ),
    "TensorRT, weights streamed": "streamed",
    "TensorRT, several profiles": Feature(
        _TWO_PROFILES,
        lambda told: len(told["unet"]["runs"]["by_profile"]) > 1 and told["unet"]["runs"]["by_profile"],
        against=_PLAIN_FP16,
        sizes=(_SIZE, 2 * _SIZE),
    ),
    "+aoti": "compiled_ahead",
}
"""Name -> the feature, or the function of this file that tries it; what compiles longest comes last."""


def features(
    work: str, device: str, budget_s: float, only: list[str] | None = None, *, beside: bool = False
) -> dict[str, Any]:
    """Try every feature, or go on with it, as far as the seconds reach; `beside` other work, none that is timed."""
    ends = time.monotonic() + budget_s
    folder = Path(work) / "features"
    file = folder / "done.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if not done:
        shutil.rmtree(folder, ignore_errors=True)  # what other versions of anything exported
        folder.mkdir()
    trial = Trial(folder, device)
    wanted = [name for name in only or FEATURES if not (beside and name.startswith(_QUIET))]
    for name in [each for each in wanted if each not in done]:
        if ends - time.monotonic() < _LONG_S.get(name, _LEAST_S):
            return _told(done) | {"unfinished": f"{budget_s:.0f} s were too few; run it again, and it goes on"}
        if not beside:
            _keep(file, {**done, name: {"outcome": "failed", "reason": _ENDED}})
        found = tried(trial, FEATURES[name])
        if not beside or found["outcome"] != "failed":
            done[name] = found
            _keep(file, done)
    if beside and done.keys() != FEATURES.keys():
        return _told(done) | {"unfinished": "some want the machine for themselves"}
    file.unlink(missing_ok=True)
    return _told(done)


def so_far(work: str, device: str) -> dict[str, Any]:  # noqa: ARG001 - an item's arguments
    """Return what was found before the process ended; nothing if it hadn't begun."""
    file = Path(work) / "features" / "done.json"
    return _told(json.loads(file.read_text())) if file.is_file() else {}


def _keep(file: Path, done: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(done, default=str))
    partial.replace(file)


def _told(done: Mapping[str, Any]) -> dict[str, Any]:
    skipped = {name: each["reason"] for name, each in done.items() if each["outcome"] == "skipped"}
    return {"features": dict(done), "left_out": skipped}


def tried(trial: Trial, feature: Feature | str) -> dict[str, Any]:
    """Try a feature; whatever is raised is its own result."""
    started = time.perf_counter()
    try:
        said = trial.compare(feature) if isinstance(feature, Feature) else globals()[feature](trial)
        outcome = {"outcome": "passed", **said}
    except Skipped as error:
        outcome = {"outcome": "skipped", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - any backend's
        outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:600]}
    return {**outcome, "seconds": round(time.perf_counter() - started, 2)}


class Trial:
    """Exports the embedded model and draws with it, each recipe once."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self._plain: dict[tuple[str, int], NDArray[Any]] = {}

    def artifact(self, recipe: str, *, prove: bool = False) -> Path:
        """Export a recipe, if that hasn't been done; return the folder."""
        from bakeoff.bake import export

        target = self.folder / "".join(each if each.isalnum() else "-" for each in recipe)
        return export("shapes", target, parse(recipe)[0], prove=prove).folder

    def open(self, recipe: str, placement: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an Engine
        """Open a recipe's artifact.

        Raises:
            Skipped: it can't be exported or placed so here.
        """
        from bakeoff.runtimes.engine import load

        self.refuse(parse(recipe)[0], placement)
        return load(self.artifact(recipe), device=self.device, **placement)

    def refuse(self, recipe: Recipe, placement: Mapping[str, Any]) -> None:
        reason = _obstacle()(recipe, Placement(self.device, **placement), self.device)
        if reason:
            raise Skipped(reason)

    def plain(self, recipe: str, size: int) -> NDArray[Any]:
        """Return the picture of a recipe without anything asked for."""
        if (recipe, size) not in self._plain:
            with self.open(recipe, {}) as engine:
                self._plain[recipe, size] = draw(engine, size)
        return self._plain[recipe, size]

    def compare(self, feature: Feature) -> dict[str, Any]:
        with self.open(feature.recipe, feature.placement) as engine:
            drawn = [draw(engine, size) for size in feature.sizes]
            told = engine.configuration
        found = feature.took(told)
        if not found:
            message = f"it took no effect: {json.dumps(told, default=str)}"
            raise RuntimeError(message)
        plain = [self.plain(feature.against or feature.recipe, size) for size in feature.sizes]
        return {"read back": found, "db": near(drawn, plain)}


@cache
def _obstacle() -> Callable[[Recipe, Placement, str], str | None]:
    found: Callable[[Recipe, Placement, str], str | None] = runpy.run_path(
        str(Path(__file__).with_name("gpu_shapes.py"))
    )["obstacle"]
    return found


def draw(engine: Any, size: int = _SIZE) -> NDArray[Any]:  # noqa: ANN401 - an Engine
    drawn: NDArray[Any] = engine.generate(PROMPT, seeds=1, steps=_STEPS, size=(size, size)).images
    return drawn


def near(drawn: list[NDArray[Any]], plain: list[NDArray[Any]]) -> float:
    """Return the worst PSNR of pictures in dB, if they are alike."""
    worst = min(psnr(*pair) for pair in zip(drawn, plain, strict=True))
    if worst < LEAST_DB:
        message = f"its picture is {worst:.1f} dB from that without it, expected {LEAST_DB:.0f} or more"
        raise RuntimeError(message)
    return round(worst, 1)


def compiled_ahead(trial: Trial) -> dict[str, Any]:
    """Compile the text encoder ahead of time, prove it, and draw with it."""
    recipe = "torch:fp32,text_encoder=torch:fp32+aoti"
    trial.refuse(parse(recipe)[0], {})
    folder = trial.artifact(recipe, prove=True)
    from bakeoff.runtimes.engine import load

    with load(folder, device=trial.device) as engine:
        drawn, told = draw(engine), engine.configuration
    return {"read back": told["text_encoder"]["compile"], "db": near([drawn], [trial.plain("torch:fp32", _SIZE)])}


def latents_stay(trial: Trial, recipe: str = "torch:fp32") -> dict[str, Any]:
    """Count what crosses between host and GPU for few steps and for more: alike, if nothing but numbers crosses in a step."""
    if trial.device == "cpu":
        message = "a CPU has no other memory than the host's"
        raise Skipped(message)
    with trial.open(recipe, {}) as engine:
        copied(engine, _STEPS)  # the profiler misses the first ones that it is there for
        where, few, more = engine.pipeline.device.type, *(copied(engine, steps) for steps in (_STEPS, 2 * _STEPS))
    if not few:
        message = "torch's profiler saw no copy here, though the picture itself is one"
        raise Skipped(message)
    if where == "cpu" or few != more:
        message = f"the pipeline's tensors lie on {where}; {_STEPS} steps copied {few} tensors, {2 * _STEPS} {more}"
        raise RuntimeError(message)
    return {"copied": few}


def latents_stay_in_onnx(trial: Trial) -> dict[str, Any]:
    return latents_stay(trial, _ONNX)


def copied(engine: Any, steps: int) -> int:  # noqa: ANN401 - an Engine
    """Return how many tensors cross between host and GPU for a picture."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            engine.generate(PROMPT, seeds=1, steps=steps, size=(_SIZE, _SIZE))
        seen.export_chrome_trace(str(trace))
        return large_copies(json.loads(trace.read_text())["traceEvents"])


def large_copies(events: list[dict[str, Any]]) -> int:
    """Count the copies between host and GPU that are more than single numbers, in a trace of torch's profiler."""
    return sum(
        event["args"]["bytes"] >= _LARGE
        for event in events
        if event.get("cat") == "gpu_memcpy" and any(way in event["name"] for way in ("HtoD", "DtoH"))
    )


def bitsandbytes_folders(trial: Trial) -> dict[str, Any]:
    """Open what bitsandbytes multiplies with Diffusers and Transformers alone."""
    try:
        return {precision: in_diffusers(trial, precision) for precision in ("nf4", "int8")}
    except RuntimeError as error:
        if _ASKS_FOR_A_GPU not in str(error):
            raise
        message = f"Diffusers opens them on a GPU alone: {error}"
        raise Skipped(message) from error


def torchao_folders(trial: Trial) -> dict[str, Any]:
    """Open what torchao multiplies with Diffusers and Transformers alone."""
    return {precision: in_diffusers(trial, precision) for precision in ("w8a8-dynamic", "fp8")}


def in_diffusers(trial: Trial, precision: str) -> dict[str, float]:
    """Compare what Diffusers computes from an artifact's folders with what the artifact does; return part -> dB."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from bakeoff.components.component import Sizes
    from bakeoff.parity.budget import decibels
    from bakeoff.parity.distance import relative_error
    from bakeoff.runtimes.opening import open_part, read_folder

    recipe, found = f"torch:fp32,unet=torch:{precision},text_encoder=torch:{precision}", {}
    trial.refuse(parse(recipe)[0], {})
    opened = read_folder(trial.artifact(recipe))
    for name, made in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        part, folder = opened.family.part(name), opened.folders[name]
        fed = part.component.example(opened.config(name), Sizes(2, 16, 16, 12), seed=0)
        with open_part(folder, part, opened.parts[name], Placement(trial.device)) as runtime:
            ours = next(iter(runtime.run(fed).values()))
        theirs = made.from_pretrained(folder, local_files_only=True, torch_dtype=torch.bfloat16)
        if theirs.device.type != trial.device:  # what has 8 bits mustn't be moved; bitsandbytes' is on the GPU already
            theirs = theirs.to(trial.device)
        inputs = [each.to(trial.device) for each in fed.values()]
        with torch.no_grad():
            drawn = theirs(*(each.bfloat16() if each.is_floating_point() else each for each in inputs))[0]
        found[name] = round(decibels(relative_error(ours.float().cpu(), drawn.float().cpu())), 1)
    if min(found.values()) < LEAST_DB:
        message = f"{precision}: Diffusers computes something else: {found} dB, expected {LEAST_DB:.0f} or more"
        raise RuntimeError(message)
    return found


def streamed(trial: Trial) -> dict[str, Any]:
    """Draw while no weight may stay on the device, as if it had no free memory; else so small a model streams nothing."""
    from bakeoff.runtimes.tensorrt_device import Device

    with patch.object(Device, "free_bytes", lambda _: 0), trial.open(_ENGINE + "+weight_streaming", {}) as engine:
        drawn, memory = draw(engine), engine.configuration["unet"]["memory"]
    if not memory["streaming_budget_bytes"] < memory["streamable_bytes"]:
        message = f"it took no effect: {json.dumps(memory)}"
        raise RuntimeError(message)
    return {"read back": memory, "db": near([drawn], [trial.plain(_ENGINE, _SIZE)])}


def refitted(trial: Trial) -> dict[str, Any]:
    """Exchange LoRAs A, B, A of an open engine; and time it against one that can't be refitted."""
    first, second = (_lora(trial.folder / f"lora-{seed}.safetensors", seed) for seed in (1, 2))
    with trial.open(_ENGINE + "+refit", {}) as engine:
        bare, seconds = draw(engine), _timed(engine)
        drawn = []
        for lora in (first, second, first):
            engine.set_loras(lora)
            drawn.append(draw(engine))
        engine.set_loras()
        again = draw(engine)
    if (drawn[0] != drawn[2]).any() or (bare != again).any() or (drawn[0] == drawn[1]).all():
        message = "LoRAs A, B, A and none don't draw A, B, A and what was drawn before"
        raise RuntimeError(message)
    with trial.open(_PLAIN_FP16, {}) as engine:
        engine.set_loras(first)
        adapted = draw(engine)
    with trial.open(_ENGINE, {}) as engine:
        plain, plain_seconds = draw(engine), _timed(engine)
    return {
        "LoRA against torch, db": near([drawn[0]], [adapted]),
        "db": near([bare], [plain]),
        "a picture, s": round(seconds, 4),
        "of an engine that can't, s": round(plain_seconds, 4),
    }


def _timed(engine: Any) -> float:  # noqa: ANN401 - an Engine
    """Return the least seconds of some pictures."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        draw(engine)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _lora(file: Path, seed: int) -> str:
    """Write a LoRA of the UNet's attention that changes the picture; return its file."""
    import torch
    from safetensors.torch import save_file

    from bakeoff.sources.source import Source

    generator, tensors = torch.Generator().manual_seed(seed), {}
    entries = Source.open("shapes").checkpoint("unet").entries
    for name, entry in entries.items():
        if name.endswith(("attn1.to_q.weight", "attn2.to_v.weight")):
            out, width = entry.shape
            path = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = 0.1 * torch.randn(4, width, generator=generator)
            tensors[f"{path}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    save_file(tensors, file)
    return str(file)
