"""torch:fp8: 8-bit floats as torchao stores them; a CPU multiplies them, too, so that they can be proved without a GPU."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bakeoff.artifact import Artifact
from bakeoff.bake import export
from bakeoff.components.component import Sizes
from bakeoff.errors import UnavailableError
from bakeoff.quantize import fp8
from bakeoff.recipe import Placement, parse
from bakeoff.runtimes import float8
from bakeoff.runtimes.opening import judged_on, open_part, read_folder
from bakeoff.runtimes.torch import TorchRuntime
from bakeoff.sources.source import Source
from bakeoff.weights import Checkpoint

pytest.importorskip("torchao")
PARTS = ("text_encoder", "unet")


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """No calibration is asked for: torch rounds activations with scales of their own."""
    folder = tmp_path_factory.mktemp("fp8") / "out"
    recipe = parse("null:fp32,unet=torch:fp8,text_encoder=torch:fp8")[0]
    return read_folder(export("shapes", folder, recipe, prove=False).folder)


def theirs(weight):
    """Return a weight as torchao's `quantize_` makes it, which refuses to without a GPU."""
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    product = Float8MMConfig(use_fast_accum=True)
    given = float8_tensor.QuantizeTensorToFloat8Kwargs(
        granularity=PerRow(), mm_config=product, hp_value_lb=fp8.LEAST_RANGE
    )
    return float8_tensor.Float8Tensor.from_hp(weight, granularity=PerRow(), mm_config=product, act_quant_kwargs=given)


@pytest.mark.parametrize("part", PARTS)
def test_the_file_is_what_torchao_would_have_written(baked, part):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    file = Checkpoint.open(baked.folders[part]).files[0]
    ours = load_file(file)
    with safe_open(file, "pt") as stream:
        said = {key: json.loads(text) for key, text in stream.metadata().items() if key != "format"}
    source = Source.open("shapes").checkpoint(baked.family.part(part).module)
    coded = [name.removesuffix("._weight_qdata") for name in ours if name.endswith("._weight_qdata")]
    assert len(coded) > 10
    for layer in coded:
        entry = source.entries[f"{layer}.weight"]
        with safe_open(entry.file, "pt") as stream:
            weight = stream.get_tensor(entry.name)
        tensors, told = flatten_tensor_state_dict({f"{layer}.weight": theirs(weight.float())})
        expected = json.loads(told[f"{layer}.weight"])
        expected["_data"]["dtype"]["_data"] = "bfloat16"  # of what is computed beside
        assert said[f"{layer}.weight"] == expected
        codes, scales = (tensors[f"{layer}._weight_{each}"] for each in ("qdata", "scale"))
        got = ours[f"{layer}._weight_qdata"].float() * ours[f"{layer}._weight_scale"]
        assert ours[f"{layer}._weight_qdata"].dtype == codes.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(got, codes.float() * scales, rtol=0.08, atol=1e-6)


def test_the_settings_are_diffusers_own(baked):
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    written = json.loads((baked.folders["unet"] / "config.json").read_text())["quantization_config"]
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=fp8.LEAST_RANGE)
    assert written == json.loads(json.dumps(TorchAoConfig(config).to_dict()))


@pytest.mark.parametrize("part", PARTS)
def test_it_computes_in_8_bit_floats_near_the_modules_own(baked, part):
    made = baked.family.part(part)
    inputs = made.component.example(baked.config(made.module), Sizes(2, 8, 8, 12), seed=0)
    source = read_folder(Source.open("shapes").folder)
    placement = Placement("cpu", threads=1)
    with (
        open_part(baked.folders[part], made, baked.parts[part], placement) as runtime,
        open_part(source.folders[part], made, source.parts[part], placement) as eager,
    ):
        got, expected = runtime.run(inputs), eager.run(inputs)
        told = runtime.configuration["precision"]
    assert told["float8_e4m3fn"] > 10
    for name in expected:
        error = (got[name] - expected[name]).pow(2).mean().sqrt() / expected[name].pow(2).mean().sqrt()
        assert 1e-4 < error < 0.1, name


def test_a_row_of_noughts_has_a_scale(baked):
    """SDXL's pipeline gives noughts for an empty negative prompt."""
    made = baked.family.part("unet")
    inputs = made.component.example(baked.config("unet"), Sizes(2, 8, 8, 12), seed=0)
    inputs["encoder_hidden_states"].zero_()
    with open_part(baked.folders["unet"], made, baked.parts["unet"], Placement("cpu", threads=1)) as runtime:
        assert all(tensor.isfinite().all() for tensor in runtime.run(inputs).values())


def test_what_stays_a_float_says_why(baked):
    assert baked.parts["unet"].weight_bytes["fp8"] > 0
    assert "torchao has codes for Linear layers alone" in baked.parts["unet"].kept.values()


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False), ((10, 0), False)])
def test_a_gpu_without_8_bit_floats_is_refused(monkeypatch, capability, refused):
    from bakeoff.runtimes.runtime import PartFiles

    part = PartFiles("unet", None, "fp8", (), (), lambda dtype: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    float8.refuse(replace(part, precision="bf16"), torch.device("cuda"))
    float8.refuse(part, torch.device("cpu"))
    if refused:
        with pytest.raises(UnavailableError, match="compute capability 8.6") as raised:
            float8.refuse(part, torch.device("cuda"))
        assert "w8a8-dynamic" in raised.value.fix
    else:
        float8.refuse(part, torch.device("cuda"))
    with pytest.raises(UnavailableError, match=": mps"):
        float8.refuse(part, torch.device("mps"))


def test_a_torch_whose_cpu_lacks_8_bit_floats_proves_them_on_a_gpu_or_says_so(baked, monkeypatch):
    from bakeoff.runtimes.runtime import PartFiles

    artifact = Artifact.open(baked.folders["unet"].parent)
    assert not judged_on(artifact).devices
    monkeypatch.setattr(float8, "has_cpu", lambda: False)
    with pytest.raises(UnavailableError, match="doesn't multiply on a CPU") as raised:
        float8.refuse(PartFiles("unet", None, "fp8", (), (), lambda dtype: None), torch.device("cpu"))
    assert "torch>=2.13" in raised.value.fix
    assert not TorchRuntime.obstacle("fp8").ok
    monkeypatch.setattr(float8, "has_gpu", lambda: True)
    assert dict(judged_on(artifact).devices) == dict.fromkeys(PARTS, "cuda")
