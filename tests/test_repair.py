"""Exports that fail their gate, healed by as few layers in higher precision as it takes."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeoff import plugins
from bakeoff.artifact import Artifact
from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.errors import ParityError
from bakeoff.parity.budget import Budget, Gate
from bakeoff.recipe import PartRecipe, parse
from bakeoff.sources.source import Source
from bakeoff.tuning.remedy import Remedy, _alone, _put_back, _worst, rank_here, reached, remedy
from bakeoff.tuning.repair import Repair, _failing, export_repaired

CONVOLUTION = "decoder.up_blocks.1.resnets.0.conv1"


def test_as_few_layers_as_are_predicted_to_be_needed():
    errors = {"a": 0.03, "b": 0.01, "c": 0.02, "d": 0.001}
    measured = sum(error**2 for error in errors.values()) ** 0.5
    assert _worst(errors, measured, 0.03) == ["a"]
    assert _worst(errors, measured, 0.012) == ["a", "c"]
    assert _worst(errors, measured, 0.0005) == ["a", "c", "b", "d"]
    assert _worst(errors, 2 * measured, 0.03) == ["a", "c"], "what all err together counts, not the sum"
    assert _worst({**errors, "b": float("inf")}, float("inf"), 0.03) == ["b"], "it breaks the part by itself"
    assert _worst(errors, float("inf"), 0.03) == [], "what breaks it isn't any layer"
    assert _worst(dict.fromkeys(errors, 0.0), measured, 0.03) == [], "none of them errs"


def test_the_end_of_the_interval_counts_where_it_is_beyond_all_cases():
    cases = [{"error": 0.9e-3}, {"error": 0.5e-3}]
    assert reached({"cases": cases, "upper": 1.5e-3}) == 1.5e-3
    assert reached({"cases": cases, "upper": 0.7e-3}) == 0.9e-3
    assert reached({"cases": cases, "upper": float("inf")}) == 0.9e-3


def test_norms_that_are_wide_anyway_are_not_put_back(baked, monkeypatch):
    """As TensorRT's: to put one back would change nothing."""
    artifact = baked("torch:bf16", proved=True)
    arguments = str(artifact), str(Source.open("shapes").folder), "vae_decoder", {}
    errors, *_ = rank_here(*arguments)
    monkeypatch.setattr(type(plugins.exporter("torch")), "wide_norms", True, raising=False)
    without, *_ = rank_here(*arguments)
    left_out = errors.keys() - without.keys()
    assert left_out
    assert all("norm" in name for name in left_out)
    assert not any("norm" in name for name in without)


def test_what_is_put_back_counts_last_and_keeps_what_was_asked():
    part = PartRecipe("torch", "fp16", layers={"conv_in": "fp16", "conv_*": "fp16", "norm": "fp32"})
    again = Remedy({"conv_in": "fp32"}).applied(part)
    assert [*again.layers] == ["conv_*", "norm", "conv_in"]
    assert Remedy(whole="bf16").applied(part).layers == {"norm": "fp32"}
    assert Remedy(whole="fp32").applied(part).layers == {}


def test_a_part_may_be_put_back_whole_and_then_in_layers():
    told = Repair({"vae_decoder": {"a": "fp32"}}, {"vae_decoder": "bf16"}, 1, 2, {"vae_decoder": 1.5}).in_words()
    assert told[0] == "repaired vae_decoder: all of it in bf16; 1 layer put back, a: 1.50 × the time"


def test_what_has_no_codes_beside_layers_that_have_is_bfloat16():
    module = torch.nn.ModuleDict({"coded": torch.nn.Linear(64, 64), "kept": torch.nn.Linear(64, 64)})
    mixture = replace(plugins.mixture("int8"), kept={"kept.weight"})
    given = torch.rand(4, 64)
    before = {name: layer(given) for name, layer in module.items()}
    for name, plain in before.items():
        with _alone(module, name, name, mixture, {}):
            assert not torch.equal(module[name](given), plain)
    weight, bias = (each.bfloat16().float() for each in (module["kept"].weight, module["kept"].bias))
    with _alone(module, "kept", "kept", mixture, {}, stored=True):
        assert torch.equal(module["kept"](given), torch.nn.functional.linear(given, weight, bias))
    assert _alone(module, "kept", "kept", plugins.mixture("fp32"), {}) is None
    assert _alone(module, "kept", "kept", mixture, {}, beside="fp32") is None


def test_a_part_whose_last_layers_with_codes_are_put_back_has_no_codes():
    assert _put_back({"a": "bf16", "norm": "fp32"}, ["a", "b"]).whole is None
    last = _put_back({"a": "bf16", "b": "bf16", "norm": "fp32"}, ["a", "b"])
    before = PartRecipe("torch", "int8", options={"codes": "bakeoff"}, layers={"c": "fp32"})
    assert last.applied(before) == PartRecipe("torch", "bf16", layers={"c": "fp32", "norm": "fp32"})
    assert "bf16 for all of it" in last.in_words()
    assert _put_back({"norm": "fp32"}, []).whole is None, "it had none before"
    assert _put_back({"a": "fp32"}, ["a"]).applied(PartRecipe("tensorrt", "w8a8")) == PartRecipe("tensorrt", "fp32")


@pytest.mark.slow
def test_rounding_is_healed_by_the_layers_that_lose_most(tmp_path, capsys):
    target = tmp_path / "out"
    arguments = ["export", "shapes", "-o", str(target), "--recipe", "torch:fp32,unet=onnx:int8"]
    assert main([*arguments, "--budget", "unet=46.5dB"]) == ParityError.exit_code
    assert main([*arguments, "--budget", "unet=46.5dB", "--repair"]) == 0
    assert "repaired unet: " in capsys.readouterr().err
    manifest = Artifact.open(target).manifest
    layers = manifest.parts["unet"].key_fields["recipe"]["layers"]
    assert 1 <= len(layers) <= 5
    assert set(layers.values()) == {"bf16"}
    assert manifest.proved
    assert manifest.parts["unet"].weight_shares["int8"] > 0.9


@pytest.mark.slow
def test_where_pictures_alone_fail_the_part_nearest_to_its_tolerance_is_put_back(tmp_path):
    recipe = parse("torch:fp32,unet=torch:bf16")[0]
    made = export("shapes", tmp_path / "out", recipe)
    assert _failing(made) == {}
    proof = {**made.manifest.proof, "trajectory": {**made.manifest.proof["trajectory"], "problem": "gate pictures"}}
    failing = made.with_proof({**proof, "status": "failing"})
    worst = max(proof["parts"]["unet"]["upper"], *(case["error"] for case in proof["parts"]["unet"]["cases"]))
    assert _failing(failing) == {"unet": pytest.approx(worst / 2)}
    layers = remedy(failing, "unet", Source.open("shapes"), worst / 2).layers
    assert "conv_in" in layers, "its loss alone is most of the part's"
    assert set(layers.values()) == {"fp32"}


@pytest.mark.slow
def test_pictures_that_fail_although_all_is_wide_are_refused(tmp_path):
    made = export("shapes", tmp_path / "out", parse("torch:fp32")[0])
    proof = {**made.manifest.proof, "trajectory": {"problem": "gate fp32"}}
    with pytest.raises(ParityError, match="gate fp32; no layer in higher precision would mend it"):
        _failing(made.with_proof(proof))


@pytest.fixture
def overflowing(tmp_path):
    """The embedded model with a decoder's convolution scaled up, which the norm behind it cancels."""
    model = tmp_path / "model"
    shutil.copytree(Source.open("shapes").folder, model)
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    for name in ("weight", "bias"):
        tensors[f"{CONVOLUTION}.{name}"] *= 1e5
    save_file(tensors, file)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["torch:fp16", "openvino:fp16", "onnx:fp16+compute=half"])
def test_an_overflow_in_float16_is_healed_where_it_arises(overflowing, tmp_path, precision):
    recipe, target = parse(f"torch:fp32,vae_decoder={precision}")[0], tmp_path / "out"
    with pytest.raises(ParityError, match="vae_decoder differs from eager fp32 by inf"):
        export(str(overflowing), target, recipe)
    artifact, repaired = export_repaired(str(overflowing), target, recipe)
    assert artifact.manifest.proved
    layers = repaired.layers["vae_decoder"]
    assert CONVOLUTION in layers
    assert set(layers.values()) == {"fp32"}
    assert len(layers) <= 3
    assert repaired.bytes_after > repaired.bytes_before


@pytest.fixture
def overflowing_sum(tmp_path):
    """The embedded model with a decoder of whose residual both sides fit into float16, and their sum doesn't."""
    model = shutil.copytree(Source.open("shapes").folder, tmp_path / "model")
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    for name in ("decoder.conv_in.bias", "decoder.mid_block.resnets.0.conv2.bias"):
        tensors[name][0] = 4e4
    save_file(tensors, file)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["torch:fp16", "openvino:fp16", "onnx:fp16+compute=half"])
def test_an_overflow_between_layers_is_healed_by_bf16_for_the_part(overflowing_sum, tmp_path, recipe):
    said = []
    artifact, repaired = export_repaired(
        str(overflowing_sum),
        tmp_path / "out",
        parse(f"null:fp32,vae_decoder={recipe}")[0],
        progress=said.append,
    )
    assert artifact.manifest.proved
    assert repaired.whole == {"vae_decoder": "bf16"}
    assert not repaired.layers
    assert sum("vae_decoder fails: " in line for line in said) == 1
    assert any("all of it in bf16" in line for line in repaired.in_words())


@pytest.mark.slow
def test_what_no_precision_mends_is_said(tmp_path):
    gate = Gate({"text_encoder": Budget(280.0)})
    with pytest.raises(ParityError, match="no layer in higher precision would mend it"):
        export_repaired("shapes", tmp_path / "out", parse("torch:fp32,text_encoder=onnx:fp32")[0], gate=gate)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
