"""Every family, as a tiny random pipeline: the artifact's picture is Diffusers' own from the same latents."""

import inspect
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bakeoff import plugins
from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.components.component import Sizes
from bakeoff.errors import InputError, UsageError
from bakeoff.models.tiny import build
from bakeoff.naming import layer_names
from bakeoff.parity.budget import FP32_LEAST
from bakeoff.parity.distance import relative_error
from bakeoff.recipe import parse
from bakeoff.runtimes.engine import load
from bakeoff.runtimes.request import row_generator
from bakeoff.sources.source import Source

FAMILIES = plugins.names("families")
OFTEN = {"stable-diffusion", "stable-diffusion-xl", "flux"}
"""Whose every case `make test` runs, in torch; of the others, one picture."""
PROMPTS = ["a red circle", "two small green squares, left of a star; 一只猫"]
SIZE = (64, 96)
STEPS = 3


def guided(family, scale, count):
    """Return what guides a family's pipelines by a scale."""
    unconditional = {} if family.unconditional is None else {"negative_prompt": [family.unconditional] * count}
    return {family.guidance_argument: scale, **unconditional}


def eager(folder, guidance_scale, steps=STEPS, **arguments):
    """Run Diffusers' own pipeline."""
    from diffusers import DiffusionPipeline

    family = Source.open(str(folder)).family
    arguments = {**guided(family, guidance_scale, len(arguments["prompt"])), **arguments}
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(output_type="np", num_inference_steps=steps, **arguments).images


def note(family, task, backend, decibels):
    """Keep a figure where `RECORD` names a file, for the table in the docs."""
    if "RECORD" in os.environ:
        file = Path(os.environ["RECORD"])
        found = json.loads(file.read_text()) if file.exists() else {}
        found.setdefault(family, {}).setdefault(task, {})[backend] = round(float(decibels), 1)
        file.write_text(json.dumps(found, indent=1) + "\n")


def psnr(got, expected):
    error = np.mean((got.astype(float) / 255 - expected) ** 2)
    return -10 * np.log10(max(error, 1e-12))


@pytest.fixture(scope="module")
def artifacts(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("artifacts")

    def get(family, backend):
        folder = root / f"{family}-{backend}"
        if not folder.exists():
            lenders = [other for other in root.glob(f"*-{backend}") if (other / "bakeoff.json").exists()]
            recipe = parse(f"{backend}:fp32")[0]
            export(str(tiny(family)), folder, recipe, reuse=lenders, prove=backend != "torch")
        return folder

    return get


def latents_of(folder, count):
    source = Source.open(str(folder))
    configs = {part.module: source.config(part.module) for part in source.parts}
    shape = source.family.latent_shape(configs, count, *SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def run_eager(folder, task, guidance_scale, **arguments):
    """Run Diffusers' own pipeline for a task, with a generator and a picture a row, as the engine does."""
    family = Source.open(str(folder)).family
    arguments |= guided(family, guidance_scale, len(PROMPTS))
    pipeline = family.pipeline_class(task).from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return pipeline(
        prompt=list(PROMPTS), output_type="np", num_inference_steps=STEPS, generator=generators, **arguments
    ).images


def picture(seed=0):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def mask():
    from PIL import Image

    pixels = np.zeros(SIZE, np.uint8)
    pixels[16:48, 24:72] = 255
    return Image.fromarray(pixels)


def sides(family=None, task=None):
    """Return height and width as arguments, where a family's pipeline for a task takes them."""
    implied = family in {"stable-diffusion", "stable-diffusion-xl"} and task == "image-to-image"
    return {} if implied else {"height": SIZE[0], "width": SIZE[1]}


def fewest_steps(name):
    return next(family.fewest_steps for family in plugins.families() if family.name == name)


def cases(*, often=OFTEN, with_pictures=False):
    """Every family with every backend; `make test` lowers the embedded model's denoiser elsewhere, and runs these in torch."""
    for family in (family.name for family in plugins.families() if len(family.pipelines) > with_pictures):
        for backend in ("torch", "onnx", "openvino"):
            everyday = backend == "torch" and family in often
            yield pytest.param(family, backend, marks=() if everyday else pytest.mark.slow)


def in_torch(families, often=OFTEN):
    return [pytest.param(family, marks=() if family in often else pytest.mark.slow) for family in families]


@pytest.mark.parametrize(("family", "backend"), list(cases(often=FAMILIES)))
def test_text_to_image_is_diffusers_picture(tiny, artifacts, family, backend):
    folder = tiny(family)
    latents = latents_of(folder, len(PROMPTS))
    expected = eager(folder, prompt=list(PROMPTS), height=SIZE[0], width=SIZE[1], guidance_scale=3.0, latents=latents)
    with load(artifacts(family, backend)) as engine:
        got = engine.generate(PROMPTS, guidance_scale=3.0, steps=STEPS, size=SIZE, latents=latents).images
    note(family, "text-to-image", backend, psnr(got, expected))
    assert expected.std() > 0.01
    assert psnr(got, expected) > 45


@pytest.mark.parametrize(("family", "backend"), list(cases(with_pictures=True)))
@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
def test_a_picture_to_start_from_gives_diffusers_picture(tiny, artifacts, family, backend, task):
    folder = tiny(family)
    given = {"image": picture()} | ({"mask": mask()} if task == "inpainting" else {})
    theirs = {"image": [picture()] * 2} | ({"mask_image": [mask()] * 2} if task == "inpainting" else {})
    theirs |= sides(family, task)
    expected = run_eager(folder, task, guidance_scale=3.0, strength=0.7, **theirs)
    with load(artifacts(family, backend)) as engine:
        got = engine.generate(PROMPTS, guidance_scale=3.0, steps=STEPS, seeds=5, strength=0.7, **given).images
    note(family, task, backend, psnr(got, expected))
    assert expected.std() > 0.01
    assert psnr(got, expected) > 45


@pytest.mark.parametrize(("family", "backend"), list(cases(often={"stable-diffusion"}, with_pictures=True)))
@pytest.mark.parametrize("strength", [0.34, 1.0])
def test_a_picture_keeps_nearly_all_or_nothing(tiny, artifacts, family, backend, strength):
    """One of three steps, and all of them; 0 is refused."""
    theirs = {"strength": strength, "image": [picture()] * 2, **sides(family, "image-to-image")}
    expected = run_eager(tiny(family), "image-to-image", guidance_scale=3.0, **theirs)
    with load(artifacts(family, backend)) as engine:
        settings = {"guidance_scale": 3.0, "steps": STEPS, "seeds": 5, "image": picture()}
        got = engine.generate(PROMPTS, strength=strength, **settings).images
        with pytest.raises(InputError, match="strength = 0"):
            engine.generate(PROMPTS, strength=0, **settings)
    assert psnr(got, expected) > 45


def test_an_inpainting_unet_takes_nine_channels(tmp_path):
    folder = build("stable-diffusion", tmp_path / "model", changes={"unet": {"in_channels": 9}})
    export(str(folder), tmp_path / "artifact", parse("torch:fp32")[0], prove=False)
    theirs = {"image": [picture()] * 2, "mask_image": [mask()] * 2, "height": SIZE[0], "width": SIZE[1]}
    expected = run_eager(folder, "inpainting", guidance_scale=3.0, strength=1.0, **theirs)
    with load(tmp_path / "artifact") as engine:
        got = engine.generate(
            PROMPTS, guidance_scale=3.0, steps=STEPS, seeds=5, strength=1.0, image=picture(), mask=mask()
        ).images
        assert psnr(got, expected) > 45
        with pytest.raises(InputError, match="made for inpainting"):
            engine.generate("a circle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": mask()}, "without an image"),
        ({"strength": 0.5}, "without an image"),
        ({"image": picture(), "strength": 0}, "strength = 0"),
        ({"image": picture(), "strength": 1.5}, "strength = 1.5"),
        ({"image": picture(), "strength": 0.1, "steps": 3}, "at least one step"),
        ({"image": picture(), "mask": mask().resize((32, 32))}, "the same size"),
        ({"image": picture().convert("RGBA")}, "alpha channel"),
        ({"image": "picture.png"}, "PIL image"),
        ({"image": np.zeros((64, 64, 3))}, "uint8"),
        ({"image": [picture()] * 3}, "got 3 pictures"),
        ({"image": picture().resize((65, 64))}, "multiples of"),
        ({"image": picture(), "mask": mask().convert("LA")}, "mask with an alpha channel"),
        ({"image": picture(), "strength": "half"}, "strength = 'half'"),
        ({"image": picture(), "strength": float("nan")}, "strength = nan"),
        ({"control_image": picture().convert("RGBA")}, "control_image with an alpha channel"),
        ({"image": picture(), "latents": torch.zeros(1, 4, 8, 8)}, "leave out one"),
    ],
)
def test_what_cannot_be_meant_is_an_error(artifacts, arguments, message):
    with load(artifacts("stable-diffusion", "torch")) as engine:
        with pytest.raises(InputError, match=message):
            engine.generate("a circle", **{"steps": STEPS, **arguments})


def test_a_picture_of_another_size_is_resized_when_asked_to(artifacts):
    with load(artifacts("stable-diffusion", "torch")) as engine:
        images = engine.generate("a circle", image=picture().resize((200, 90)), size=SIZE, steps=STEPS).images
    assert images.shape == (1, *SIZE, 3)


@pytest.mark.parametrize("backend", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_flux_schnell_has_no_guidance(tmp_path, backend):
    folder = build("flux", tmp_path / "model", changes={"transformer": {"guidance_embeds": False}})
    latents = latents_of(folder, len(PROMPTS))
    expected = eager(folder, prompt=list(PROMPTS), guidance_scale=0.0, latents=latents, **sides())
    export(str(folder), tmp_path / "artifact", parse(f"{backend}:fp32")[0], prove=backend != "torch")
    with load(tmp_path / "artifact") as engine:
        settings = {"steps": STEPS, "size": SIZE, "latents": latents}
        got = engine.generate(PROMPTS, guidance_scale=0.0, **settings).images
        by_default = engine.generate(PROMPTS, **settings).images
    assert psnr(got, expected) > 45
    assert np.array_equal(got, by_default)


@pytest.mark.parametrize(
    "family", in_torch(["stable-diffusion-xl", "stable-diffusion-3", "z-image"], often={"stable-diffusion-xl"})
)
def test_turbo_models_draw_without_guidance_in_few_steps(tmp_path, family):
    """SDXL Turbo with the scheduler it comes with, whose noise is from each row's own generator."""
    from diffusers import EulerAncestralDiscreteScheduler

    folder = build(family, tmp_path / "model")
    if family == "stable-diffusion-xl":
        EulerAncestralDiscreteScheduler(timestep_spacing="trailing").save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "EulerAncestralDiscreteScheduler"]
        (folder / "model_index.json").write_text(json.dumps(index))
    export(str(folder), tmp_path / "artifact", parse("torch:fp32")[0], prove=False)
    with load(tmp_path / "artifact") as engine:
        for steps in (1, 4):
            drawn = [row_generator(seed, latents_of(folder, 1).shape[1:]) for seed in (5, 6)]
            given = {"generator": [row[0] for row in drawn], "latents": torch.stack([row[1] for row in drawn])}
            expected = eager(folder, prompt=list(PROMPTS), guidance_scale=0.0, steps=steps, **given, **sides())
            got = engine.generate(PROMPTS, guidance_scale=0.0, steps=steps, size=SIZE, seeds=[5, 6]).images
            assert psnr(got, expected) > 45


def test_sizes_beyond_the_positions_are_refused(artifacts):
    with load(artifacts("stable-diffusion-3", "torch")) as engine:
        with pytest.raises(InputError, match="positions for 512"):
            engine.generate("a circle", size=(528, 64))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
def test_sd_3_5_medium_takes_a_quarter_to_two_megapixels(tmp_path, backend):
    """With the real table of positions; its transformer alone, whose tokens are what grows."""
    real = {"sample_size": 128, "pos_embed_max_size": 384}
    folder = build("stable-diffusion-3", tmp_path / "model", changes={"transformer": real})
    artifact = export(
        str(folder), tmp_path / "artifact", parse(f"torch:fp32,transformer={backend}:fp32")[0], prove=False
    )
    (part,) = [part for part in Source.open(str(folder)).parts if part.name == "transformer"]
    config = json.loads((folder / "transformer" / "config.json").read_text())
    flat = part.component.flat(part.component.load(folder / "transformer", torch.float32))
    with load(artifact.folder) as engine:
        for height, width in ((512, 512), (768, 1024), (1024, 1024), (512, 1408), (1408, 1408)):
            inputs = part.component.example(config, Sizes(1, height // 8, width // 8, 333), seed=1)
            with torch.no_grad():
                (expected,) = flat(*inputs.values())
            got = engine.pipeline.transformer(**inputs).sample
            assert relative_error(got, expected) < FP32_LEAST
        assert engine.generate("a circle", steps=1, size=(512, 512)).images.shape == (1, 512, 512, 3)
        with pytest.raises(InputError, match="positions for 6144"):
            engine.generate("a circle", size=(6160, 512))


def test_a_text_encoder_may_be_left_out(tmp_path):
    folder = build("stable-diffusion-3", tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    artifact = export(str(folder), tmp_path / "artifact", parse("torch:fp32")[0], prove=False)
    assert "text_encoder_3" not in artifact.manifest.parts
    with load(artifact.folder) as engine:
        assert engine.generate("a circle", steps=1, size=(64, 64)).images.shape == (1, 64, 64, 3)


def test_negative_prompts_are_refused_where_they_would_be_ignored(artifacts):
    with load(artifacts("flux", "torch")) as engine:
        with pytest.raises(InputError, match="takes no negative prompts"):
            engine.generate("a circle", negative_prompts="blurry")


def test_tiny_pipelines_are_the_same_each_time(tmp_path):
    first, second = build("z-image", tmp_path / "a"), build("z-image", tmp_path / "b")
    for file in sorted(path for path in first.rglob("*") if path.is_file()):
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file
    with pytest.raises(UsageError, match="unknown family"):
        build("no-such-family", tmp_path / "c")


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("onnx", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "family", [family for family in plugins.families() if "controlnet" in family.variants], ids=lambda f: f.name
)
@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "inpainting"])
def test_a_controlnet_gives_diffusers_picture(tiny, controlled, family, backend, task):
    import diffusers

    folder, artifact = controlled(family.name, backend)
    plain = getattr(diffusers, family.variant("controlnet").pipelines[task])
    pipeline = plain.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    given, theirs = {}, {"height": SIZE[0], "width": SIZE[1]}
    taken = inspect.signature(pipeline.__call__).parameters
    control = "control_image" if "control_image" in taken else "image"
    if task != "text-to-image":
        given, theirs = {"image": picture(), "strength": 0.7}, {**theirs, "image": [picture()] * 2, "strength": 0.7}
    if task == "inpainting":
        given["mask"], theirs["mask_image"] = mask(), [mask()] * 2
    theirs |= {control: [picture(3)] * 2, "controlnet_conditioning_scale": 0.8}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    if task == "text-to-image":
        latents = latents_of(tiny(family.name), 2)
        given["latents"] = theirs["latents"] = latents
        generators = [row_generator(seed, latents.shape[1:])[0] for seed in (5, 6)]
    expected = pipeline(
        prompt=list(PROMPTS),
        output_type="np",
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=generators,
        **theirs,
    ).images
    with load(artifact) as engine:
        common = {"guidance_scale": 3.0, "steps": STEPS, "seeds": 5, "size": SIZE, "control_scale": 0.8}
        got = engine.generate(PROMPTS, control_image=picture(3), **common, **given).images
        other = engine.generate(PROMPTS, control_image=picture(4), **common, **given).images
        with pytest.raises(InputError, match="no control image"):
            engine.generate("a circle")
    note(family.name, f"ControlNet, {task}", backend, psnr(got, expected))
    assert psnr(got, expected) > 45
    assert not np.array_equal(got, other)


@pytest.fixture(scope="module")
def controlled(tiny, tmp_path_factory):
    """A family's tiny pipeline with a ControlNet, and an artifact of it."""
    root = tmp_path_factory.mktemp("controlled")

    def get(family, backend):
        folder, target = tiny(family, "controlnet"), root / f"{family}-{backend}"
        if not target.exists():
            recipe = parse(f"{backend}:fp32")[0]
            lenders = [other for other in root.glob(f"*-{backend}") if (other / "bakeoff.json").exists()]
            controlnet = str(folder / "controlnet")
            export(str(tiny(family)), target, recipe, controlnet=controlnet, reuse=lenders, prove=backend != "torch")
        return folder, target

    return get


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_image": picture().convert("RGBA")}, "control_image with an alpha channel"),
        ({"control_image": [picture()] * 3}, "got 3 pictures as control_image"),
        ({"control_image": picture(), "control_scale": float("inf")}, "control_scale = inf"),
        ({"control_image": picture(), "control_scale": "much"}, "control_scale = 'much'"),
        ({"control_image": picture().resize((60, 60))}, "multiples of"),
    ],
)
def test_what_a_controlnet_cannot_follow_is_an_error(controlled, arguments, message):
    with load(controlled("stable-diffusion", "torch")[1]) as engine:
        with pytest.raises(InputError, match=message):
            engine.generate("a circle", steps=1, **arguments)
        resized = engine.generate("a circle", steps=1, size=SIZE, control_image=picture().resize((60, 60)))
    assert resized.images.shape == (1, *SIZE, 3)


def test_an_artifact_with_a_controlnet_is_up_to_date(controlled, tiny, capsys):
    folder, target = controlled("stable-diffusion", "torch")
    asked = ["why-rebuild", str(target), str(tiny("stable-diffusion")), "--recipe", "torch:fp32"]
    assert main([*asked, "--controlnet", str(folder / "controlnet")]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert main(asked) == 0
    assert "up to date" not in capsys.readouterr().out


def test_a_controlnet_is_refused_where_there_is_none(tiny, artifacts, tmp_path):
    with load(artifacts("stable-diffusion", "torch")) as engine:
        with pytest.raises(InputError, match="no ControlNet"):
            engine.generate("a circle", control_image=picture())
    with pytest.raises(UsageError, match="z-image takes no controlnet"):
        export(str(tiny("z-image")), tmp_path / "a", parse("torch:fp32")[0], controlnet=str(tmp_path))


@pytest.mark.parametrize(("family", "backend"), list(cases()))
@pytest.mark.parametrize(("guidance", "steps"), [(0.0, 1), (1.0, 2), (4.0, 2)])
def test_prompts_of_any_length_with_and_without_guidance(tiny, artifacts, family, backend, guidance, steps):
    """In batches of one and of three."""
    if steps < fewest_steps(family):
        with load(artifacts(family, backend)) as engine, pytest.raises(InputError, match=f"steps = {steps}"):
            engine.generate(PROMPTS, steps=steps, size=SIZE)
        return
    prompts = ["", "a", "x" * 75, "x" * 76, "y" * 500, "猫 на окне"]
    folder = tiny(family)
    latents = latents_of(folder, len(prompts))
    common = {"height": SIZE[0], "width": SIZE[1], "guidance_scale": guidance, "latents": latents}
    expected = eager(folder, prompt=list(prompts), steps=steps, **common)
    with load(artifacts(family, backend)) as engine:
        settings = {"guidance_scale": guidance, "steps": steps, "size": SIZE}
        got = engine.generate(prompts, latents=latents, max_batch=3, **settings).images
        alone = engine.generate(prompts[4], latents=latents[4:5], **settings).images
    assert psnr(got, expected) > 45
    assert psnr(alone[0], expected[4]) > 45


@pytest.mark.parametrize("family", in_torch(f.name for f in plugins.families() if f.negative_prompts))
def test_negative_prompts_count_as_in_diffusers(tiny, artifacts, family):
    folder = tiny(family)
    latents = latents_of(folder, 2)
    unwanted = ["blurry", ""]
    common = {"height": SIZE[0], "width": SIZE[1], "guidance_scale": 5.0, "latents": latents}
    expected = eager(folder, prompt=list(PROMPTS), negative_prompt=list(unwanted), **common)
    with load(artifacts(family, "torch")) as engine:
        settings = {"guidance_scale": 5.0, "steps": STEPS, "size": SIZE, "latents": latents}
        got = engine.generate(PROMPTS, negative_prompts=unwanted, **settings).images
        without = engine.generate(PROMPTS, **settings).images
    assert psnr(got, expected) > 45
    assert not np.array_equal(got[0], without[0])


@pytest.mark.parametrize("family", in_torch(FAMILIES))
def test_rows_may_differ_in_guidance(artifacts, family):
    with load(artifacts(family, "torch")) as engine:
        settings = {"steps": 2, "size": SIZE, "seeds": [1, 2]}
        mixed = engine.generate(PROMPTS, guidance_scale=[0.0, 6.0], **settings).images
        first = engine.generate(PROMPTS, guidance_scale=0.0, **settings).images[0]
        second = engine.generate(PROMPTS, guidance_scale=6.0, **settings).images[1]
    assert psnr(mixed[0], first / 255) > 45
    assert psnr(mixed[1], second / 255) > 45


@pytest.mark.parametrize("family", in_torch(FAMILIES))
@pytest.mark.parametrize("size", [(65, 64), (64, 72), (0, 64)])
def test_sizes_that_do_not_divide_are_refused_with_the_nearest(artifacts, family, size):
    with load(artifacts(family, "torch")) as engine:
        with pytest.raises(InputError, match="multiples of 16") as raised:
            engine.generate("a circle", size=size)
    assert "size=(" in raised.value.fix


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_name_in_the_checkpoint(tiny, family):
    """Recipes, calibrations and low-bit weights go by these names."""
    source = Source.open(str(tiny(family)))
    for part in source.parts:
        module = part.component.load(source.path(part.module), torch.float32)
        layers = (torch.nn.Linear, torch.nn.Conv2d)
        paths = [path for path, layer in module.named_modules() if isinstance(layer, layers)]
        names = layer_names(paths, source.checkpoint(part.module))
        assert set(paths) == set(names), part.name
        assert len(set(names.values())) == len(paths), part.name


def narrow():
    """Each family with each narrow recipe of torch; by default those that have gone wrong."""
    wrong = {("qwen-image", "bf16"), ("flux", "int8"), ("flux", "nf4"), ("stable-diffusion-xl", "fp8")}
    for family in FAMILIES:
        for precision in ("bf16", "fp16", "int8", "nf4", "int4", "w8a8-dynamic", "fp8"):
            marks = () if (family, precision) in wrong else pytest.mark.slow
            yield pytest.param(family, precision, marks=marks)


@pytest.mark.parametrize(("family", "precision"), list(narrow()))
def test_narrow_recipes_of_torch_draw_nearly_the_same(tiny, artifacts, tmp_path, family, precision):
    recipe = f"torch:{precision},vae_encoder=torch:bf16,vae_decoder=torch:bf16"
    export(str(tiny(family)), tmp_path / "narrow", parse(recipe)[0], prove=False)
    arguments = {"seeds": 1, "steps": max(STEPS, fewest_steps(family)), "size": SIZE}
    pictures = []
    for folder in (artifacts(family, "torch"), tmp_path / "narrow"):
        with load(folder) as engine:
            pictures.append(engine.generate(PROMPTS[0], **arguments).images)
    assert psnr(pictures[1], pictures[0] / 255) > (30 if precision in {"bf16", "fp16"} else 20)
