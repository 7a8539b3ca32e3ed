"""Where parts run, and the options that go with a device: what can't be had is refused, what can gives the same pictures."""

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bakeoff
from bakeoff import footprint, hardware
from bakeoff.bench.experiment import parse_arms
from bakeoff.components.component import CAPTURE_SIZES
from bakeoff.components.low_bit import move
from bakeoff.errors import RecipeError, UnavailableError, UsageError
from bakeoff.models import fullsize
from bakeoff.models.drawn import draw
from bakeoff.pictures import psnr
from bakeoff.recipe import Placement, parse
from bakeoff.runtimes.acceleration import (
    GRAPHS_KEPT,
    ChosenAttention,
    Graphs,
    compile_module,
    drop_cut_off,
    heal,
    record_graph,
)
from bakeoff.runtimes.blocks import Blocks, blocks_of
from bakeoff.runtimes.crossing import Crossing, Same
from bakeoff.runtimes.engine import Engine
from bakeoff.runtimes.offload import Need, decide_on_device
from bakeoff.runtimes.opening import open_part, read_folder
from bakeoff.runtimes.station import Station
from bakeoff.runtimes.torch import TorchRuntime

PROMPT = "a large red circle on a white background"
SAME = {"seeds": 3, "steps": 2, "guidance_scale": 3.0}


def generate(folder, **placement):
    with bakeoff.load(folder, threads=1, **placement) as engine:
        return engine.generate(PROMPT, **SAME).images, engine.configuration


@pytest.fixture(scope="module")
def plain(shapes):
    return generate(shapes, device="cpu")[0]


def test_parts_may_go_to_other_devices():
    recipe, placement = parse("torch:bf16+compile=regional@cuda,vae_decoder@cpu,text_encoder=torch:fp32@cpu")
    assert str(recipe) == "torch:bf16,text_encoder=torch:fp32"
    assert placement.of("unet") == Placement("cuda", compile="regional")
    assert placement.of("vae_decoder") == placement.of("text_encoder") == Placement("cpu", compile="regional")
    assert Placement(**placement.as_dict()) == placement
    assert json.loads(json.dumps(placement.as_dict()))["devices"] == {"vae_decoder": "cpu", "text_encoder": "cpu"}
    assert parse("torch:bf16@cuda,vae_decoder=torch:fp32")[1] == Placement("cuda")
    assert Placement(devices="vae_decoder@cpu") == Placement(devices={"vae_decoder": "cpu"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("torch:bf16,vae_decoder=torch:fp32+compile", "compile to vae_decoder alone"),
        ("torch:bf16,vae_decoder@cpu,vae_decoder@cuda", "twice what vae_decoder"),
        ("vae_decoder@cpu", "no recipe for the other parts"),
        ("torch:bf16+compile=reginal", "'regional'"),
        ("torch:bf16+attention=flush", "'flash'"),
        ("torch:bf16+cuda_graphs+token_merging=0.5", "they change what is recorded"),
        ("onnx:fp32+provider_options=HEURISTIC", "name=value"),
    ],
)
def test_what_a_placement_cannot_mean_is_refused(text, says):
    with pytest.raises(RecipeError, match=says):
        parse(text)


def test_arms_keep_their_devices():
    arms = parse_arms("torch:bf16@cuda,vae_decoder@cpu,onnx:fp32")
    assert [arm.recipe for arm in arms] == ["torch:bf16@cuda,vae_decoder@cpu", "onnx:fp32"]


def test_a_part_on_another_device_falls_back_by_itself(shapes, monkeypatch, plain):
    missing = hardware.Availability(ok=False, reason="none here", fix="buy one")
    monkeypatch.setitem(hardware._DETECTORS, "xpu", lambda: missing)
    images, told = generate(shapes, device="cpu", devices={"vae_decoder": "xpu"})
    assert (images == plain).all()
    assert told["vae_decoder"]["fallback"] == "xpu: none here: using cpu"
    assert told["unet"]["fallback"] is None
    with pytest.raises(UsageError, match="'vae_decoder'"):
        bakeoff.load(shapes, devices={"vae_decodr": "cpu"})


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"cuda_graphs": True}, "cuda_graphs can't be had here: it would run on cpu"),
        ({"attention": "cudnn"}, "torch has no cudnn attention on cpu"),
        ({"offload": "blocks"}, "offload=blocks can't be had here: it would run on cpu"),
        ({"provider_options": "a=b"}, "provider_options does nothing here"),
    ],
)
def test_options_that_the_device_has_not_are_refused(shapes, option, says):
    with pytest.raises(UsageError, match=says) as raised:
        bakeoff.load(shapes, device="cpu", **option)
    assert raised.value.fix


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"cuda_graphs": True}, "cuda_graphs can't be had here: CPUExecutionProvider"),
        ({"provider_options": "a=b"}, "provider_options can't be had here: CPUExecutionProvider"),
    ],
)
def test_options_that_the_provider_has_not_are_refused(shapes, option, says):
    folder = read_folder(shapes)
    parts = {name: replace(entry, backend="onnx") for name, entry in folder.parts.items()}
    with pytest.raises(UsageError, match=says) as raised:
        Engine(replace(folder, parts=parts), Placement("cpu", **option))
    assert raised.value.fix


def test_no_compiler_is_said_before_anything_is_compiled(shapes, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"no C\+\+ compiler"):
        bakeoff.load(shapes, device="cpu", compile=True)


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_a_chosen_attention_kernel_gives_the_same_picture(shapes, plain, kernel):
    images, told = generate(shapes, device="cpu", attention=kernel)
    assert psnr(images, plain) > 45
    assert told["unet"]["attention"][kernel] > 0


def test_attention_that_a_kernel_cannot_do_is_counted():
    query = torch.randn(1, 2, 8, 16)
    with ChosenAttention("efficient") as chosen:  # which no CPU has
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert chosen.counts == Counter(other=1)


@pytest.mark.parametrize("layout", ["on", "off"])
def test_the_layout_of_convolutions_can_be_chosen(shapes, plain, layout):
    images, told = generate(shapes, device="cpu", channels_last=layout)
    assert psnr(images, plain) > 45
    assert told["unet"]["channels_last"] == (layout == "on")


class Stack(torch.nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x).relu()
        return (x,)


def test_blocks_come_and_go_and_compute_the_same():
    torch.manual_seed(0)
    module, x = Stack(), torch.randn(2, 8)
    expected = module(x)[0]
    kept = [layer.weight.data_ptr() for layer in module.layers]
    blocks = Blocks("unet", module, torch.device("cpu"))
    with torch.no_grad():
        seen = []
        module.layers[2].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.data_ptr()))
        for _ in range(3):
            assert torch.equal(module(x)[0], expected)
    assert seen
    assert kept[2] not in seen  # it ran on a copy, as it would on a device
    there = [layer.weight.data_ptr() for layer in module.layers]
    assert there[1:] == kept[1:]
    assert there[0] != kept[0]  # it is on its way for the next run already
    assert (blocks.count, blocks.most) == (4, 2)


def test_blocks_are_refused_where_there_are_none_or_codes():
    with pytest.raises(UsageError, match="no lists of blocks"):
        Blocks("vae_decoder", torch.nn.Linear(2, 2), torch.device("cpu"))
    coded = Stack()
    coded.layers[0].weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="codes of a few bits"):
        Blocks("unet", coded, torch.device("cpu"))


@pytest.mark.parametrize("family", ["stable-diffusion", "flux", "z-image"])
def test_denoisers_have_blocks(tiny, family):
    folder = read_folder(tiny(family))
    part = next(part for part in folder.family.parts if part.module in {"unet", "transformer"})
    with open_part(folder.folders[part.name], part, folder.parts[part.name], Placement(device="cpu")) as runtime:
        config = folder.config(part.module)
        inputs = part.component.example(config, part.component.limit(config, CAPTURE_SIZES), 0)
        expected = runtime.run(inputs)
        blocks = Blocks(part.name, runtime.module(), torch.device("cpu"))
        for _ in range(2):
            got = runtime.run(inputs)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert blocks.count == len(blocks_of(runtime.module())) > 1
        assert blocks.most == 2


GB = 10**9
NEEDS = [
    Need("text_encoder", "text", 9 * GB, 1 * GB),
    Need("transformer", "denoising", 24 * GB, 3 * GB),
    Need("vae_decoder", "vae", GB // 10),
]


@pytest.mark.parametrize(
    ("usable", "unload", "blocks"),
    [(40 * GB, False, set()), (30 * GB, True, set()), (20 * GB, True, {"transformer"}), (None, False, set())],
)
def test_a_devices_memory_decides_what_stays_on_it(usable, unload, blocks):
    found = decide_on_device("auto", "cuda", NEEDS, usable)
    assert (found.unload, found.blocks) == (unload, blocks)
    assert bool(found.notes) == unload


def test_what_is_asked_for_counts_more_than_a_devices_memory():
    assert decide_on_device("blocks", "cuda", NEEDS, 40 * GB).blocks == {"text_encoder", "transformer"}
    assert decide_on_device("parts", "cuda", NEEDS, 40 * GB).unload
    assert not decide_on_device("none", "cuda", NEEDS, 1).unload


def test_parts_on_a_device_that_is_too_small_take_turns_and_come_in_blocks(shapes, plain, monkeypatch):
    monkeypatch.setattr(Station, "device", "cuda")  # where the memory is; the CPU computes
    monkeypatch.setattr(footprint, "device_usable_bytes", lambda device: 6_000_000)
    with bakeoff.load(shapes, device="cpu", threads=1) as engine:
        result = engine.generate(PROMPT, **SAME)
        told = engine.configuration
    assert (result.images == plain).all()
    assert told["unet"]["blocks"] > 1
    assert told["vae_decoder"]["blocks"] is None
    assert any("unet takes" in note and "a block at a time" in note for note in result.notes)
    assert told["text_encoder"]["unloaded"] == 1


def replaying(call):
    """Record as a CUDA graph does: its own memory in, its own memory out."""
    outputs = [each.clone() for each in call()]

    def replay():
        for own, made in zip(outputs, call(), strict=True):
            own.copy_(made)

    return replay, outputs


def test_graphs_are_recorded_once_a_shape_and_their_outputs_are_the_callers():
    calls = []

    def module(x, y):
        calls.append(tuple(x.shape))
        return (x * 2 + y,)

    graphs = Graphs("unet", module, replaying)
    x, y = torch.ones(2, 3), torch.ones(1)
    first = graphs(x, y)[0]
    kept = first.clone()
    second = graphs(x * 5, y)[0]
    assert torch.equal(first, kept)
    assert torch.equal(second, x * 10 + 1)
    assert graphs.recorded == 1
    for rows in range(3, 3 + GRAPHS_KEPT):
        graphs(torch.ones(rows, 3), y)
    graphs(x, y)
    assert graphs.recorded == 2 + GRAPHS_KEPT  # the first one had to make room


def test_what_cannot_be_recorded_is_said():
    def fails(call):
        message = "operation not permitted when stream is capturing"
        raise RuntimeError(message)

    with pytest.raises(UnavailableError, match="unet can't be recorded as a CUDA graph") as raised:
        Graphs("unet", lambda x: (x,), fails)(torch.ones(1))
    assert raised.value.fix == "leave out cuda_graphs"


def test_graphs_use_names_that_torch_has():
    source = inspect.getsource(record_graph)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        assert f"torch.cuda.{name}(" in source
        assert hasattr(torch.cuda, name)
    assert {"wait_stream"} <= set(dir(torch.cuda.Stream))
    assert "replay" in dir(torch.cuda.CUDAGraph)


def test_a_tensor_crosses_once_while_it_is_the_same():
    crossing, made = Crossing(torch.device("cpu")), []

    def make(tensor):
        made.append(tensor)
        return tensor * 1

    prompt = torch.ones(2, 3)
    crossing.same.active = True
    first = crossing.to_device("prompt", prompt, make)
    assert crossing.to_device("prompt", prompt.detach(), make) is first
    prompt.add_(1)
    assert torch.equal(crossing.to_device("prompt", prompt, make), prompt)
    assert len(made) == 2
    crossing.to_device("prompt", prompt.clone(), make)
    assert len(made) == 3
    crossing.same.forget()
    crossing.to_device("prompt", prompt, make)
    assert len(made) == 4
    crossing.same.active = False
    crossing.to_device("prompt", prompt, make)
    assert len(made) == 5


def test_inference_tensors_have_no_count_of_writes_and_are_not_remembered():
    with torch.inference_mode():
        tensor = torch.ones(2)
    same = Same()
    same.active = True
    assert same.get("x", tensor, list) is not same.get("x", tensor, list)


def test_an_engines_prompt_crosses_once_a_batch(shapes, monkeypatch):
    crossed = Counter()
    prepare = TorchRuntime._prepare

    def counting(self, tensor, *, exact):
        crossed[self.part.name, tuple(tensor.shape)] += 1
        return prepare(self, tensor, exact=exact)

    monkeypatch.setattr(TorchRuntime, "_prepare", counting)
    with bakeoff.load(shapes, device="cpu", threads=1) as engine:
        first = engine.generate(PROMPT, seeds=1, steps=4, guidance_scale=3.0).images
        again = engine.generate(PROMPT, seeds=1, steps=4, guidance_scale=3.0).images
    assert (first == again).all()
    counts = {shape: count for (part, shape), count in crossed.items() if part == "unet"}
    assert counts.pop(next(shape for shape in counts if len(shape) == 3)) == 2  # the prompt's: once a picture
    assert set(counts.values()) == {8}  # latents and timestep: once a step


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    (tmp_path / "compiled").mkdir()
    return tmp_path / "compiled"


def test_a_library_that_was_cut_off_leaves_the_cache_and_a_whole_one_stays(cache):
    whole = Path(torch._C.__file__).read_bytes()
    for name, content in {"whole": whole, "half": whole[: len(whole) // 2], "none": b"", "start": whole[:40]}.items():
        (cache / f"{name}.so").write_bytes(content)
    (cache / "a.dylib").write_bytes(b"")
    for file in cache.iterdir():
        os.utime(file, (1, 1))
    (cache / "linking.so").write_bytes(whole[:40])  # another process is still at it
    drop_cut_off(cache)
    assert {file.name for file in cache.iterdir()} == {"whole.so", "a.dylib", "linking.so"}


def test_what_cannot_be_loaded_from_the_cache_is_compiled_again_once(cache, tmp_path):
    def loads(library):
        if not calls:
            library.write_bytes(b"another process's")
        calls.append(library)
        if library.exists() or library == hopeless:
            message = f"InductorError: ImportError: {library}: file too short"
            raise RuntimeError(message)
        return "loaded"

    calls, hopeless = [], cache / "hopeless.so"
    assert heal(lambda: loads(cache / "x.so")) == "loaded"
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="hopeless"):
        heal(lambda: loads(hopeless))
    others, calls = tmp_path / "others.so", []
    with pytest.raises(RuntimeError, match="others"):
        heal(lambda: loads(others))
    assert others.exists()


@pytest.mark.slow
def test_torch_compiles_again_what_was_cut_off_in_its_cache(tmp_path):
    code = """
import torch
from bakeoff.runtimes.acceleration import compile_module, heal
module, _ = compile_module(torch.nn.SiLU(), "full")
with torch.no_grad():
    print(heal(lambda: module(torch.ones(8, 8))).sum().item())
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    command, printed = [sys.executable, "-P", "-c", code], []
    for kept in (1.0, 0.0, 0.1):
        for library in tmp_path.rglob("*.main.so"):
            library.write_bytes(library.read_bytes()[: int(kept * library.stat().st_size)])
            os.utime(library, (1, 1))  # the process that was killed has been gone for a while
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**environment, "BAKEOFF_HOME": str(tmp_path)}
        )
        printed.append(done.stdout)
    assert len(set(printed)) == 1
    assert [*tmp_path.rglob("*.main.so")]


@pytest.mark.slow
def test_regional_compilation_compiles_the_blocks_and_is_kept_between_processes(tmp_path, shapes):
    code = """
import json, sys, bakeoff
from torch._dynamo.utils import counters
with bakeoff.load(sys.argv[1], device="cpu", threads=1, compile="regional") as engine:
    images = engine.generate("a large red circle on a white background", seeds=3, steps=2, guidance_scale=3.0).images
    told = engine.configuration["unet"]["compile"]
print(json.dumps([told, dict(counters["inductor"]), int(images.sum())]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"BAKEOFF_HOME": str(tmp_path)}
    runs = []
    for _ in range(2):
        command = [sys.executable, "-P", "-c", code, str(shapes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (told, cold, picture), (_, warm, again) = runs
    assert sum(told["regional"].values()) > 1
    assert cold["fxgraph_cache_miss"] > 0
    assert warm.get("fxgraph_cache_miss", 0) == 0
    assert warm["fxgraph_cache_hit"] > 0
    assert picture == again


def test_blocks_that_are_alike_are_compiled_where_the_class_names_none():
    module = Stack()
    assert compile_module(module, "regional") == (module, {"regional": {"Linear": 4}})
    assert all(layer._compiled_call_impl is not None for layer in module.layers)
    assert module.first._compiled_call_impl is None
    alone = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert compile_module(alone, "regional") == (alone, {"regional": {}})
    assert compile_module(alone, False) == (alone, False)  # noqa: FBT003 - the placement's own value


@pytest.mark.parametrize(
    ("model", "module", "count"),
    [
        ("sdxl", "unet", 70),
        ("sd-3.5-medium", "transformer", 23),
        ("sd-3.5-large", "transformer", 37),
        ("z-image", "transformer", 34),
        ("flux.1-dev", "transformer", 57),
    ],
)
def test_regional_finds_the_blocks_of_full_size_denoisers(model, module, count):
    library, class_name, config = fullsize.config(model, module)
    with torch.device("meta"):
        made = getattr(__import__(library), class_name)(**config)
    _, compiled = compile_module(made, "regional")
    assert sum(compiled["regional"].values()) == count


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_codes_go_to_a_device_with_their_scales(precision):
    pytest.importorskip("bitsandbytes")
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(torch.bfloat16)
    moved = move(draw(layer, "cpu", precision), torch.device("meta"))[0].weight
    beside = (moved.CB, moved.SCB) if precision == "int8" else (moved.quant_state.absmax, moved.quant_state.code)
    assert {each.device.type for each in (moved, *beside)} == {"meta"}
