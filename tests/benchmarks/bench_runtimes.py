"""One run of each part of `shapes` as a guided picture takes it, on each runtime, with one thread."""

import pytest
import torch

from bakeoff.components.component import Sizes
from bakeoff.recipe import Placement
from bakeoff.runtimes.opening import open_part, read_folder

RECIPES = ["torch:fp32", "torch:bf16", "onnx:fp32", "openvino:fp32", "openvino:bf16"]
ROWS = {"text_encoder": 1, "unet": 2, "vae_decoder": 1}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ROWS)
def test_run(benchmark, baked, name, recipe):
    benchmark.group = f"run: {name}"
    folder = read_folder(baked(recipe))
    part = folder.family.part(name)
    with open_part(folder.folders[name], part, folder.parts[name], Placement(device="cpu", threads=1)) as runtime:
        benchmark(runtime.run, example(part.component, folder.config(part), runtime.inputs, ROWS[name]))


def example(component, config, ports, rows):
    """Inputs in the dtype and rank that the file has: an exported timestep may be an int64 of rank 1."""
    sizes = Sizes(batch=rows, height=16, width=16, sequence=32)
    tensors = component.example(config, sizes, seed=0)
    shapes = {port.name: port.shape({**sizes.as_dict(), "steps": 1}) for port in ports}
    return {port.name: tensors[port.name].to(getattr(torch, port.dtype)).reshape(shapes[port.name]) for port in ports}
