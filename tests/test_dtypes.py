"""Sources in any dtype under any recipe: the picture is that of Diffusers in fp32 from the same files."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeoff.bake import export
from bakeoff.recipe import parse
from bakeoff.runtimes.engine import load
from bakeoff.sources.source import Source

SIZE = (64, 64)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def mixed(module):
    """Return a dtype for a tensor's name: every third is another."""
    return lambda name: (HALF, BRAIN, FULL)[hash_of(f"{module}.{name}") % 3]


def hash_of(name):
    return sum(name.encode())


DTYPES = {
    "fp32": lambda module: lambda name: FULL,
    "fp16": lambda module: lambda name: HALF,
    "bf16": lambda module: lambda name: BRAIN,
    "a dtype a part": lambda module: lambda name: {"unet": HALF, "vae": FULL}.get(module, BRAIN),
    "mixed in each part": mixed,
}


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """A tiny pipeline's folder, its tensors in other dtypes; and what Diffusers draws from it in fp32."""
    root = tmp_path_factory.mktemp("stored")
    drawn = {}

    def get(kind):
        folder = root / kind.replace(" ", "-")
        if not folder.exists():
            shutil.copytree(tiny("stable-diffusion"), folder)
            for file in folder.glob("*/*.safetensors"):
                dtype = DTYPES[kind](file.parent.name)
                tensors = {name: tensor.to(dtype(name)) for name, tensor in load_file(file).items()}
                save_file(tensors, file, {"format": "pt"})
            drawn[kind] = eager(folder)
        return folder, drawn[kind]

    return get


def latents():
    return torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))


def eager(folder):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    given = {"height": SIZE[0], "width": SIZE[1], "guidance_scale": 3.0, "latents": latents()}
    return pipeline("a red circle", output_type="np", num_inference_steps=3, **given).images


def psnr(got, expected):
    error = ((got.astype(float) / 255 - expected) ** 2).mean()
    return -10 * torch.log10(torch.tensor(max(error, 1e-12))).item()


def cases():
    """Each kind of source in torch; in ONNX, whose lowering is slow, one part of the worst kind, and all parts of two."""
    for kind in DTYPES:
        yield pytest.param(kind, "torch:fp32", 45, marks=pytest.mark.slow if kind in {"fp32", "bf16"} else ())
    for kind in ("fp32", "mixed in each part"):
        yield pytest.param(kind, "torch:bf16", 25)
    yield pytest.param("mixed in each part", "torch:fp32,text_encoder=onnx:fp32", 45, marks=pytest.mark.slow)
    for kind in ("fp16", "mixed in each part"):
        yield pytest.param(kind, "onnx:fp32", 45, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kind", "recipe", "decibels"), list(cases()))
def test_any_source_bakes_under_any_recipe(stored, tmp_path, kind, recipe, decibels):
    folder, expected = stored(kind)
    artifact = export(str(folder), tmp_path / "artifact", parse(recipe)[0], prove=False)
    with load(tmp_path / "artifact") as engine:
        got = engine.generate("a red circle", guidance_scale=3.0, steps=3, size=SIZE, latents=latents()).images
    assert expected.std() > 0.01
    assert psnr(got, expected) > decibels
    dtype = "float32" if recipe.endswith("fp32") else "bfloat16"
    assert all(part.weight_bytes[dtype] > 1000 for part in artifact.manifest.parts.values())


@pytest.mark.slow
def test_a_proof_holds_for_a_mixed_source(stored, tmp_path):
    folder, _ = stored("mixed in each part")
    for recipe in ("torch:fp32", "torch:bf16"):
        assert export(str(folder), tmp_path / recipe, parse(recipe)[0]).manifest.proved


def test_the_kinds_are_what_they_say(stored):
    def dtypes(kind):
        entries = Source.open(str(stored(kind)[0])).checkpoint("unet").entries.values()
        return {entry.dtype for entry in entries} & {"F16", "BF16", "F32"}

    found = {kind: dtypes(kind) for kind in DTYPES}
    assert found["mixed in each part"] == {"F16", "BF16", "F32"}
    assert found["a dtype a part"] == {"F16"}
