"""Single files, made from tiny pipelines by turning around what Diffusers' converters do, bake as their folders do."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeoff.artifact import Artifact
from bakeoff.bake import export
from bakeoff.bench.work import bake, local, write_latents
from bakeoff.cli import main
from bakeoff.errors import PickleError, SourceError, UsageError
from bakeoff.home import home
from bakeoff.models.prompts import read_prompts
from bakeoff.parity.origin import source_of
from bakeoff.plan import plan, why_rebuild
from bakeoff.recipe import parse
from bakeoff.runtimes.engine import load
from bakeoff.sources import single_file
from bakeoff.sources.source import Source
from bakeoff.tuning.calibrate import calibrate
from bakeoff.tuning.sensitivity import sensitivity
from bakeoff.weights import sha256

TORCH = parse("torch:fp32")[0]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    ".fc1.": ".mlp.c_fc.",
    ".fc2.": ".mlp.c_proj.",
    ".mlp.mlp.": ".mlp.",
    ".self_attn.out_proj": ".attn.out_proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "transformer_blocks.": "joint_blocks.",
    ".norm1.linear": ".x_block.adaLN_modulation.1",
    ".norm1_context.linear": ".context_block.adaLN_modulation.1",
    ".attn.qkv": ".x_block.attn.qkv",
    ".attn2.qkv": ".x_block.attn2.qkv",
    ".attn.added_qkv": ".context_block.attn.qkv",
    ".attn.norm_added_q": ".context_block.attn.ln_q",
    ".attn.norm_added_k": ".context_block.attn.ln_k",
    ".attn.norm_": ".x_block.attn.ln_",
    ".attn2.norm_": ".x_block.attn2.ln_",
    ".attn.to_add_out": ".context_block.attn.proj",
    ".attn.to_out.0": ".x_block.attn.proj",
    ".attn2.to_out.0": ".x_block.attn2.proj",
    ".ff.net.0.proj": ".x_block.mlp.fc1",
    ".ff.net.2": ".x_block.mlp.fc2",
    ".ff_context.net.0.proj": ".context_block.mlp.fc1",
    ".ff_context.net.2": ".context_block.mlp.fc2",
}
Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".to_out.0.": ".out.",
    ".norm_k.": ".k_norm.",
    ".norm_q.": ".q_norm.",
}


def weights(folder, module):
    (file,) = (folder / module).glob("*.safetensors")
    return load_file(file)


def replaced(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def unet(folder, prefix="model.diffusion_model."):
    """A UNet's tensors under LDM's names."""
    tensors = weights(folder, "unet")
    config = json.loads((folder / "unet" / "config.json").read_text())
    layers = config["layers_per_block"] + 1
    attends = [i for i, kind in enumerate(config["up_block_types"]) if "CrossAttn" in kind]

    def original(name):
        for ours, theirs in UNET.items():
            if name.startswith(f"{ours}."):
                return replaced(name.replace(ours, theirs, 1), RESNET if "resnets" in name else {})
        side, block, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)\.(.+)", name).groups()
        block, number = int(block), int(number)
        start = block * layers + (side == "down")
        blocks = "input_blocks" if side == "down" else "output_blocks"
        if kind == "resnets":
            return f"{blocks}.{start + number}.0.{replaced(rest, RESNET)}"
        if kind == "attentions":
            return f"{blocks}.{start + number}.1.{rest}"
        if kind == "downsamplers":
            return f"{blocks}.{start + layers - 1}.0.{rest.replace('conv', 'op')}"
        return f"{blocks}.{start + layers - 1}.{2 if block in attends else 1}.{rest}"

    return {prefix + original(name): tensor for name, tensor in tensors.items()}


def vae(folder, prefix="first_stage_model."):
    """A VAE's tensors under LDM's names; linear layers were convolutions then."""
    tensors = weights(folder, "vae")
    last = len(json.loads((folder / "vae" / "config.json").read_text())["up_block_types"]) - 1
    found = {}
    for name, tensor in tensors.items():
        new = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name).replace("down_blocks.", "down.")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        table = {"samplers.0": "sample", "resnets": "block", "conv_shortcut": "nin_shortcut", "conv_norm": "norm"}
        new = replaced(new, table)
        if "attentions" in new:
            table = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out", "to_": ""}
            new = replaced(new, table)
        convolution = "attentions" in name and tensor.dim() == 2
        found[prefix + new] = tensor[:, :, None, None] if convolution else tensor
    return found


def clip(folder, module="text_encoder", prefix="cond_stage_model.transformer."):
    found = weights(folder, module)
    return {
        prefix + (name if name.startswith("text_") else f"text_model.{name}"): tensor for name, tensor in found.items()
    }


def open_clip(folder, module="text_encoder_2", prefix="conditioner.embedders.1.model."):
    tensors = fused(clip(folder, module, ""), ("q_proj", "k_proj", "v_proj"), "in_proj")
    projection = tensors.pop("text_projection.weight", torch.eye(64)).T.contiguous()
    found = {"text_projection": projection} | {replaced(name, OPEN_CLIP): tensor for name, tensor in tensors.items()}
    return {prefix + name.replace(".self_attn.in_proj.", ".attn.in_proj_"): tensor for name, tensor in found.items()}


def fused(tensors, names, whole):
    """Join the projections that other authors keep as one."""
    found = {}
    for name, tensor in tensors.items():
        if f".{names[0]}." in name:
            found[name.replace(names[0], whole)] = torch.cat(
                [tensors[name.replace(names[0], other)] for other in names]
            )
        elif not any(f".{other}." in name for other in names):
            found[name] = tensor
    return found


def sd3_transformer(folder):
    tensors = fused(weights(folder, "transformer"), ("to_q", "to_k", "to_v"), "qkv")
    tensors = fused(tensors, ("add_q_proj", "add_k_proj", "add_v_proj"), "added_qkv")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    turned = ("norm_out.", f"transformer_blocks.{last}.norm1_context.")
    found = {
        name: torch.cat(tensor.chunk(2)[::-1]) if name.startswith(turned) else tensor
        for name, tensor in tensors.items()
    }
    return {f"model.diffusion_model.{replaced(name, SD3)}": tensor for name, tensor in found.items()}


def z_image_transformer(folder, prefix="model.diffusion_model."):
    tensors = fused(weights(folder, "transformer"), ("to_q", "to_k", "to_v"), "qkv")
    return {prefix + replaced(name, Z_IMAGE): tensor for name, tensor in tensors.items()}


def t5(folder):
    tensors = weights(folder, "text_encoder_3")
    return {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in tensors.items()}


WHOLE = {
    "stable-diffusion": lambda folder: {
        **unet(folder),
        **vae(folder),
        **clip(folder),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.ones(1000),
    },
    "stable-diffusion-xl": lambda folder: {
        **unet(folder),
        **vae(folder),
        **clip(folder, prefix="conditioner.embedders.0.transformer."),
        **open_clip(folder),
        "conditioner.embedders.1.model.logit_scale": torch.ones(()),
    },
    "stable-diffusion-3": lambda folder: {
        **sd3_transformer(folder),
        **vae(folder),
        **clip(folder, prefix="text_encoders.clip_l.transformer."),
        **clip(folder, "text_encoder_2", "text_encoders.clip_g.transformer."),
        **t5(folder),
    },
    "z-image": z_image_transformer,
}
SIZE = {"size": (64, 64), "steps": 2, "guidance_scale": 3.0}


def picture(folder):
    with load(folder) as engine:
        return engine.generate(["a red circle", "a blue star"], seeds=3, **SIZE).images


@pytest.fixture
def saved(tmp_path):
    """Save tensors as `model.safetensors`, as they are or in a dtype."""

    def save(tensors, dtype=None, name="model.safetensors"):
        made = {
            key: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for key, tensor in tensors.items()
        }
        save_file({key: tensor.contiguous() for key, tensor in made.items()}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def configs(tmp_path):
    """A family's folder without any weights."""

    def copy(folder):
        return Path(shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")))

    return copy


@pytest.mark.parametrize("family", WHOLE)
def test_a_single_file_becomes_its_folder_byte_for_byte(tiny, saved, configs, family):
    folder = tiny(family)
    if family == "stable-diffusion-3":  # whose CLIP-L is unprojected in single files
        folder = unprojected(folder, saved)
    file = saved(WHOLE[family](folder))
    config = folder if family == "z-image" else configs(folder)
    source = Source.open(str(file), config=str(config))
    for module in source.modules:
        assert source.hashes(module) == Source.open(str(folder)).hashes(module)
    held = {"transformer"} if family == "z-image" else set(source.modules)
    assert set(source.origins["file"]["modules"]) == held
    assert source.origins["file"]["sha256"] == sha256(file)


def unprojected(folder, saved):
    copy = saved({"x": torch.zeros(1)}).parent / "folder"
    shutil.copytree(folder, copy)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "text_projection.weight": torch.eye(len(tensors["text_projection.weight"]))}, file, {"format": "pt"}
    )
    return copy


@pytest.mark.parametrize("family", ["stable-diffusion", pytest.param("stable-diffusion-xl", marks=pytest.mark.slow)])
def test_the_picture_is_the_folders(tiny, saved, tmp_path, family):
    folder = tiny(family)
    file = saved(WHOLE[family](folder))
    export(str(folder), tmp_path / "a", TORCH, prove=False)
    artifact = export(str(file), tmp_path / "b", TORCH, prove=False, config=str(folder))
    source = artifact.manifest.source
    assert source["file"]["name"] == "model.safetensors"
    assert source["file"]["sha256"] == sha256(file)
    assert source["config"] == {"id": str(folder), "revision": None}
    assert np.array_equal(picture(tmp_path / "a"), picture(tmp_path / "b"))
    assert not why_rebuild(artifact, plan(str(file), TORCH, config=str(folder)))


def test_it_is_calibrated_and_measured_with_its_own_weights(tiny, saved, tmp_path):
    folder, other = tiny("stable-diffusion"), tmp_path / "other"
    file = saved(WHOLE["stable-diffusion"](folder))
    shutil.copytree(folder, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    prompts, size = read_prompts("shapes-64", 4), (64, 64)
    expected = calibrate(str(folder), prompts, steps=1, size=size)
    found = calibrate(str(file), prompts, steps=1, size=size, config=str(other))
    assert found.info["modules"] == expected.info["modules"]
    assert [seen.magnitudes.top for both in found.parts["unet"].values() for seen in both] == [
        seen.magnitudes.top for both in expected.parts["unet"].values() for seen in both
    ]
    arguments = {"precisions": ["int4"], "parts": ["text_encoder"], "steps": 1, "size": size}
    measured = [
        sensitivity(model, prompts, tmp_path / f"{name}.json", config=config, **arguments).together
        for name, model, config in (("a", str(folder), None), ("b", str(file), str(other)))
    ]
    assert measured[0] == measured[1]
    found.save(tmp_path / "calibration.safetensors")
    recipe = parse("torch:fp32,unet=onnx:w8a8")[0]
    assert plan(str(folder), recipe, calibration=tmp_path / "calibration.safetensors").calibration, "the same weights"
    with pytest.raises(UsageError, match="which has another unet than"):
        plan(str(other), recipe, calibration=tmp_path / "calibration.safetensors")


def test_every_command_takes_the_config(tiny, saved, tmp_path, capsys):
    file = saved(z_image_transformer(tiny("z-image")))
    names = [str(file), "--config", str(tiny("z-image")), "--recipe", "torch:fp32"]
    assert main(["export", *names, "--no-prove", "-o", str(tmp_path / "out")]) == 0
    assert main(["why-rebuild", str(tmp_path / "out"), *names]) == 0
    assert "up to date" in capsys.readouterr().out
    with source_of(Artifact.open(tmp_path / "out"), str(file), str(tiny("z-image"))) as opened:
        assert opened.path("transformer").is_relative_to(home() / "converted")
    size = {"height": 64, "width": 64, "config": str(tiny("z-image"))}
    drawn = write_latents(str(file), ["a"], file=str(tmp_path / "latents.npy"), **size)
    assert drawn["family"] == "z-image"
    made = bake(str(file), "null:fp32", config=str(tiny("z-image")))
    assert Artifact.open(local(made["folder"])).manifest.source["file"]["modules"] == ["transformer"]


@pytest.mark.slow
def test_an_export_of_it_is_proved(tiny, saved, tmp_path):
    names = [str(saved(unet(tiny("stable-diffusion")))), "--config", str(tiny("stable-diffusion"))]
    assert main(["export", *names, "--recipe", "torch:fp32", "-o", str(tmp_path / "out")]) == 0
    assert Artifact.open(tmp_path / "out").manifest.proved
    shutil.rmtree(tmp_path / "out" / "proof")
    assert main(["export", *names, "--recipe", "torch:fp32", "-o", str(tmp_path / "new"), "--no-prove"]) == 0
    assert main(["verify", "--parity", str(tmp_path / "new"), "--source", *names]) == 0
    assert Artifact.open(tmp_path / "new").manifest.proved


@pytest.mark.parametrize("family", ["stable-diffusion-xl", "stable-diffusion-3", "z-image"])
def test_next_to_nothing_is_copied_into_memory(tiny, saved, family):
    folder = tiny(family)
    source = Source.open(str(folder))
    mapped = single_file._mapped(saved(WHOLE[family](folder)))
    spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in mapped.values()]
    for module in single_file.convert(saved(WHOLE[family](folder)), folder, source.index, source.modules):
        expected = single_file._expected(folder / module, *source.index[module])
        with single_file._uncopied():
            named = single_file._diffusers_names(mapped, folder / module, source.index[module][1], expected)
        found = single_file._named(named, expected).values()
        copied = [each for each in found if not any(start <= each.data_ptr() < end for start, end in spans)]
        assert sum(each.nbytes for each in copied) <= 0.1 * sum(each.nbytes for each in found)


def test_it_is_converted_once_and_keeps_its_dtype(tiny, saved, configs):
    folder = tiny("stable-diffusion")
    half = {name: tensor.half() for name, tensor in unet(folder).items()}
    file = saved({**half, **vae(folder), **clip(folder)})
    source = Source.open(str(file), config=str(configs(folder)))
    assert source.checkpoint("unet").is_in("float16")
    assert source.checkpoint("vae").is_in("float32")
    before = source.path("unet").stat().st_mtime_ns
    assert Source.open(str(file), config=str(folder)).path("unet").stat().st_mtime_ns == before
    assert source.path("unet").is_relative_to(home() / "converted")


def test_plain_fp8_becomes_bf16_which_holds_it(tiny, saved):
    folder = tiny("z-image")
    tensors = z_image_transformer(folder)
    source = Source.open(str(saved(tensors, torch.float8_e4m3fn)), config=str(folder))
    written = load_file(source.checkpoint("transformer").files[0])
    for name, tensor in weights(folder, "transformer").items():
        assert torch.equal(written[name], tensor.to(torch.float8_e4m3fn).bfloat16())


def test_a_transformer_under_diffusers_own_names(tiny, saved):
    folder = tiny("flux")
    source = Source.open(str(saved(weights(folder, "transformer"))), config=str(folder))
    assert source.origins["file"]["modules"] == ["transformer"]
    assert source.path("text_encoder_2") == folder / "text_encoder_2"


def comfy(folder):
    """Text encoders and VAE as ComfyUI keeps them beside a transformer."""
    found = {f"vae.{name}": tensor for name, tensor in vae(folder, "").items()}
    if folder.name.startswith("flux"):
        t5xxl = {f"text_encoders.t5xxl.transformer.{k}": v for k, v in weights(folder, "text_encoder_2").items()}
        return {**found, **t5xxl, **clip(folder, prefix="text_encoders.clip_l.transformer.")}
    prefix = "text_encoders.qwen3_4b.transformer.model."
    return {**found, **{prefix + name: tensor for name, tensor in weights(folder, "text_encoder").items()}}


@pytest.mark.parametrize("family", ["flux", "z-image"])
def test_text_encoders_and_vae_may_be_in_it(tiny, saved, configs, family):
    folder = tiny(family)
    transformer = z_image_transformer(folder) if family == "z-image" else weights(folder, "transformer")
    source = Source.open(str(saved({**transformer, **comfy(folder)})), config=str(configs(folder)))
    for module in source.modules:
        assert source.hashes(module) == Source.open(str(folder)).hashes(module)


def test_stable_diffusion_2_has_openclips_text_encoder(tiny, saved, configs):
    folder = tiny("stable-diffusion")
    file = saved({**unet(folder), **vae(folder), **open_clip(folder, "text_encoder", "cond_stage_model.model.")})
    source = Source.open(str(file), config=str(configs(folder)))
    assert source.hashes("text_encoder") == Source.open(str(folder)).hashes("text_encoder")


def test_a_file_beside_a_text_encoder_of_its_own(tiny, saved, configs):
    """Files for ComfyUI hold a text encoder or not; what they lack is named."""
    folder = tiny("stable-diffusion-xl")
    file = saved({**unet(folder), **clip(folder, prefix="conditioner.embedders.0.transformer.")})
    assert set(Source.open(str(file), config=str(folder)).origins["file"]["modules"]) == {"unet", "text_encoder"}
    with pytest.raises(SourceError, match="holds text_encoder, unet alone.*no safetensors for text_encoder_2, vae"):
        Source.open(str(file), config=str(configs(folder)))


def test_the_likely_config_is_named_if_the_cache_lacks_it(tiny, saved):
    file = saved(unet(tiny("stable-diffusion")))
    with pytest.raises(SourceError, match="those of stable-diffusion-v1-5/stable-diffusion-v1-5 fit it") as caught:
        Source.open(str(file))
    assert caught.value.fix.startswith("add --config stable-diffusion-v1-5/stable-diffusion-v1-5")


def test_the_likely_config_is_taken_if_the_cache_has_it(tiny, saved, configs, tmp_path, monkeypatch):
    import huggingface_hub

    folder = tiny("stable-diffusion")
    storage = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text("0" * 40)
    shutil.copytree(configs(folder), storage / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = Source.open(str(saved(WHOLE["stable-diffusion"](folder))))
    about = {"id": "stable-diffusion-v1-5/stable-diffusion-v1-5", "revision": "0" * 40}
    assert source.origins["config"] == about
    with pytest.raises(SourceError, match="holds unet alone"):  # and offline the rest can't be fetched
        Source.open(str(saved(unet(folder))), config=about["id"])


def broken(tensors):
    """Return tensors that don't fit, or aren't to be read, and what is said of them."""
    lacking = {name: tensor for name, tensor in tensors.items() if "input_blocks.0.0.bias" not in name}
    conv = "model.diffusion_model.input_blocks.0.0.weight"
    wide = {**tensors, conv: tensors[conv].repeat(1, 2, 1, 1)}
    return {
        "lacks 1 of the 208 tensors of .*unet, such as conv_in.bias": lacking,
        r"has conv_in.weight of \(32, 8, 3, 3\), .*unet expects \(32, 4, 3, 3\)": wide,
        "holds none of the modules of .*: text_encoder, unet, vae": {"lora_unet_x.alpha": torch.ones(1)},
        "quantized in a way": {**tensors, f"{conv}_scale": torch.ones(1), "scaled_fp8": torch.ones(0)},
        "quantized.*it has model.diffusion_model.input": {**tensors, conv: tensors[conv].to(torch.uint8)},
        "predicts v": {**tensors, "v_pred": torch.ones(0)},
    }


def test_what_does_not_fit_is_said_and_leaves_nothing(tiny, saved):
    folder = tiny("stable-diffusion")
    before = sorted((home() / "converted").glob("*"))
    for says, tensors in broken(unet(folder)).items():
        with pytest.raises(SourceError, match=says) as caught:
            Source.open(str(saved(tensors)), config=str(folder))
        assert caught.value.fix
    assert sorted((home() / "converted").glob("*")) == before


def test_a_damaged_transformer_is_not_replaced_by_the_configs(tiny, saved):
    folder = tiny("stable-diffusion-3")
    tensors = sd3_transformer(folder)
    del tensors["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]
    with pytest.raises(SourceError, match="lacks 'joint_blocks.0.x_block.attn.qkv.weight'"):
        Source.open(str(saved(tensors)), config=str(folder))


def test_no_pickle_is_opened_and_the_way_to_convert_one_works(tiny, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": {"a": Payload()}}, tmp_path / "bad.ckpt")
    shutil.copy(tmp_path / "bad.ckpt", tmp_path / "bad.safetensors")
    for name, error in (("bad.ckpt", PickleError), ("bad.safetensors", SourceError)):
        with pytest.raises(error):
            Source.open(str(tmp_path / name), config=str(tiny("stable-diffusion")))
    assert not (tmp_path / "ran").exists()
    expected = unet(tiny("stable-diffusion"))
    torch.save({"state_dict": expected, "step": 3}, tmp_path / "good.ckpt")
    with pytest.raises(PickleError) as caught:
        Source.open(str(tmp_path / "good.ckpt"))
    command = caught.value.fix.partition("convert it: python -c ")[2].strip('"')
    monkeypatch.chdir(tmp_path)
    exec(command, {})  # noqa: S102 - what we tell people to type
    assert torch.equal(load_file(tmp_path / "good.safetensors")[min(expected)], expected[min(expected)])


@pytest.mark.parametrize(
    ("name", "arguments", "error", "says"),
    [
        ("model.gguf", {}, SourceError, "expected a .safetensors checkpoint"),
        ("model.safetensors", {"config": "./nowhere"}, SourceError, "no folder ./nowhere"),
        ("model.safetensors", {"revision": "main"}, UsageError, "isn't on the hub"),
        ("gone.safetensors", {}, SourceError, "no file"),
        ("", {"config": "x"}, UsageError, "leave out --config"),
    ],
)
def test_calls_that_cannot_be_meant(tmp_path, name, arguments, error, says):
    for file in ("model.gguf", "model.safetensors"):
        (tmp_path / file).write_bytes(b"nothing")
    with pytest.raises(error, match=says):
        Source.open(str(tmp_path / name), **arguments)
