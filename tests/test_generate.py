"""Same latents in, same picture out, in every backend."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import bakeoff
from bakeoff.errors import ArtifactError, Cancelled, InputError, PickleError, RecipeError, UsageError
from bakeoff.pictures import psnr

PROMPTS = [
    "a large red circle on a white background",
    "a small blue star above a large green ring on a gray background",
    "a small yellow square left of a small purple triangle on a black background",
]
EXACT = ["torch:fp32", "onnx:fp32", "openvino:fp32"]
MIXED = "openvino:fp32,text_encoder=onnx:fp32,vae_decoder=torch:fp32"
SAME = {"seeds": 3, "steps": 8, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def engines(baked):
    opened = {}

    def engine(recipe):
        if recipe not in opened:
            opened[recipe] = bakeoff.load(baked(recipe), device="cpu")
        return opened[recipe]

    yield engine
    for each in opened.values():
        each.close()


@pytest.fixture(scope="module")
def reference(shapes):
    """Diffusers' own pipeline on the model's folder."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(shapes)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts, seeds, steps, guidance_scale, **options):
        noise = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        images = pipeline(
            prompts,
            latents=torch.stack(noise),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="np",
            **options,
        ).images
        return (images * 255).round().astype(np.uint8)

    return generate


def worst(a, b):
    return min(psnr(x, y) for x, y in zip(a, b, strict=True))


def test_torch_fp32_is_diffusers_bit_for_bit(engines, reference):
    got = engines("torch:fp32").generate(PROMPTS, **SAME).images
    assert np.array_equal(got, reference(PROMPTS, [3, 4, 5], 8, 3.0))


@pytest.mark.parametrize("recipe", [*EXACT[1:], MIXED])
def test_fp32_pictures_are_the_same_in_every_backend(engines, reference, recipe):
    got = engines(recipe).generate(PROMPTS, **SAME).images
    assert worst(got, reference(PROMPTS, [3, 4, 5], 8, 3.0)) >= 45


@pytest.mark.parametrize("recipe", EXACT)
def test_negative_prompts_reach_the_model(engines, reference, recipe):
    expected = reference(PROMPTS[:1], [3], 8, 3.0, negative_prompt=[PROMPTS[1]])
    got = engines(recipe).generate(PROMPTS[0], negative_prompts=PROMPTS[1], **SAME).images
    assert worst(got, expected) >= 45
    assert worst(got, engines(recipe).generate(PROMPTS[0], **SAME).images) < 45


@pytest.mark.parametrize("recipe", EXACT)
def test_another_size_is_not_baked(engines, reference, recipe):
    got = engines(recipe).generate(PROMPTS[0], seeds=3, steps=3, size=(96, 128)).images
    assert got.shape == (1, 96, 128, 3)
    assert np.ptp(got) > 20


@pytest.mark.parametrize("recipe", EXACT)
def test_a_prompts_picture_does_not_depend_on_the_others(engines, recipe):
    engine = engines(recipe)
    together = engine.generate(PROMPTS, **SAME).images
    alone = np.stack([engine.generate(p, **{**SAME, "seeds": 3 + i}).images[0] for i, p in enumerate(PROMPTS)])
    assert worst(together, alone) >= 50
    one_by_one = engine.generate(PROMPTS, max_batch=1, **SAME).images
    assert np.array_equal(one_by_one, alone)


def test_rows_with_different_guidance_run_in_one_batch(engines):
    engine = engines("torch:fp32")
    scales = [3.0, 1.0, 0.0, 7.5]
    prompts = [PROMPTS[1]] * 4
    together = engine.generate(prompts, seeds=[3] * 4, steps=8, guidance_scale=scales).images
    alone = [engine.generate(PROMPTS[1], seeds=3, steps=8, guidance_scale=scale).images[0] for scale in scales]
    assert worst(together, alone) >= 50
    assert psnr(alone[0], alone[3]) < 45


def test_families_without_row_guidance_run_in_groups(engines):
    from dataclasses import replace

    engine = engines("torch:fp32")
    plain = engine.family
    scales = [3.0, 1.0, 3.0, 1.0]
    prompts = [*PROMPTS, PROMPTS[0]]
    expected = engine.generate(prompts, seeds=3, steps=4, guidance_scale=scales).images
    engine.family = replace(plain, row_guidance=False)
    try:
        got = engine.generate(prompts, seeds=3, steps=4, guidance_scale=scales).images
    finally:
        engine.family = plain
    assert worst(got, expected) >= 50


def test_latents_can_be_given(engines):
    engine = engines("onnx:fp32")
    latents = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (3, 4, 5)])
    before = latents.clone()
    assert np.array_equal(
        engine.generate(PROMPTS, latents=latents, **SAME).images, engine.generate(PROMPTS, **SAME).images
    )
    assert torch.equal(latents, before)


def test_seeds_and_seconds_come_back(engines):
    result = engines("openvino:fp32").generate(PROMPTS[:2], steps=2, stages=True)
    assert len(result.seeds) == 2
    assert set(result.seconds) == {"text_encoder", "unet", "vae_decoder", "total"}
    assert sum(v for k, v in result.seconds.items() if k != "total") <= result.seconds["total"]
    again = engines("openvino:fp32").generate(PROMPTS[:2], steps=2, seeds=result.seeds)
    assert np.array_equal(result.images, again.images)


def test_the_callback_can_stop_between_steps(engines):
    seen = []

    def stop(step, timestep, latents):
        seen.append((step, timestep, tuple(latents.shape)))
        return step < 1

    engine = engines("openvino:fp32")
    with pytest.raises(Cancelled, match="after step 2"):
        engine.generate(PROMPTS[0], callback=stop, **SAME)
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][2] == (1, 4, 16, 16)
    assert engine.generate(PROMPTS[0], **SAME).images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": []}, "expected one text"),
        ({"prompts": [3]}, "expected one text"),
        ({"prompts": "a", "steps": 0}, "steps = 0"),
        ({"prompts": "a", "size": (60, 64)}, "multiples of 16"),
        ({"prompts": "a", "size": (0, 64)}, "multiples of 16"),
        ({"prompts": "a", "size": 64}, "height, width"),
        ({"prompts": ["a", "b"], "seeds": [1]}, "one for each of the 2 prompts"),
        ({"prompts": "a", "seeds": -1}, "from 0"),
        ({"prompts": ["a", "b"], "guidance_scale": [1.0]}, "one for each"),
        ({"prompts": "a", "latents": torch.zeros(1, 4, 8, 8)}, r"expected \(1, 4, 16, 16\)"),
        ({"prompts": "a", "max_batch": 0}, "max_batch = 0"),
    ],
)
def test_bad_input_is_refused_alike(engines, recipe, arguments, says):
    with pytest.raises(InputError, match=says):
        engines(recipe).generate(**arguments)


@pytest.mark.parametrize("prompt", ["", "x", "naïve 漢字 🎨", "a red circle " * 50])
def test_odd_prompts_work(engines, reference, prompt):
    got = engines("onnx:fp32").generate(prompt, seeds=3, steps=2, guidance_scale=3.0).images
    assert worst(got, reference([prompt], [3], 2, 3.0)) >= 45


def test_a_diffusers_folder_opens_unproved(shapes, reference):
    with bakeoff.load(shapes, device="cpu") as engine:
        assert not engine.proved
        got = engine.generate(PROMPTS[:1], **SAME).images
    assert np.array_equal(got, reference(PROMPTS[:1], [3], 8, 3.0))


def test_a_folder_without_manifest_opens_as_the_ecosystems(copied, engines):
    from bakeoff.artifact import MANIFEST

    folder = copied("onnx:fp32")
    (folder / MANIFEST).unlink()
    with bakeoff.load(folder, device="cpu") as engine:
        assert not engine.proved
        got = engine.generate(PROMPTS, **SAME).images
    assert np.array_equal(got, engines("onnx:fp32").generate(PROMPTS, **SAME).images)


def test_the_pipeline_is_genuine(engines):
    from diffusers import StableDiffusionPipeline

    pipeline = engines("onnx:fp32").pipeline
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.to("cpu") is pipeline
    image = pipeline(PROMPTS[0], num_inference_steps=2).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.to("cuda"),
        lambda p: p.to(torch.float16),
        lambda p: p.enable_model_cpu_offload(),
        lambda p: p.enable_sequential_cpu_offload(),
        lambda p: p.enable_attention_slicing(),
        lambda p: p.save_pretrained("x"),
        lambda p: p.load_lora_weights("x"),
        lambda p: p.load_textual_inversion("x"),
        lambda p: p.fuse_lora(),
        lambda p: p(PROMPTS[0], num_inference_steps=1, clip_skip=1),
        lambda p: p(PROMPTS[0], num_inference_steps=1, cross_attention_kwargs={"gligen": {}}),
    ],
)
def test_nothing_on_the_pipeline_is_a_silent_no_op(engines, call):
    with pytest.raises(InputError):
        call(engines("onnx:fp32").pipeline)


def test_vae_tiling_and_slicing_stay_diffusers_own(engines):
    engine = engines("onnx:fp32")
    vae = engine.pipeline.vae
    whole = engine.generate(PROMPTS[:2], seeds=3, steps=2).images
    vae.enable_slicing()
    sliced = engine.generate(PROMPTS[:2], seeds=3, steps=2).images
    vae.disable_slicing()
    assert worst(whole, sliced) >= 50
    vae.enable_tiling()
    tiled = engine.generate(PROMPTS[:1], seeds=3, steps=2, size=(128, 128)).images
    vae.disable_tiling()
    assert tiled.shape == (1, 128, 128, 3)


@pytest.mark.slow
def test_fractional_timesteps_need_a_float_port(baked):
    from diffusers import EulerDiscreteScheduler

    with bakeoff.load(baked("openvino:fp32"), device="cpu") as engine:
        engine.pipeline.scheduler = EulerDiscreteScheduler.from_config(
            engine.pipeline.scheduler.config, timestep_spacing="linspace"
        )
        with pytest.raises(InputError, match="timestep_spacing"):
            engine.generate(PROMPTS[0], steps=7)
    pictures = []
    for recipe in ("openvino:fp32+timestep=f32", "torch:fp32"):
        with bakeoff.load(baked(recipe), device="cpu") as engine:
            engine.pipeline.scheduler = EulerDiscreteScheduler.from_config(
                engine.pipeline.scheduler.config, timestep_spacing="linspace"
            )
            pictures.append(engine.generate(PROMPTS, seeds=3, steps=7, guidance_scale=3.0).images)
    assert worst(*pictures) >= 45


def test_ancestral_noise_comes_from_each_prompts_own_generator(engines):
    from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

    engine = engines("torch:fp32")
    plain = engine.pipeline.scheduler
    assert isinstance(plain, DDIMScheduler)
    engine.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(plain.config)
    try:
        together = engine.generate(PROMPTS, seeds=3, steps=6).images
        alone = [engine.generate(p, seeds=3 + i, steps=6).images[0] for i, p in enumerate(PROMPTS)]
    finally:
        engine.pipeline.scheduler = plain
    assert worst(together, alone) >= 45


@pytest.mark.slow
def test_bf16_is_within_its_floor(engines):
    """The distance of each runtime's bf16 from torch fp32, against torch's own."""
    exact = engines("torch:fp32").generate(PROMPTS, **SAME).images.astype(float)
    errors = {}
    for recipe in ("torch:bf16", "openvino:bf16", "openvino:fp32"):
        got = engines(recipe).generate(PROMPTS, **SAME).images
        errors[recipe] = np.sqrt(np.mean((got - exact) ** 2))
    assert errors["openvino:bf16"] <= 2 * errors["torch:bf16"] + 0.5
    ran = engines("openvino:bf16").configuration["unet"]["precision"]
    assert ran["bf16"] > 0
    assert engines("openvino:fp32").configuration["unet"]["precision"].get("bf16", 0) == 0


def test_a_folder_with_a_safety_checker_opens_without_it(diffusers_folder):
    index = json.loads((diffusers_folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (diffusers_folder / "model_index.json").write_text(json.dumps(index))
    (diffusers_folder / "safety_checker").mkdir()
    with bakeoff.load(diffusers_folder, device="cpu") as engine:
        assert engine.pipeline.safety_checker is None
        assert len(engine.generate(PROMPTS[0], steps=1).images) == 1


def test_pickles_are_not_opened(diffusers_folder):
    unet = diffusers_folder / "unet" / "diffusion_pytorch_model"
    unet.with_suffix(".safetensors").rename(unet.with_suffix(".bin"))
    with pytest.raises(PickleError, match="pickles"):
        bakeoff.load(diffusers_folder)


def test_a_folder_that_lacks_a_part_says_which(diffusers_folder):
    shutil.rmtree(diffusers_folder / "unet")
    with pytest.raises(ArtifactError, match="no unet"):
        bakeoff.load(diffusers_folder)


@pytest.mark.parametrize("method", ["to", "half", "save_pretrained"])
def test_the_vae_refuses_what_would_do_nothing(engines, method):
    with pytest.raises(InputError, match="runtime-backed"):
        getattr(engines("torch:fp32").pipeline.vae, method)("cuda")


@pytest.mark.parametrize(
    "bad", [{"seeds": 1.5}, {"negative_prompts": 5}, {"prompts": 5}, {"guidance_scale": float("nan")}, {"steps": 0}]
)
def test_bad_arguments_are_refused_plainly(engines, bad):
    with pytest.raises(InputError, match="got"):
        engines("torch:fp32").generate(**{"prompts": PROMPTS[0], **bad})


def test_each_engine_keeps_its_threads(baked):
    seen = []
    with bakeoff.load(baked("torch:fp32"), device="cpu", threads=2) as first:
        first.generate(PROMPTS[0], steps=1)
        with bakeoff.load(baked("torch:fp32"), device="cpu", threads=1) as second:
            second.generate(PROMPTS[0], steps=1)
        for station in filter(lambda station: station.runtime, first._stations.values()):
            station.runtime._module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        first.generate(PROMPTS[0], steps=1)
    assert set(seen) == {2}
    with pytest.raises(RecipeError, match="threads"):
        bakeoff.load(baked("torch:fp32"), threads=0)


@pytest.mark.parametrize("idle", [{"compile": True}, {"provider": "CPUExecutionProvider"}])
def test_options_that_no_part_has_are_refused(baked, idle):
    with pytest.raises(UsageError, match="does nothing here"):
        bakeoff.load(baked("openvino:fp32"), **idle)


@pytest.fixture
def diffusers_folder(shapes, tmp_path):
    return Path(shutil.copytree(shapes, tmp_path / "model"))
