"""Draw with artifacts, in host memory and then with the pipeline's tensors on a device; say what differed, and what crossed.

`python pictures.py FOLDER…`: a line of JSON for each task of each. In a process of its own: see `standin`.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import standin

from bakeoff.runtimes.engine import load
from bakeoff.runtimes.torch import TorchRuntime

SIZE = (64, 96)
STEPS = 2


class AsOnDevice:
    """Let torch parts take and give tensors of the device, though they compute on the CPU."""

    def __enter__(self):
        self.plain = TorchRuntime._run, TorchRuntime.home_for
        TorchRuntime._run, TorchRuntime.home_for = self.run, classmethod(lambda *_: standin.NAME)

    @staticmethod
    def run(runtime, inputs, outputs):
        there = any(isinstance(tensor, standin.OnDevice) for tensor in inputs.values())
        host = {name: standin.inner_of(tensor) for name, tensor in inputs.items()}
        with standin._disable_current_modes():
            made = plain_run(runtime, host, outputs)
        return {name: standin.OnDevice(tensor) if there else tensor for name, tensor in made.items()}

    def __exit__(self, *_):
        TorchRuntime._run, TorchRuntime.home_for = self.plain


plain_run = TorchRuntime._run


def asked(task, engine):
    """Return what a task's pictures are asked for: two rows, guided differently."""
    picture = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    mask = np.zeros_like(picture)
    mask[:, SIZE[1] // 2 :] = 255
    starts = {"image-to-image": {"image": picture}, "inpainting": {"image": picture, "mask": mask}}
    control = {"control_image": picture} if "controlnet" in engine._configs else {}
    scales = [3.0, 5.0] if engine.family.row_guidance else 3.0
    strength = {"strength": 0.6} if task in starts else {}
    return {"seeds": 3, "size": SIZE, "guidance_scale": scales, **strength, **starts.get(task, {}), **control}


def tell(told, step, timestep, latents):
    told.add(latents.device.type)


def compare(folder):
    host = load(folder)
    for task in host.family.pipelines:
        arguments, prompts = asked(task, host), ["a red circle", "two squares"]
        expected = host.generate(prompts, steps=2 * STEPS, **arguments)
        told = set()
        with AsOnDevice(), load(folder) as engine, standin.Standin():
            engine.generate(prompts, callback=partial(tell, told), steps=2, **arguments)
            crossed = []
            for steps in (STEPS, 2 * STEPS):
                standin.crossed.clear()
                got = engine.generate(prompts, steps=steps, **arguments)
                crossed.append([[way, shape, count] for (way, shape), count in standin.crossed.items()])
        yield {
            "artifact": folder.name,
            "task": task,
            "device": str(engine.pipeline.device),
            "differs": int(np.abs(got.images.astype(int) - expected.images).max()),
            "crossed": crossed,
            "told": sorted(told),
        }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for line in compare(Path(argument)):
            sys.stdout.write(json.dumps(line) + "\n")
