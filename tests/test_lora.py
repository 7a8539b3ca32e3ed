"""LoRAs, baked in and added as parts open: exactly what Diffusers' own fusing gives."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeoff.artifact import Artifact
from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.errors import ParityError, PickleError, SourceError, UsageError
from bakeoff.parity.origin import source_of
from bakeoff.pictures import psnr
from bakeoff.plan import plan, why_rebuild
from bakeoff.recipe import parse
from bakeoff.runtimes.engine import load
from bakeoff.sources.lora import Lora
from bakeoff.sources.source import Source
from bakeoff.weights import Checkpoint, read_tensor

RECIPE = parse("torch:fp32")[0]
PROMPT = "a large red circle on a white background"
LAYERS = {
    "stable-diffusion": ("unet", "attentions.0.transformer_blocks.0.attn1.to_"),
    "stable-diffusion-xl": ("unet", "attentions.0.transformer_blocks.0.attn1.to_"),
    "stable-diffusion-3": ("transformer", "attn.to_"),
    "flux": ("transformer", "attn.to_"),
    "z-image": ("transformer", "attention.to_"),
    "sana": ("transformer", "attn1.to_"),
    "qwen-image": ("transformer", "attn.to_"),
}


def linear_layers(folder, module, part):
    """Names and shapes of the module's 2-D weights whose path has `part`."""
    entries = Checkpoint.open(folder / module).entries.values()
    return {e.name.removesuffix(".weight"): e.shape for e in entries if len(e.shape) == 2 and part in e.name}


def halves(shapes, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, (out, into) in shapes.items():
        yield (
            name,
            torch.randn(rank, into, generator=generator) / 8,
            torch.randn(out, rank, generator=generator) / 8,
        )


def peft_file(folder, family, file, rank=4, seed=0):
    """A LoRA as PEFT and Diffusers save it today."""
    module, part = LAYERS[family]
    tensors = {}
    for name, down, up in halves(linear_layers(folder, module, part), rank, seed):
        tensors |= {f"{module}.{name}.lora_A.weight": down, f"{module}.{name}.lora_B.weight": up}
    save_file(tensors, file)
    return file


def kohya_file(folder, file, alpha=2.0):
    """A LoRA of UNet and text encoder as Kohya's scripts save it, with alphas."""
    tensors = {}
    for module, prefix, part in (("unet", "lora_unet_", "attn1.to_"), ("text_encoder", "lora_te_", "self_attn.")):
        for name, down, up in halves(linear_layers(folder, module, part)):
            full = name if module == "unet" or name.startswith("text_model") else f"text_model.{name}"
            key = prefix + full.replace(".", "_")
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(alpha),
            }
    save_file(tensors, file)
    return file


def fused(folder, file, scale, module):
    """Diffusers' own fused weights of a module, by name."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return getattr(pipeline, module).state_dict()


@pytest.mark.parametrize("family", LAYERS)
def test_baked_weights_are_diffusers_fused_ones(tiny, tmp_path, family):
    folder = tiny(family)
    module, _ = LAYERS[family]
    file = peft_file(folder, family, tmp_path / "style.safetensors")
    artifact = export(str(folder), tmp_path / "a", RECIPE, loras=[f"{file}:0.8"], prove=False)
    plain = load_file(next((folder / module).glob("*.safetensors")))
    baked = {name: read_tensor(entry) for name, entry in Checkpoint.open(artifact.folder / module).entries.items()}
    expected = fused(folder, file, 0.8, module)
    changed = [name for name in baked if not torch.equal(baked[name], plain[name])]
    assert len(changed) == len(load_file(file)) // 2
    for name, tensor in baked.items():
        assert torch.equal(tensor, expected[name]) or torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-7), name


def test_kohya_files_with_alphas_and_text_encoders(tiny, tmp_path):
    folder = tiny("stable-diffusion")
    file = kohya_file(folder, tmp_path / "kohya.safetensors")
    artifact = export(str(folder), tmp_path / "a", RECIPE, loras=[str(file)], prove=False)
    for module in ("unet", "text_encoder"):
        expected = fused(folder, file, 1.0, module)
        plain = load_file(next((folder / module).glob("*.safetensors")))
        baked = {
            n: read_tensor(e) for n, e in Checkpoint.open(artifact.folder / module).entries.items() if len(e.shape) > 1
        }
        assert any(not torch.equal(baked[name], plain[name]) for name in baked)
        for name, tensor in baked.items():
            assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-7), name


def test_a_lora_is_in_the_key_of_its_parts_and_in_the_manifest(tiny, tmp_path):
    folder = tiny("stable-diffusion")
    file = peft_file(folder, "stable-diffusion", tmp_path / "style.safetensors")
    artifact = export(str(folder), tmp_path / "a", RECIPE, loras=[f"{file}:0.8"], prove=False)
    assert [each["scale"] for each in artifact.manifest.source["loras"]] == [0.8]
    assert "loras" not in artifact.manifest.parts["vae_decoder"].key_fields
    again = export(str(folder), tmp_path / "a", RECIPE, loras=[f"{file}:0.8"], prove=False)
    assert again.manifest.key == artifact.manifest.key
    reasons = why_rebuild(artifact, plan(str(folder), RECIPE, loras=[f"{file}:0.5"]))
    assert [reason.partition(":")[0] for reason in reasons] == ["unet.loras"]
    assert not list(tmp_path.glob(".*"))
    assert (
        "loras"
        not in json.loads(
            (
                Artifact.open(export(str(folder), tmp_path / "b", RECIPE, prove=False).folder).folder / "bakeoff.json"
            ).read_text()
        )["source"]
    )


def test_the_source_of_an_artifact_with_loras_has_them(tiny, tmp_path):
    folder = tiny("stable-diffusion")
    one = peft_file(folder, "stable-diffusion", tmp_path / "one.safetensors")
    two = peft_file(folder, "stable-diffusion", tmp_path / "two.safetensors", seed=1)
    artifact = export(str(folder), tmp_path / "a", RECIPE, loras=[f"{one}:0.8", str(two)], prove=False)
    for loras, message in (
        ([], "got no LoRA"),
        ([str(two), f"{one}:0.8"], "another order"),
        ([str(one)], "other LoRAs"),
    ):
        with (
            pytest.raises(SourceError, match=message) as caught,
            source_of(artifact, str(folder), loras=loras),
        ):
            pass
        assert "--lora one.safetensors:0.8 --lora two.safetensors:1" in caught.value.fix
    plain = export(str(folder), tmp_path / "b", RECIPE, prove=False)
    with pytest.raises(SourceError, match="has no LoRA baked in"), source_of(plain, str(folder), loras=[str(one)]):
        pass
    with source_of(artifact, str(folder), loras=[f"{one}:0.8", str(two)]) as source:
        found = source.checkpoint("unet").entries
        for name, entry in Checkpoint.open(artifact.folder / "unet").entries.items():
            assert torch.equal(read_tensor(found[name]), read_tensor(entry)), name
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_model_with_a_lora_is_proved_explained_and_repaired(tiny, tmp_path, capsys):
    folder = tiny("stable-diffusion")
    lora = f"{peft_file(folder, 'stable-diffusion', tmp_path / 'style.safetensors')}:0.8"
    assert export(str(folder), tmp_path / "a", RECIPE, loras=[lora]).manifest.proved
    low = ["export", str(folder), "--recipe", "torch:fp32,unet=onnx:int4", "--lora", lora, "--budget", "unet=42dB"]
    assert main([*low, "-o", str(tmp_path / "low"), "--allow-failing"]) == 0
    explained = ["verify", str(tmp_path / "low"), "--explain", "--source", str(folder)]
    capsys.readouterr()
    assert main([*explained, "--lora", lora, "--json"]) == ParityError.exit_code
    (part,) = json.loads(capsys.readouterr().out)["parts"]
    assert part["part"] == "unet"
    assert not part["fault"], "rounding is what the recipe asks for"
    assert main(explained) == SourceError.exit_code
    assert main([*low, "-o", str(tmp_path / "high"), "--repair"]) == 0
    assert Artifact.open(tmp_path / "high").manifest.proved
    assert "repaired unet: " in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "high"), "--lora", lora]) == UsageError.exit_code


@pytest.mark.slow
def test_scale_nought_is_the_plain_picture_and_two_loras_add_up(tiny, tmp_path):
    folder = tiny("stable-diffusion")
    first = peft_file(folder, "stable-diffusion", tmp_path / "one.safetensors")
    second = peft_file(folder, "stable-diffusion", tmp_path / "two.safetensors", rank=2, seed=1)

    def picture(name, *loras):
        artifact = export(str(folder), tmp_path / name, RECIPE, loras=loras, prove=False)
        with load(artifact.folder) as engine:
            return engine.generate("a circle", seeds=1, steps=2, size=(64, 64)).images

    plain = picture("plain")
    assert np.array_equal(picture("nought", f"{first}:0"), plain)
    one = picture("one", str(first))
    assert not np.array_equal(one, plain)
    both, other = picture("both", str(first), str(second)), picture("other", str(second), str(first))
    assert np.abs(both.astype(int) - other).max() <= 1
    assert not np.array_equal(both, one)


def test_what_is_no_lora_for_this_model_is_refused(tiny, tmp_path):
    source = Source.open(str(tiny("stable-diffusion")))
    flux = peft_file(tiny("flux"), "flux", tmp_path / "flux.safetensors")
    wide = tmp_path / "wide.safetensors"
    save_file(
        {
            name: torch.cat([tensor, tensor]) if "lora_B" in name else tensor
            for name, tensor in load_file(peft_file(source.folder, "stable-diffusion", wide)).items()
        },
        wide,
    )
    save_file({"unet.conv_in.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    (tmp_path / "style.pt").write_bytes(b"")
    for text, error, message in (
        (flux, SourceError, "no place for|another model|isn't a LoRA"),
        (wide, SourceError, "for another model"),
        (tmp_path / "model.safetensors", SourceError, "no place for"),
        (tmp_path / "broken.safetensors", SourceError, "can't be read"),
        (tmp_path / "style.pt", PickleError, "no pickles"),
        (tmp_path / "nothing.safetensors", UsageError, "no LoRA file"),
        (f"{flux}:strong", UsageError, "FILE:SCALE"),
        (f"{flux}:nan", UsageError, "finite"),
    ):
        with pytest.raises(error, match=message):
            Lora.open(str(text), source)


def test_a_family_whose_pipelines_load_no_loras_says_so(tiny, tmp_path):
    file = peft_file(tiny("flux"), "flux", tmp_path / "flux.safetensors")
    with pytest.raises(UsageError, match="pixart-sigma takes no LoRA"):
        plan(str(tiny("pixart-sigma")), RECIPE, loras=[str(file)])


@pytest.fixture(scope="module")
def styles(shapes, tmp_path_factory):
    """Two LoRAs for `shapes`: of the UNet and the text encoder with Kohya's keys, of the UNet with PEFT's."""
    folder = tmp_path_factory.mktemp("styles")
    kohya = kohya_file(shapes, folder / "kohya.safetensors")
    return f"{kohya}:0.5", f"{peft_file(shapes, 'stable-diffusion', folder / 'peft.safetensors', seed=1)}:0.5"


def picture(engine):
    return engine.generate(PROMPT, seeds=1, steps=2).images[0]


@pytest.mark.parametrize("recipe", ["torch:fp32", "onnx:fp32", pytest.param("openvino:fp32", marks=pytest.mark.slow)])
def test_loras_come_and_go_without_a_trace(baked, styles, recipe):
    first, second = styles
    with load(baked(recipe), loras=[first]) as engine, load(baked("torch:fp32"), loras=[first]) as eager:
        a = picture(engine)
        assert psnr(picture(eager), a) >= 45
        engine.set_loras(second)
        b = picture(engine)
        engine.set_loras(first)
        assert np.array_equal(picture(engine), a)
        engine.set_loras()
        assert len({image.tobytes() for image in (a, b, picture(engine))}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["onnx:bf16", "onnx:fp16+compute=half", "openvino:bf16", "openvino:int8", "torch:bf16"]
)
def test_loras_in_lower_precisions(baked, styles, recipe):
    with load(baked(recipe)) as engine, load(baked("torch:fp32")) as exact:
        plain = picture(engine)
        for each in (engine, exact):
            each.set_loras(styles[0])
        assert psnr(picture(exact), picture(engine)) > psnr(picture(exact), plain) + 5


def test_added_and_baked_are_the_same(tiny, tmp_path):
    folder = tiny("stable-diffusion")
    style = f"{kohya_file(folder, tmp_path / 'style.safetensors')}:0.8"
    recipe = parse("torch:fp32")[0]
    plain = export(str(folder), tmp_path / "plain", recipe, prove=False)
    baked = export(str(folder), tmp_path / "baked", recipe, loras=[style], prove=False)
    with load(plain.folder, loras=[style]) as added, load(baked.folder) as fixed:
        assert np.array_equal(picture(added), picture(fixed))
        with pytest.raises(UsageError, match="added twice"):
            fixed.set_loras(style)


def test_a_lora_of_another_model_is_refused_and_nothing_changes(baked, tiny, styles, tmp_path):
    foreign = peft_file(tiny("stable-diffusion-xl"), "stable-diffusion-xl", tmp_path / "xl.safetensors")
    with load(baked("torch:fp32"), loras=[styles[0]]) as engine:
        before = picture(engine)
        with pytest.raises(SourceError, match="for another model"):
            engine.set_loras(str(foreign))
        assert np.array_equal(picture(engine), before)
