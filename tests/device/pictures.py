"""Draw with artifacts, in host memory and then with the pipeline's tensors on a device; say what differed, and what crossed.

`python pictures.py FOLDER…`: a line of JSON for each task of each. In a process of its own: see `standin`.
"""

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import standin
import torch

from bakeoff import plugins
from bakeoff.runtimes.crossing import Crossing
from bakeoff.runtimes.engine import load
from bakeoff.runtimes.torch import TorchRuntime

SIZE = (64, 96)
STEPS = 2


class OnStandin(TorchRuntime):
    """A torch part that takes and gives tensors of the device, as one on a GPU does; its module computes on the CPU."""

    @classmethod
    def home_for(cls, placement):
        return standin.NAME

    def __init__(self, part, placement):
        super().__init__(part, placement)
        self._crossing, module = Crossing(torch.device(standin.NAME, 0)), self._call

        def call(*arguments):
            assert all(isinstance(each, standin.OnDevice) for each in arguments)
            with standin.host():
                return [standin.OnDevice(made) for made in module(*map(standin.inner_of, arguments))]

        self._call = call


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


@contextlib.contextmanager
def parts_on_standin():
    plain = plugins.runtime
    with patch.object(plugins, "runtime", lambda backend: OnStandin if backend == "torch" else plain(backend)):
        yield


def tell(told, step, timestep, latents):
    told.add(latents.device.type)


def compare(folder):
    host = load(folder)
    for task in host.family.pipelines:
        arguments, prompts = asked(task, host), ["a red circle", "two squares"]
        expected = host.generate(prompts, steps=2 * STEPS, **arguments)
        told = set()
        with parts_on_standin(), load(folder) as engine, standin.Standin():
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
