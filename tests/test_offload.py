"""Whatever is done about memory, the picture is the same, unless it is said to be lossy."""

import json
import shutil

import numpy as np
import pytest
import torch

import bakeoff
from bakeoff import cli, footprint
from bakeoff.bake import export
from bakeoff.errors import RecipeError, UsageError
from bakeoff.pictures import psnr
from bakeoff.recipe import Placement, parse
from bakeoff.runtimes.offload import Decoding, Need, decide

BACKENDS = ["torch:fp32", "openvino:fp32", "onnx:fp32"]
"""In another order than those of test_generate.py: two processes bake them meanwhile, and don't wait for each other."""
PROMPTS = ["a large red circle on a white background", "a small blue star on a gray background"]
SAME = {"seeds": 3, "steps": 2, "guidance_scale": 3.0}
LARGE = {"steps": 1, "guidance_scale": 1.0, "size": (96, 128)}
"""Larger than a tile of the VAE of `shapes`, which has 64 pixels."""
GB = 10**9
PARTS = [
    Need("text_encoder", "text", 2 * GB, 1),
    Need("unet", "denoising", 4 * GB, 1),
    Need("vae_decoder", "vae", 1 * GB),
]


def worst(a, b):
    return min(psnr(x, y) for x, y in zip(a, b, strict=True))


def generate(folder, prompts=PROMPTS, arguments=SAME, **placement):
    with bakeoff.load(folder, device="cpu", threads=1, **placement) as engine:
        return engine.generate(prompts, **arguments), engine.configuration


@pytest.fixture(scope="module")
def plain(baked):
    """An artifact's pictures with all parts open."""
    made = {}

    def get(recipe):
        if recipe not in made:
            made[recipe] = generate(baked(recipe), offload="none")[0].images
        return made[recipe]

    return get


@pytest.mark.parametrize(
    ("usable", "rows", "unload", "mapped", "slicing", "tiling"),
    [
        (20 * GB, 4, False, set(), False, False),
        (9 * GB, 4, False, set(), True, False),
        (7.5 * GB, 1, True, set(), False, False),
        (4.5 * GB, 4, True, set(), True, False),
        (3 * GB, 1, True, {"unet"}, False, False),
        (1.5 * GB, 1, True, {"text_encoder", "unet"}, False, True),
    ],
)
def test_auto_does_no_more_than_needed(usable, rows, unload, mapped, slicing, tiling):
    found = decide(Placement(), PARTS, Decoding(rows, 1 * GB, GB // 4), usable)
    assert (found.unload, set(found.mapped), found.slicing, found.tiling) == (unload, mapped, slicing, tiling)
    assert bool(found.notes) == unload


def test_what_is_open_already_needs_no_more_memory():
    opened = [Need(each.name, each.stage, each.held_bytes, is_open=True) for each in PARTS]
    assert not decide(Placement(), opened, Decoding(1, 1 * GB, GB), 2 * GB).unload


def test_what_is_said_is_done_whatever_there_is():
    assert decide(Placement(offload="parts"), PARTS, None, 10**12).unload
    assert not decide(Placement(offload="none"), PARTS, None, 0).unload
    assert decide(Placement(offload="mapped"), PARTS, None, 10**12).mapped == {"text_encoder", "unet"}
    off = decide(Placement(vae_tiling="off", vae_slicing="off"), PARTS, Decoding(4, GB, GB // 4), 0)
    assert (off.slicing, off.tiling) == (False, False)


def test_a_part_that_fits_nowhere_is_named():
    said = decide(Placement(), PARTS, None, GB // 2).notes
    assert any("vae_decoder" in note and "may run out of memory" in note for note in said)
    assert any("unet" in note and "stay in their files" in note for note in said)


@pytest.mark.parametrize("recipe", BACKENDS)
def test_pictures_are_the_same_when_parts_take_turns(baked, plain, recipe):
    made, configuration = generate(baked(recipe), offload="parts")
    assert np.array_equal(made.images, plain(recipe))
    assert {name: found["unloaded"] for name, found in configuration.items()} == {
        "text_encoder": 1,
        "unet": 1,
        "vae_decoder": 0,
    }
    assert "text_encoder was unloaded before unet was opened" in made.notes


@pytest.mark.parametrize("recipe", ["torch:fp32", "onnx:fp32"])
def test_pictures_are_the_same_with_mapped_weights(baked, plain, recipe):
    made, configuration = generate(baked(recipe), offload="mapped")
    assert worst(made.images, plain(recipe)) >= 59
    assert all(found["mapped"] for found in configuration.values())


def test_little_memory_makes_parts_take_turns(baked, plain, monkeypatch):
    monkeypatch.setattr(footprint, "available_bytes", lambda: 20_000_000)
    made, configuration = generate(baked("onnx:fp32"))
    assert worst(made.images, plain("onnx:fp32")) >= 59
    assert configuration["text_encoder"]["unloaded"] == 1
    assert made.notes[0].startswith("parts take turns in memory")


def test_parts_of_one_stage_stay_open_together(tiny, tmp_path):
    """SDXL's encoders take turns with a prompt and a negative one; a ControlNet runs at each step."""
    arguments = {"seeds": 3, "steps": 2, "guidance_scale": 3.0, "negative_prompts": "red", "size": (64, 64)}
    control = np.zeros((64, 64, 3), np.uint8)
    control_net = tiny("stable-diffusion-xl", "controlnet") / "controlnet"
    folder = tmp_path / "artifact"
    export(str(tiny("stable-diffusion-xl")), folder, parse("torch:fp32")[0], controlnet=control_net, prove=False)
    made, configuration = generate(folder, PROMPTS, {**arguments, "control_image": control}, offload="parts")
    plain, _ = generate(folder, PROMPTS, {**arguments, "control_image": control}, offload="none")
    assert np.array_equal(made.images, plain.images)
    unloaded = {name: found["unloaded"] for name, found in configuration.items()}
    assert unloaded == {"text_encoder": 1, "text_encoder_2": 1, "unet": 1, "controlnet": 1, "vae_decoder": 0}
    merged, _ = generate(folder, PROMPTS, {**arguments, "control_image": control}, token_merging=0.5)
    assert not np.array_equal(merged.images, plain.images)


@pytest.fixture(scope="module")
def in_tiles(shapes):
    """Diffusers' own pictures with `enable_tiling` on its VAE, of latents and of a picture; and without."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    text = StableDiffusionPipeline.from_pretrained(shapes)
    text.set_progress_bar_config(disable=True)
    image = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(3))
    common = {"prompt": PROMPTS[:1], "guidance_scale": 1.0, "output_type": "np"}
    made = {}
    for tiling in (False, True):
        text.vae.use_tiling = tiling
        start = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255
        pictures = {
            "text": text(latents=latents, num_inference_steps=1, **common).images,
            "image": image(
                image=start,
                strength=0.5,
                num_inference_steps=2,
                generator=[torch.Generator().manual_seed(3)],
                **common,
            ).images,
        }
        made[tiling] = {task: (found * 255).round().astype(np.uint8) for task, found in pictures.items()}
    return made


def picture():
    return np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


@pytest.mark.parametrize("recipe", BACKENDS)
def test_tiles_are_diffusers_own(baked, in_tiles, recipe):
    with bakeoff.load(baked(recipe), device="cpu", threads=1, vae_tiling="on") as engine:
        text = engine.generate(PROMPTS[0], seeds=3, **LARGE)
        image = engine.generate(
            PROMPTS[0], seeds=3, steps=2, guidance_scale=1.0, image=picture(), strength=0.5, size=(96, 128)
        )
        assert not engine.pipeline.vae.use_tiling
        told = engine.configuration["vae_decoder"]
    assert worst(text.images, in_tiles[True]["text"]) >= 45
    assert worst(image.images, in_tiles[True]["image"]) >= 45
    assert worst(text.images, in_tiles[False]["text"]) < 45, "tiling did nothing"
    assert any("lossy" in note for note in text.notes)
    assert (told["tiling"], told["lossy"]) == (64, ["tiling"])


def test_tiles_come_where_one_picture_would_not_fit(baked, in_tiles, monkeypatch):
    with bakeoff.load(baked("torch:fp32"), device="cpu", threads=1) as engine:
        whole = engine.generate(PROMPTS[0], seeds=3, **LARGE)
        monkeypatch.setattr(footprint, "available_bytes", lambda: 3_000_000)
        tiled = engine.generate(PROMPTS[0], seeds=3, **LARGE)
    assert worst(whole.images, in_tiles[False]["text"]) >= 45
    assert worst(tiled.images, in_tiles[True]["text"]) >= 45
    assert any("in tiles of 64 pixels: lossy" in note for note in tiled.notes)
    assert not whole.notes


@pytest.mark.parametrize("recipe", BACKENDS)
def test_slices_change_nothing(baked, plain, recipe):
    made, _ = generate(baked(recipe), vae_slicing="on")
    assert worst(made.images, plain(recipe)) >= 59
    assert "the VAE works on one picture at a time" in made.notes


@pytest.mark.parametrize("slices", [1, 3, "auto"])
def test_sliced_attention_is_exact(baked, plain, slices):
    made, _ = generate(baked("torch:fp32"), attention_slicing=slices)
    assert np.array_equal(made.images, plain("torch:fp32"))


@pytest.mark.parametrize("mask", [(), (6, 7), (1, 1, 6, 7), (2, 1, 6, 7), (1, 4, 6, 7), (2, 4, 6, 7)])
@pytest.mark.parametrize("count", [1, 3, 4, 8, 100])
def test_slices_take_their_part_of_a_mask(mask, count):
    from torch.nn.functional import scaled_dot_product_attention as attend

    from bakeoff.runtimes.attention import SlicedAttention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, tokens, 8, generator=generator) for tokens in (6, 7, 7))
    given = torch.rand(mask, generator=generator) > 0.3 if mask else None
    expected = attend(query, key, value, attn_mask=given)
    with SlicedAttention(count):
        torch.testing.assert_close(attend(query, key, value, attn_mask=given), expected, equal_nan=True)


def test_merged_tokens_are_lossy_and_said_to_be(baked, plain):
    folder = baked("torch:fp32")
    made, configuration = generate(folder, token_merging=0.5)
    again, _ = generate(folder, token_merging=0.5)
    alone, _ = generate(folder, PROMPTS[:1], token_merging=0.5)
    assert 15 < worst(made.images, plain("torch:fp32")) < 45
    assert np.array_equal(made.images, again.images)
    assert worst(made.images[:1], alone.images) >= 45
    assert configuration["unet"]["lossy"] == ["token_merging=0.5"]
    assert any("token_merging" in note and "lossy" in note for note in made.notes)


@pytest.mark.parametrize(
    ("recipe", "idle"),
    [
        ("onnx:fp32", {"attention_slicing": 2}),
        ("openvino:fp32", {"token_merging": 0.5}),
        ("openvino:fp32", {"offload": "mapped"}),
    ],
)
def test_options_that_no_part_has_are_refused(baked, recipe, idle):
    with pytest.raises(UsageError, match="does nothing here"):
        bakeoff.load(baked(recipe), **idle)


def test_tokens_are_merged_in_unets_alone(tiny):
    with pytest.raises(UsageError, match="UNets with cross-attention"):
        bakeoff.load(tiny("flux"), token_merging=0.5)


@pytest.mark.parametrize("bad", [{"offload": "some"}, {"vae_tiling": True}, {"token_merging": 1}])
def test_values_that_mean_nothing_are_refused(shapes, bad):
    with pytest.raises(RecipeError, match="Known|expected"):
        bakeoff.load(shapes, **bad)


def test_the_command_line_says_what_was_unloaded(baked, tmp_path, capsys):
    options = ["--offload", "parts", "--vae-slicing", "on", "--steps", "1", "--json"]
    assert cli.main(["generate", str(baked("null:fp32")), "a", "b", "-o", str(tmp_path / "x.png"), *options]) == 0
    output = capsys.readouterr()
    assert "note: text_encoder was unloaded before unet was opened" in output.err
    told = json.loads(output.out)
    assert told["configuration"]["unet"]["unloaded"] == 1
    assert "the VAE works on one picture at a time" in told["notes"]


def test_weights_in_another_dtype_are_counted_as_copies():
    gigabyte = {"bfloat16": GB}
    assert 2 * GB <= footprint.running_bytes("torch", "fp32", gigabyte) < 2.1 * GB
    assert footprint.running_bytes("torch", "bf16", gigabyte) >= GB
    assert footprint.running_bytes("torch", "bf16", gigabyte, mapped=True) < 0.1 * GB
    assert footprint.running_bytes("torch", "bf16", gigabyte, convolution_bytes=0) < 0.1 * GB
    assert footprint.running_bytes("onnx", "fp32", {"float32": GB}) >= GB
    assert footprint.running_bytes("onnx", "fp32", {"float32": GB}, mapped=True) < 0.1 * GB


def test_weights_are_summed_by_dtype(shapes, baked):
    assert set(footprint.weight_bytes(shapes / "unet")) <= {"float16", "float32"}
    assert 0 < footprint.convolution_bytes(shapes / "unet") < sum(footprint.weight_bytes(shapes / "unet").values())
    assert footprint.weight_bytes(baked("openvino:fp32") / "unet")[""] > 1_000_000
    assert footprint.convolution_bytes(baked("openvino:fp32") / "unet") is None


def test_shards_without_an_index_are_summed(shapes, tmp_path):
    """As ONNX parts have them."""
    shutil.copy(shapes / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "part-00001-of-00002.safetensors")
    assert footprint.weight_bytes(tmp_path) == footprint.weight_bytes(shapes / "unet")
