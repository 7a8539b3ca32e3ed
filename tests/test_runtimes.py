import pytest
import torch

from bakeoff import hardware, plugins
from bakeoff.errors import ArtifactError, InputError, RecipeError, UsageError
from bakeoff.pictures import psnr
from bakeoff.recipe import Placement
from bakeoff.runtimes.engine import load
from bakeoff.runtimes.opening import open_part, read_folder
from bakeoff.runtimes.runtime import _converts

RECIPES = ["torch:fp32", "torch:bf16", "onnx:fp32", "openvino:fp32", "openvino:bf16", "null:fp32"]


@pytest.fixture(params=RECIPES)
def unet(request, baked):
    folder = read_folder(baked(request.param))
    part = folder.family.part("unet")
    with open_part(folder.folders["unet"], part, folder.parts["unet"], Placement(device="cpu", threads=1)) as runtime:
        yield runtime


def feed(runtime, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        port.name: torch.full((1,) * port.rank, 481, dtype=getattr(torch, port.dtype))
        if port.name == "timestep"
        else torch.randn(port.shape({"batch": batch, "height": 8, "width": 8, "sequence": 7}), generator=generator)
        for port in runtime.inputs
    }


def test_outputs_are_the_callers_and_inputs_are_not_written(unet):
    inputs = feed(unet, 0)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    first = unet.run(inputs)["out_sample"]
    kept = first.clone()
    unet.run(feed(unet, 1))
    assert torch.equal(first, kept)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    first.zero_()
    assert torch.equal(unet.run(inputs)["out_sample"], kept)
    assert first.abs().sum() == 0


def test_outputs_are_float32_of_the_right_shape(unet):
    for batch in (1, 3):
        output = unet.run(feed(unet, 0, batch))["out_sample"]
        assert output.dtype == torch.float32
        assert tuple(output.shape) == (batch, 4, 8, 8)


def test_non_contiguous_inputs_are_read_right(unet):
    inputs = feed(unet, 0)
    turned = {**inputs, "sample": inputs["sample"].transpose(2, 3).contiguous().transpose(2, 3)}
    assert torch.equal(unet.run(inputs)["out_sample"], unet.run(turned)["out_sample"])


def test_bad_tensors_are_refused_alike(unet):
    good = feed(unet, 0)
    for name, bad in {"sample": torch.zeros(2, 5, 8, 8), "encoder_hidden_states": torch.zeros(3, 7, 128)}.items():
        with pytest.raises(InputError, match="unet got"):
            unet.run({**good, name: bad})
    with pytest.raises(InputError, match="unet got tensors"):
        unet.run({"sample": good["sample"]})


def test_float_is_never_truncated_to_int(baked):
    folder = read_folder(baked("openvino:fp32"))
    with (
        open_part(
            folder.folders["unet"], folder.family.part("unet"), folder.parts["unet"], Placement(device="cpu")
        ) as unet,
        pytest.raises(InputError, match="lose values"),
    ):
        unet.run({**feed(unet, 0), "timestep": torch.tensor([480.5])})


def test_integers_are_converted_while_they_keep_their_values():
    assert _converts(torch.tensor([1, 49407]), torch.int32)
    assert not _converts(torch.tensor([2**40]), torch.int32)
    assert not _converts(torch.tensor([1]), torch.float32)
    assert _converts(torch.tensor([1.5]), torch.float16)


def test_threads_are_set_and_read_back_alike(unet):
    assert unet.configuration.get("threads", 1) == 1


def test_the_default_number_of_threads_is_the_usable_cores(baked):
    for recipe in ("torch:fp32", "onnx:fp32", "openvino:fp32"):
        folder = read_folder(baked(recipe))
        part = folder.family.part("text_encoder")
        with open_part(folder.folders[part.name], part, folder.parts[part.name], Placement(device="cpu")) as runtime:
            assert runtime.configuration["threads"] == hardware.usable_cores()


def test_every_device_is_detected_with_a_reason():
    found = hardware.devices()
    assert set(found) == {"cpu", "cuda", "rocm", "xpu", "mps", "directml", "gpu", "npu"}
    assert found["cpu"].ok
    assert all(each.ok or (each.reason and each.fix) for each in found.values())


def test_a_missing_device_falls_back_and_says_so(monkeypatch):
    missing = hardware.Availability(ok=False, reason="none here", fix="buy one")
    monkeypatch.setitem(hardware._DETECTORS, "cuda", lambda: missing)
    assert hardware.choose_device("cuda", ("cuda", "cpu"), "torch") == ("cpu", "cuda: none here: using cpu")
    assert hardware.choose_device("npu", ("cuda", "cpu"), "torch")[0] == "cpu"
    monkeypatch.setitem(hardware._DETECTORS, "cuda", lambda: hardware.Availability(ok=True, reason="here"))
    assert hardware.choose_device("cuda", ("cuda", "cpu"), "torch") == ("cuda", None)
    assert hardware.choose_device("auto", ("cuda", "cpu"), "torch") == ("cuda", None)
    with pytest.raises(RecipeError, match="'cuda'"):
        hardware.choose_device("cudo", ("cuda", "cpu"), "torch")


def test_unknown_backends_list_the_known():
    with pytest.raises(RecipeError, match="'openvino'"):
        plugins.runtime("openvno")
    with pytest.raises(RecipeError, match="Known: null, onnx, openvino, tensorrt, torch"):
        plugins.exporter("tflite")


def test_an_onnx_model_cannot_point_out_of_its_folder(copied):
    import onnx

    folder = copied("onnx:fp32")
    model = onnx.load(folder / "unet" / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = "../../secret"
    onnx.save(model, folder / "unet" / "model.onnx")
    (folder / "bakeoff.json").unlink()
    with pytest.raises(ArtifactError, match="outside its folder"), __import__("bakeoff").load(folder) as engine:
        engine.generate("a", steps=1)


def test_hooks_are_called(baked, monkeypatch):
    import bakeoff

    calls = []

    class Hook:
        def on_load(self, engine):
            calls.append(("on_load", engine.family.name))

        def before(self, request):
            calls.append(("before", request.prompts))

        def after(self, request, result):
            calls.append(("after", result.images.shape))

    class Point:
        name = "mine"

        def load(self):
            return Hook()

    points = plugins._points
    monkeypatch.setattr(plugins, "_points", lambda group: {"mine": Point()} if group == "hooks" else points(group))
    with bakeoff.load(baked("null:fp32")) as engine:
        engine.generate("a", steps=1)
    assert [name for name, _ in calls] == ["on_load", "before", "after"]


def test_static_shapes_give_the_same_pictures(baked):
    prompt = "a large red circle on a white background"
    asked = [{"size": (128, 128)}, {"size": (64, 96)}, {"size": (64, 96), "guidance_scale": 1.0}, {"size": (128, 128)}]
    with load(baked("openvino:fp32")) as free, load(baked("openvino:fp32"), static=True) as static:
        for options in asked:
            expected, got = (engine.generate(prompt, seeds=1, steps=2, **options).images for engine in (free, static))
            assert psnr(expected, got) >= 45
        assert static.configuration["unet"]["static"]
        assert not free.configuration["unet"]["static"]


def test_static_is_refused_where_it_does_nothing(baked):
    with pytest.raises(UsageError, match="static does nothing here"):
        load(baked("torch:fp32"), static=True)


@pytest.mark.parametrize("recipe", ["torch:fp32", "torch:bf16"])
def test_torch_multiplies_float32_as_float32_and_leaves_the_flags_as_they_were(baked, recipe):
    flags = [torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before, seen = [flag.fp32_precision for flag in flags], []
    assert before[0] == "tf32"  # torch's own choice
    folder = read_folder(baked(recipe))
    part = folder.family.part("unet")
    with open_part(folder.folders["unet"], part, folder.parts["unet"], Placement(device="cpu", threads=1)) as runtime:
        module = runtime.module()
        module.register_forward_hook(lambda *_: seen.append([flag.fp32_precision for flag in flags]))
        runtime.run(feed(runtime, 0))
        assert runtime.configuration["float32"] == "ieee"
        module.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runtime.run(feed(runtime, 0))
    assert seen == [["ieee"] * 3] * 2
    assert [flag.fp32_precision for flag in flags] == before
