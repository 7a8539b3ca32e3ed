"""Measure what the engine costs: `python engine_overhead.py RECORD.json`; cases that the record already has are kept.

In one process, the engine and a loop written by hand make the same pictures in turn with the same opened runtimes, so
that neither has the luckier process. Each round runs the engine, the loop and the engine once more, in another order;
a block is five rounds, and blocks are compared as the bench compares them. Milliseconds a step are those of a whole
picture over its steps, so that what the engine does once a picture is in them. `within` says that the upper end of the
ratio's 95 % interval is at most 1.01, or that of the difference's at most 0.5 ms a step: the engine may cost the larger.

`more_outside_ms_a_step` is the same difference without the time inside the runtimes' `run`, which both call alike: the
noise of the products and convolutions is not in it. `within_outside` says that it ends below 0.5 or below 1 %.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import bakeoff
from bakeoff.hardware import describe
from bakeoff.sources.source import read_json
from bakeoff.verdict import mean_interval, paired_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from bakeoff.runtimes.engine import Engine
    from bakeoff.runtimes.runtime import Runtime

Times = dict[str, list[list[float]]]

MOST_SHARE = 0.01
MOST_MS_A_STEP = 0.5
ROUNDS_A_BLOCK = 5
GUIDANCE = 3.0
PROMPT = "a large red circle on a white background"
SHAPES = Path(bakeoff.__file__).parent / "models" / "shapes"


class DirectLoop:
    """Stable Diffusion without the engine and without Diffusers' pipeline: its runtimes and scheduler in a loop. Always guided."""

    def __init__(self, folder: Path, runtimes: Mapping[str, Runtime], scaling: float) -> None:
        self.runtimes, self.scaling = runtimes, scaling
        self.timestep = next(port for port in runtimes["unet"].inputs if port.name == "timestep")
        self.tokenizer = _host_object(folder, "tokenizer")
        self.scheduler = _host_object(folder, "scheduler")

    @torch.no_grad()
    def generate(self, prompts: list[str], latents: torch.Tensor, steps: int, guidance: float) -> NDArray[np.uint8]:
        texts = torch.cat([self._encode([""] * len(prompts)), self._encode(prompts)])
        made = self._denoise(latents, texts, steps, guidance)
        pictures = self.runtimes["vae_decoder"].run({"latent_sample": made / self.scaling})["sample"]
        shares = (pictures * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return (shares * 255).round().astype(np.uint8)

    def _encode(self, texts: list[str]) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.runtimes["text_encoder"].run({"input_ids": ids.input_ids})["last_hidden_state"]

    def _denoise(self, latents: torch.Tensor, texts: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            inputs = {
                "sample": self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep),
                "timestep": timestep.to(getattr(torch, self.timestep.dtype)).reshape((1,) * self.timestep.rank),
                "encoder_hidden_states": texts,
            }
            without, with_text = self.runtimes["unet"].run(inputs)["out_sample"].chunk(2)
            predicted = without + guidance * (with_text - without)
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return latents


def _host_object(folder: Path, name: str) -> Any:  # noqa: ANN401 - a scheduler or a tokenizer
    library, class_name = read_json(folder / "model_index.json")[name]
    return getattr(importlib.import_module(library), class_name).from_pretrained(folder / name, local_files_only=True)


class Clock:
    """Seconds that runtimes have spent inside `run`."""

    def __init__(self, runtimes: Mapping[str, Runtime]) -> None:
        self.seconds = 0.0
        for runtime in runtimes.values():
            runtime.run = partial(self._timed, runtime.run)  # type: ignore[method-assign]

    def _timed(self, run: Callable[[Any], Any], inputs: Mapping[str, torch.Tensor]) -> Any:  # noqa: ANN401
        started = time.perf_counter()
        outputs = run(inputs)
        self.seconds += time.perf_counter() - started
        return outputs


def loop_of(engine: Engine) -> DirectLoop:
    """Return the loop around an engine's own runtimes, which have to be open."""
    runtimes = {name: station.runtime for name, station in engine._stations.items() if station.runtime}  # noqa: SLF001 - the same objects are the point
    return DirectLoop(engine.folder, runtimes, engine.pipeline.vae.config.scaling_factor)


@dataclass(frozen=True)
class Case:
    """How the folder that is opened is made, in an empty folder; steps a picture, and blocks of five rounds."""

    make: Callable[[Path], Path]
    steps: int
    blocks: int


def bake_shapes(recipe: str, work: Path) -> Path:
    bakeoff.export("shapes", work / "artifact", bakeoff.parse(recipe)[0], prove=False)
    return work / "artifact"


def write_large(work: Path) -> Path:
    """Write a pipeline with SD 1.5's UNet at 32x32 latents, a text encoder of its width, and the rest of `shapes`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from bakeoff.models import fullsize

    folder = work / "model"
    shutil.copytree(SHAPES, folder, ignore=shutil.ignore_patterns("unet", "text_encoder", "training.json"))
    library, name, unet = fullsize.config("sd-1.5", "unet")
    fullsize.write_module(library, name, {**unet, "sample_size": 32}, folder / "unet")
    width = unet["cross_attention_dim"]
    config = CLIPTextConfig.from_pretrained(
        SHAPES / "text_encoder", hidden_size=width, intermediate_size=4 * width, num_attention_heads=12
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


CASES = {
    **{
        f"shapes, {backend}:fp32": Case(partial(bake_shapes, f"{backend}:fp32"), steps=20, blocks=40)
        for backend in ("torch", "onnx", "openvino")
    },
    "SD 1.5-size UNet, torch:fp32": Case(write_large, steps=2, blocks=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--work", type=Path, help="folder for artifacts; a temporary one by default")
    parser.add_argument("--case", choices=CASES, help="measure this one in this process, and print its row")
    options = parser.parse_args()
    if options.case:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            print(json.dumps(measure(options.case, Path(work))))
        return
    rows = json.loads(options.record.read_text())["rows"] if options.record.exists() else {}
    for name in CASES:
        if name not in rows:
            arguments = [options.record, "--case", name, *(("--work", options.work) if options.work else ())]
            command = [sys.executable, "-P", __file__, *map(str, arguments)]
            rows[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)  # noqa: S603 - ourselves
            record = {"machine": describe(), "command": "make bench-engine", "rows": rows}
            options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def measure(name: str, work: Path) -> dict[str, Any]:
    """Run a case's rounds and return its row."""
    case = CASES[name]
    with bakeoff.load(case.make(work)) as engine:
        height, width = engine.generate(PROMPT, steps=1, seeds=0).images.shape[1:3]
        shape = (1, 4, height // engine.pipeline.vae_scale_factor, width // engine.pipeline.vae_scale_factor)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        loop = loop_of(engine)
        ways: dict[str, Callable[[], NDArray[np.uint8]]] = {
            "engine": lambda: (
                engine.generate(PROMPT, steps=case.steps, guidance_scale=GUIDANCE, latents=latents).images
            ),
            "direct": lambda: loop.generate([PROMPT], latents, case.steps, GUIDANCE),
        }
        ways["again"] = ways["engine"]
        identical = bool(np.array_equal(ways["engine"](), ways["direct"]()))
        seconds, outside = _time(name, ways, Clock(loop.runtimes), case.blocks)
        return {**_costs(seconds, outside, case.steps), "pictures_identical": identical}


def _time(name: str, ways: Mapping[str, Callable[[], object]], clock: Clock, blocks: int) -> tuple[Times, Times]:
    """Return seconds, and those outside the runtimes, by way, block and round; the ways take turns in every order."""
    orders = itertools.cycle(itertools.permutations(ways))
    seconds: Times = {way: [[] for _ in range(blocks)] for way in ways}
    outside: Times = {way: [[] for _ in range(blocks)] for way in ways}
    for block in tqdm(range(blocks), desc=name):
        for order in itertools.islice(orders, ROUNDS_A_BLOCK):
            for way in order:
                started, inside = time.perf_counter(), clock.seconds
                ways[way]()
                seconds[way][block].append(time.perf_counter() - started)
                outside[way][block].append(seconds[way][block][-1] - (clock.seconds - inside))
    return seconds, outside


def _costs(seconds: Times, outside: Times, steps: int) -> dict[str, Any]:
    """Compare the engine with the loop, and with itself."""
    ratio = paired_ratio(seconds["direct"], seconds["engine"])
    floor = paired_ratio(seconds["engine"], seconds["again"])
    engine, direct = (1000 * np.median(seconds[way], axis=1) / steps for way in ("engine", "direct"))
    own_engine, own_direct = (1000 * np.median(outside[way], axis=1) / steps for way in ("engine", "direct"))
    more, more_outside = mean_interval(engine - direct), mean_interval(own_engine - own_direct)
    return {
        "steps": steps,
        "blocks": len(engine),
        "rounds_a_block": ROUNDS_A_BLOCK,
        "direct_ms_a_step": round(float(np.median(direct)), 3),
        "ratio": _interval(ratio.ratio, ratio.low, ratio.high),
        "more_ms_a_step": _interval(*more),
        "within": ratio.high <= 1 + MOST_SHARE or more[2] <= MOST_MS_A_STEP,
        "more_outside_ms_a_step": _interval(*more_outside),
        "within_outside": more_outside[2] <= max(MOST_MS_A_STEP, MOST_SHARE * float(np.median(direct))),
        "engine_against_itself": _interval(floor.ratio, floor.low, floor.high),
    }


def _interval(middle: float, low: float, high: float) -> dict[str, float]:
    return {"middle": round(middle, 5), "low": round(low, 5), "high": round(high, 5)}


if __name__ == "__main__":
    main()
