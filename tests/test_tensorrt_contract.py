"""Build, run, inspection and refit of TensorRT engines, against a list of TensorRT 11.4's names: no GPU has run any of it here.

The stand-in (tests/tensorrt/standin.py) has the list's names and arguments alone; its engines compute with ONNX Runtime.
"""

import ast
import contextlib
import gc
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from bakeoff import cuda, nvinfer, plugins
from bakeoff.artifact import Artifact
from bakeoff.components.component import Component, Port, Sizes
from bakeoff.components.loading import load_diffusers
from bakeoff.errors import (
    ArtifactError,
    Cancelled,
    CorruptError,
    InputError,
    LoweringError,
    RecipeError,
    ResourceError,
    UnavailableError,
)
from bakeoff.exporters import onnx_typed, tensorrt_build, tensorrt_progress
from bakeoff.exporters.capture import module_on_hollow, on_hollow
from bakeoff.exporters.exporter import Subject
from bakeoff.exporters.onnx import hollow_graph
from bakeoff.exporters.onnx_memory import peak_bytes
from bakeoff.exporters.tensorrt import ABOUT, PLAN, TensorRTExporter
from bakeoff.exporters.tensorrt_settings import DEFAULTS, Settings
from bakeoff.hardware import Availability
from bakeoff.quantize.grid import Grid
from bakeoff.recipe import Placement, parse
from bakeoff.runtimes import tensorrt as tensorrt_runtime
from bakeoff.runtimes.crossing import Crossing
from bakeoff.runtimes.runtime import PartFiles
from bakeoff.runtimes.tensorrt import TensorRTRuntime
from bakeoff.runtimes.tensorrt_device import Device
from bakeoff.runtimes.tensorrt_inspection import Inspection, dtype_of, inspect
from bakeoff.runtimes.tensorrt_profiles import Profile, choose
from bakeoff.sources.lora import Delta, added
from bakeoff.weights import Checkpoint, sha256

ROOT = Path(__file__).parent.parent
GPU = cuda.Device("NVIDIA H100 80GB HBM3", "9.0", 80_000_000_000, 79_000_000_000, "580.65.06", "13.0")
PROFILES = "batch:1:2:6/height:8:8:16/width:8:8:16/sequence:1:5:16"


def load_standin():
    spec = importlib.util.spec_from_file_location("standin", ROOT / "tests" / "tensorrt" / "standin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STANDIN = load_standin()


class Little(ModelMixin, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 96, bias=False)
        self.second = nn.Linear(96, 64)
        self.take = nn.Conv2d(8, 64, 3, padding=1)

    def forward(self, rows, time, picture):
        hidden = self.second(torch.tanh(self.first(rows)))
        return hidden * torch.cos(time), self.take(picture)


class Flat(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, rows, time, picture):
        return self.module(rows, time, picture)


class LittlePart(Component):
    name = "tensorrt-little"
    operations = 4

    def inputs(self, config):
        return (
            Port("rows", "float32", ("batch", "sequence", 64)),
            Port("time", "float32", (), exact=True),
            Port("picture", "float32", ("batch", 8, "height", "width")),
        )

    def outputs(self, config):
        return (
            Port("hidden", "float32", ("batch", "sequence", 64)),
            Port("taken", "float32", ("batch", 64, "height", "width")),
        )

    def load(self, folder, dtype):
        return load_diffusers(Little, folder, dtype)

    def flat(self, module):
        return Flat(module)

    def example(self, config, sizes, seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = {port.name: port.shape(sizes.as_dict()) for port in self.inputs(config)}
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {**made, "time": torch.tensor(0.3)}

    def stand_in(self, runners, config):
        raise NotImplementedError


class CpuDevice(Device):
    """Tensors of the CPU in the place of the GPU's; graphs keep what was launched while they were captured."""

    def __init__(self, simulation):
        self.name, self.simulation, self.free = torch.device("cpu"), simulation, 10_000_000_000
        self.total = self.free
        self._block, self._wanted = None, {}
        simulation.check_memory = self.check

    stream = property(lambda self: 77)

    def check(self, memory):
        assert memory == (self._block.data_ptr(), self._block.numel()), "that memory is given back"

    def empty(self, shape, dtype):
        if math.prod(shape) > self.total:
            raise torch.OutOfMemoryError
        return torch.full(shape, 111, dtype=dtype)

    def working(self, *read):
        return contextlib.nullcontext()

    def give_back(self):
        pass

    def copy(self, source, target):
        target.copy_(source)

    def hand_over(self, tensor):
        return tensor

    def finish(self):
        pass

    def free_bytes(self):
        return self.free

    def capture(self, work):
        self.simulation.capturing = []
        work()
        launched, self.simulation.capturing = self.simulation.capturing, None
        return launched

    def replay(self, graph):
        for launch in graph:
            launch()


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """The little part's folder and its graph, captured once."""
    folder = tmp_path_factory.mktemp("little")
    torch.manual_seed(0)
    Little().save_pretrained(folder)
    return folder, hollow_graph(subject_of(folder, "fp32", {}, tmp_path_factory.mktemp("work")))


def subject_of(folder, precision, options, work, activations=None):
    part = LittlePart()
    return Subject(
        part="little",
        mixture=plugins.mixture(precision),
        activations=activations or {},
        inputs=part.inputs({}),
        outputs=part.outputs({}),
        source=folder,
        checkpoint=Checkpoint.open(folder),
        capture=on_hollow("little", part, {}, folder, work / "hollow"),
        module=module_on_hollow(part, folder, work / "module"),
        weights="auto",
        options={"profiles": PROFILES, **options},
        limits={"sequence": 12},
    )


@pytest.fixture
def simulation(monkeypatch, tmp_path):
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path / "home"))
    simulation = STANDIN.Simulation()
    module = STANDIN.make(simulation)
    device = CpuDevice(simulation)
    found = Availability(ok=True, reason="the stand-in")
    monkeypatch.setattr(nvinfer, "library", lambda: module)
    monkeypatch.setattr(nvinfer, "device", lambda: GPU)
    monkeypatch.setattr(nvinfer, "free_bytes", lambda: GPU.free_bytes)
    monkeypatch.setattr(nvinfer, "available", lambda: found)
    monkeypatch.setattr(nvinfer, "runnable", lambda: found)
    monkeypatch.setattr(Device, "shared", lambda: device)
    simulation.module, simulation.device = module, device
    return simulation


@pytest.fixture
def lower(captured, simulation, tmp_path, monkeypatch):
    """Lower the little part by precision and options; return the folder and what the exporter said."""
    source, (model, weights) = captured
    monkeypatch.setattr(onnx_typed, "hollow_graph", lambda _: (model.clone(), weights))

    def get(precision="fp32", name="part", activations=None, **options):
        folder = tmp_path / name
        folder.mkdir()
        given = {key: "" if value is True else value for key, value in options.items()}
        subject = subject_of(source, precision, given, tmp_path, activations)
        return folder, TensorRTExporter().lower(subject, folder)

    return get


def vouched(folder):
    return {file.name: sha256(file) for file in folder.iterdir()}


def opened(folder, *, graphs=False, deltas=None, hashes=None):
    part = LittlePart()
    files = PartFiles(
        "little",
        folder,
        "fp32",
        part.inputs({}),
        part.outputs({}),
        lambda _: None,
        deltas or {},
        vouched(folder) if hashes is None else hashes,
    )
    placement = SimpleNamespace(device="auto", cuda_graphs=graphs)
    return TensorRTRuntime(files, placement)


def eager(folder, inputs, deltas=None):
    module = LittlePart().load(folder, torch.float32)
    for name, additions in (deltas or {}).items():
        parameter = module.get_parameter(name)
        parameter.data = added(parameter.data, additions)
    with torch.no_grad():
        hidden, taken = module(**inputs)
    return {"hidden": hidden, "taken": taken}


def close(got, expected, tolerance=1e-5):
    return all(torch.allclose(got[name], expected[name], atol=tolerance, rtol=tolerance) for name in expected)


def example(seed=0, sizes=(2, 8, 12, 5)):
    return LittlePart().example({}, Sizes(*sizes), seed)


def delta(seed):
    generator = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(96, 4, generator=generator), torch.randn(4, 64, generator=generator), 0.5)


def builder_flags(folder):
    return set(json.loads((folder / PLAN).read_bytes().partition(b"\n")[0])["flags"])


# The build


def test_what_the_builder_is_told(lower, simulation):
    folder, lowered = lower("fp16", level="4", workspace_mib="512", hardware="ampere_plus")
    module = simulation.module
    assert builder_flags(folder) == set()  # TF32 is off
    settings = {name: a["value"] for kind, name, a in simulation.calls if kind == "IBuilderConfig" and "value" in a}
    assert settings["builder_optimization_level"] == 4
    assert settings["profiling_verbosity"] is module.ProfilingVerbosity.DETAILED
    assert settings["hardware_compatibility_level"] is module.HardwareCompatibilityLevel.AMPERE_PLUS
    assert simulation.named("set_memory_pool_limit") == [
        {"pool": module.MemoryPoolType.WORKSPACE, "pool_size": 512 << 20}
    ]
    shapes = {each["input"]: (each["min"], each["opt"], each["max"]) for each in simulation.named("set_shape")}
    assert shapes["picture"] == ((1, 8, 8, 8), (2, 8, 8, 8), (6, 8, 16, 16))
    assert shapes["rows"] == ((1, 1, 64), (2, 5, 64), (6, 12, 64))  # no longer than the model can take
    assert "time" not in shapes
    assert lowered.weights == "written"
    assert set(lowered.weight_bytes) == {"float16"}


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"refit": True}, {"REFIT"}),
        ({"strip": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"strip": True, "refit": True}, {"STRIP_PLAN", "REFIT"}),
        ({"weight_streaming": True}, {"WEIGHT_STREAMING"}),
        ({"version_compatible": True}, {"VERSION_COMPATIBLE"}),
    ],
)
def test_each_option_sets_its_flags_alone(lower, options, flags):
    folder, _ = lower("fp32", **options)
    assert builder_flags(folder) == flags
    assert (folder / "model.safetensors").is_file() == bool({"refit", "strip"} & set(options))


def test_several_profiles_and_one_for_the_proof(lower, simulation):
    lower("fp32", profiles="batch:1/height:8/width:8/sequence:4|batch:1:2:4/height:16/width:16/sequence:4")
    assert len(simulation.named("add_optimization_profile")) == 3
    assert [each["max"] for each in simulation.named("set_shape") if each["input"] == "picture"] == [
        (1, 8, 8, 8),
        (4, 8, 16, 16),
        (6, 8, 16, 16),
    ]


@pytest.mark.parametrize(
    ("limits", "longest"),
    [({}, 512), ({"sequence": 77}, 77)],
    ids=["T5, whose texts pipelines pad", "CLIP"],
)
def test_narrow_profiles_leave_room_for_what_drawings_give_a_part(limits, longest):
    ports = (Port("latents", "float32", ("batch", "tokens", 64)), Port("text", "float32", ("batch", "sequence", 32)))
    settings = Settings.read("fp16", {"profiles": "batch:1/tokens:4096/sequence:77"})
    named, proof = settings.shapes(ports, limits)
    assert named["latents"] == ((1, 4096, 64),) * 3
    assert proof["latents"] == ((1, 16, 64), (2, 32, 64), (6, 32, 64))  # three rows, under guidance six
    assert proof["text"] == ((1, 5, 32), (2, 12, 32), (6, longest, 32))
    assert len(Settings.read("fp16", {}).shapes(ports, limits)) == 1  # the defaults hold them all


def test_timings_are_kept_for_this_gpu_and_reused(lower, simulation):
    lower("fp32", name="one")
    file = tensorrt_build.timing_cache_file()
    assert "H100" in file.name
    assert "11.4" in file.name
    assert file.read_bytes() == b"timings"
    lower("fp32", name="two")
    assert [bytes(each["serialized_timing_cache"]) for each in simulation.named("create_timing_cache")] == [
        b"",
        b"timings",
    ]
    simulation.lost_timings = True
    lower("fp32", name="three")
    assert [bytes(each["serialized_timing_cache"]) for each in simulation.named("create_timing_cache")][2:] == [
        b"timings",
        b"",
    ]


def test_a_refused_operator_is_named_and_the_log_kept(lower, simulation):
    simulation.refused = {"Conv"}
    with pytest.raises(LoweringError, match=r"at node node_conv2d.*no importer") as raised:
        lower("fp32")
    log = Path(re.search(r"in (\S+\.log)", raised.value.fix)[1])
    assert "node_conv2d (Conv)" in log.read_text()


def test_a_build_without_memory_says_what_it_was_predicted_to_take(lower, simulation):
    simulation.build_fails_at, simulation.build_says = "node_conv2d", "Requested size was 9000000 bytes. out of memory"
    with pytest.raises(
        LoweringError, match=r"predicted to take up to 0\.0 GB of device memory, 79\.0 GB are free"
    ) as raised:
        lower("fp16")
    assert "+profiles=" in raised.value.fix


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
def test_activations_are_predicted_from_the_graph_at_the_largest_sizes(lower, precision):
    small, large = (
        json.loads(
            (
                lower(precision, f"{precision}-{side}", profiles=f"batch:6/height:{side}/width:{side}/sequence:12")[0]
                / ABOUT
            ).read_text()
        )
        for side in (32, 64)
    )
    width = 4 if precision == "fp32" else 2
    taken = {side: about["predicted"]["activation_bytes"] for side, about in ((32, small), (64, large))}
    feature_map = 6 * 64 * 64 * 64 * width  # 64 channels
    assert feature_map <= taken[64] <= 8 * feature_map
    assert 3 <= taken[64] / taken[32] <= 5
    assert large["predicted"]["build_bytes"] > taken[64]


def test_weights_that_are_widened_are_no_activations(tmp_path):
    """As the graphs of codes have them: before the first product, one for each."""
    count, width = 20, 64
    tensor = onnx.TensorProto
    nodes = [onnx.helper.make_node("DequantizeLinear", [f"w{i}", "s"], [f"wide{i}"]) for i in range(count)]
    nodes += [onnx.helper.make_node("MatMul", [f"x{i}", f"wide{i}"], [f"x{i + 1}"]) for i in range(count)]
    weights = [onnx.numpy_helper.from_array(np.ones((width, width), np.int8), f"w{i}") for i in range(count)]
    ports = [onnx.helper.make_tensor_value_info(name, tensor.FLOAT, ["batch", width]) for name in ("x0", f"x{count}")]
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "s")
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], [*weights, scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.save(model, tmp_path / "inline.onnx")
    onnx.save(model, tmp_path / "beside.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    for file in ("inline.onnx", "beside.onnx"):
        assert peak_bytes(tmp_path / file, {"x0": (3, width)}) == 2 * 3 * width * 4, "what a product takes and gives"


def test_a_failing_build_names_the_node_and_keeps_the_log(lower, simulation):
    simulation.build_fails_at = "node_conv2d"
    with pytest.raises(LoweringError, match="at node node_conv2d: .*could not find any implementation") as raised:
        lower("fp16")
    log = Path(re.search(r"in (\S+\.log)", raised.value.fix)[1])
    assert "Error Code 10" in log.read_text()


def test_an_interrupted_build_stops_at_the_next_step(lower, simulation, monkeypatch):
    steps, stops = [], []

    def watched(module, bars, stop):
        stops.append(stop)
        return tensorrt_progress.monitor(module, bars, stop)

    def interrupt(step):
        steps.append(step)
        if step == 0:
            for _ in range(2):  # by somebody who doesn't wait
                os.kill(os.getpid(), signal.SIGINT)
                assert stops[0].wait(60)  # the main thread is to take the signal

    monkeypatch.setattr(tensorrt_build, "monitor", watched)
    simulation.on_step = interrupt
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Cancelled, match="interrupted"):
        lower("fp32")
    assert steps == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_is_a_bar_where_there_is_a_terminal():
    import io
    import threading

    from bakeoff.exporters.tensorrt_progress import Bars, monitor

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    module = STANDIN.make(STANDIN.Simulation())
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        stop = threading.Event()
        with Bars("unet", stream) as bars:
            moves = monitor(module, bars, stop)
            moves.phase_start("Tactics", "Building", 4)
            assert moves.step_complete("Tactics", 0)
            assert moves.step_complete("unheard of", 0)
            stop.set()
            assert not moves.step_complete("Tactics", 1)
            moves.phase_finish("Tactics")
        assert ("unet: Tactics" in stream.getvalue()) == shown


def test_a_build_that_cannot_fit_is_refused_with_figures(lower, monkeypatch):
    monkeypatch.setattr(nvinfer, "free_bytes", lambda: 10_000)
    with pytest.raises(ResourceError, match=r"2\.1 times its weights.*are free") as raised:
        lower("fp32", name="one")
    assert "+weight_streaming" in raised.value.fix
    lower("fp32", name="two", weight_streaming=True)  # so the hint helps


def test_sizes_that_the_builder_does_not_take_are_an_error(simulation):
    """`set_shape` of the bindings raises where others say no."""
    builder = simulation.module.Builder(nvinfer.logger(simulation.module, []))
    config = builder.create_builder_config()
    with pytest.raises(LoweringError, match="TensorRT doesn't take profile 3") as raised:
        tensorrt_build._add_profile(builder, config, {"rows": ((2, 4), (1, 4), (2, 4))}, 3)
    assert "+profiles=" in raised.value.fix


def test_free_memory_is_asked_for_each_time(monkeypatch):
    free = iter([3_000, 2_000])
    monkeypatch.setattr(cuda, "in_child", lambda *_: ({"device": {"free_bytes": next(free)}, "reason": ""}, None))
    assert (nvinfer.free_bytes(), nvinfer.free_bytes()) == (3_000, 2_000)
    monkeypatch.setattr(cuda, "in_child", lambda *_: ({"device": None, "reason": "cuInit gave 999"}, None))
    assert nvinfer.free_bytes() == 0


# Running


def test_an_engine_computes_what_torch_does(lower, captured):
    folder, _ = lower("fp32")
    with opened(folder) as runtime:
        for seed, sizes in enumerate([(2, 8, 12, 5), (1, 16, 8, 1), (4, 8, 8, 12)]):
            inputs = example(seed, sizes)
            assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert runtime.configuration["precision"] == {"float32": 3}
        assert runtime.configuration["other_precision"] == {}
        assert runtime.configuration["fusion"]["kinds"]["Reformat"] == 1


@pytest.mark.parametrize(
    ("precision", "compute"), [("fp16", None), ("bf16", None), ("w8a8", "fp16"), ("w8a8", None), ("fp8", "fp16")]
)
def test_engines_of_less_compute_it_nearly(lower, captured, precision, compute):
    scales = dict.fromkeys(("first", "second", "take"), (Grid((0.03,)), None)) if precision in {"w8a8", "fp8"} else None
    folder, _ = lower(precision, activations=scales, **({"compute": compute} if compute else {}))
    with opened(folder) as runtime:
        inputs = example()
        assert close(runtime.run(inputs), eager(captured[0], inputs), 0.1)
        wanted = {"fp16": "float16", "bf16": "bfloat16", "w8a8": "int8", "fp8": "float8"}[precision]
        assert runtime.configuration["precision"] == {wanted: 3}


@pytest.mark.parametrize("graphs", [False, True])
def test_results_are_the_callers_and_inputs_are_not_written(lower, captured, graphs):
    folder, _ = lower("fp32")
    with opened(folder, graphs=graphs) as runtime:
        first = example(0)
        before = {name: tensor.clone() for name, tensor in first.items()}
        kept = runtime.run(first)
        copies = {name: tensor.clone() for name, tensor in kept.items()}
        for seed in (1, 2):
            runtime.run(example(seed))
        assert all(torch.equal(kept[name], copies[name]) for name in kept)
        assert all(torch.equal(first[name], before[name]) for name in first)


def test_inputs_are_taken_where_they_lie(lower, simulation):
    folder, _ = lower("fp32")
    with opened(folder) as runtime:
        inputs = example()
        runtime.run(inputs)
    addresses = {each["name"]: each["memory"] for each in simulation.named("set_tensor_address")}
    assert {name: tensor.data_ptr() for name, tensor in inputs.items()}.items() <= addresses.items()


def test_what_is_the_same_in_the_next_step_crosses_once(lower, captured, monkeypatch):
    crossed, whole = [], Crossing.to_device

    def counted(self, name, tensor, make):
        return whole(self, name, tensor, lambda each: crossed.append(name) or make(each))

    monkeypatch.setattr(Crossing, "to_device", counted)
    folder, _ = lower("fp32")
    with opened(folder) as runtime:
        runtime.between_runs(same=True)
        inputs = example()
        for seed in (1, 2):
            inputs["picture"] = example(seed)["picture"]
            assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert sorted(crossed) == ["picture", "picture", "rows", "time"]
        inputs["rows"].add_(1)
        assert close(runtime.run(inputs), eager(captured[0], inputs))
        runtime.between_runs(same=False)
        runtime.run(inputs)
        assert sorted(crossed[4:]) == ["picture", "rows", "rows", "time"]


def test_a_run_waits_for_the_caller_before_it_is_launched_and_the_caller_for_it(lower, simulation, monkeypatch):
    order = []

    def working(*_):
        order.append("wait")
        return contextlib.nullcontext()

    def hand_over(tensor):
        order.append("hand over")
        return tensor

    monkeypatch.setattr(simulation.device, "working", working)
    monkeypatch.setattr(simulation.device, "hand_over", hand_over)
    simulation.check_memory = lambda _: order.append("launch")
    folder, _ = lower("fp32")
    with opened(folder) as runtime:
        inputs = example()
        with monkeypatch.context() as patch:
            patch.setattr(tensorrt_runtime, "home_of", lambda _: torch.device("cuda"))
            runtime._run(inputs, {"hidden": (2, 5, 64), "taken": (2, 64, 8, 12)})
        assert order == [*3 * ["wait"], "launch", *2 * ["hand over"]]
        order.clear()
        runtime.run(inputs)
        assert order == [*3 * ["wait"], "launch", "wait"]  # the last one around the way back to the host


def test_the_profile_is_chosen_by_shape(lower):
    folder, _ = lower(
        "fp32",
        profiles="batch:1:1:4/height:8:8:16/width:8:8:16/sequence:1:4:12|batch:1:2:4/height:8:16:16/width:8:16:16/sequence:1:4:12",
    )
    with opened(folder) as runtime:
        runtime.run(example(0, (1, 8, 8, 4)))
        runtime.run(example(1, (2, 16, 16, 4)))
        runtime.run(example(2, (2, 16, 16, 4)))
        assert runtime.configuration["runs"]["by_profile"] == {0: 1, 1: 2}


def test_outside_all_profiles_is_an_error_with_the_nearest(lower):
    folder, _ = lower("fp32", profiles="batch:1/height:8/width:8/sequence:4|batch:1:2:4/height:16/width:16/sequence:4")
    with (
        opened(folder) as runtime,
        pytest.raises(InputError, match=r"outside all 3 profiles.*the nearest, 1, takes") as e,
    ):
        runtime.run(example(0, (4, 24, 16, 4)))
    assert "profiles=" in e.value.fix


def test_more_rows_than_a_profile_takes_run_in_pieces(lower, captured):
    folder, _ = lower("fp32")
    inputs = example(0, (8, 8, 12, 5))
    with opened(folder) as runtime:
        assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert runtime.configuration["runs"]["by_profile"] == {0: 2}, "of six rows at most: four and four"


def test_a_profile_that_a_context_cannot_be_put_in_is_an_error(lower, simulation):
    folder, _ = lower("fp32", profiles="batch:1/height:8/width:8/sequence:4|batch:2/height:16/width:16/sequence:4")
    simulation.profiles_fail = True
    with pytest.raises(ArtifactError, match="little: TensorRT can't use profile 1"):
        opened(folder)


def test_profiles_are_ranked_by_how_far_shapes_are():
    small = Profile(0, {"x": ((1, 8), (1, 8), (2, 16))})
    large = Profile(1, {"x": ((1, 8), (2, 64), (4, 64))})
    assert choose("part", [small, large], {"x": (1, 16)}) is small
    assert choose("part", [small, large], {"x": (2, 48)}) is large
    with pytest.raises(InputError, match="the nearest, 1"):
        choose("part", [small, large], {"x": (2, 100)})


def test_graphs_are_recorded_once_a_shape_and_replayed(lower, captured):
    folder, _ = lower("fp32")
    with opened(folder, graphs=True) as runtime:
        for seed, sizes in enumerate([(2, 8, 8, 5), (1, 8, 8, 5), (2, 8, 8, 5), (1, 8, 8, 5), (2, 8, 8, 5)]):
            inputs = example(seed, sizes)
            assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert runtime.configuration["runs"]["graph_captures"] == 2
        assert runtime.configuration["runs"]["graph_replays"] == 3


def test_few_graphs_are_kept_each_with_a_context_of_its_own(lower, captured, simulation):
    folder, _ = lower("fp32")
    with opened(folder, graphs=True) as runtime:
        for length in (5, 1, 2, 3, 4, 3, 4, 5):  # the fifth takes the first one's place
            inputs = example(length, (2, 8, 8, length))
            assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert runtime.configuration["runs"]["graph_captures"] == 6
        assert runtime.configuration["runs"]["graph_replays"] == 2
        gc.collect()
        assert len(runtime._engine._body.contexts) == 1 + 4


def test_graphs_are_recorded_anew_when_an_address_changed(lower, captured, simulation):
    folder, _ = lower("fp32")
    with opened(folder, graphs=True) as runtime:
        runtime.run(example(0))
        simulation.device.block(1 << 20)  # another part's runs want more: it grows, and moves
        for seed in (1, 2):
            inputs = example(seed)
            assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert runtime.configuration["runs"]["graph_captures"] == 2


def test_parts_share_one_block_of_device_memory(lower, simulation):
    one, _ = lower("fp32", name="one")
    two, _ = lower("fp32", name="two")
    with opened(one) as first, opened(two) as second:
        first.run(example())
        second.run(example())
        first.run(example())
        assert len({(each["memory"], each["size"]) for each in simulation.named("set_device_memory")}) == 1
        assert simulation.device._block.numel() == 4096 + 4 * (2 * 5 * 64 + 2 * 8 * 8 * 12)  # what these shapes take
        strategies = {each["strategy"] for each in simulation.named("create_execution_context")}
        assert strategies == {simulation.module.ExecutionContextAllocationStrategy.USER_MANAGED}
    assert simulation.device._block is None


BEST = 4096 + 4 * (2 * 5 * 64 + 2 * 8 * 8 * 8)
"""What the stand-in takes for a run of the first profile's best shapes."""


SCRATCH = 128
"""And beside it while weights are streamed."""


@pytest.mark.parametrize(
    ("free", "kept"), [(10_000_000_000, 5_000), ((512 << 20) + BEST + SCRATCH + 1_000, 1_000), (1_000, 0)]
)
def test_as_many_weights_stay_on_the_device_as_fit(lower, simulation, free, kept):
    simulation.streamable, simulation.device.free = 5_000, free
    folder, _ = lower("fp32", weight_streaming=True)
    with opened(folder) as runtime:
        memory = runtime.configuration["memory"]
        runtime.run(example())
    assert memory["streaming_budget_bytes"] == kept
    assert memory["streamable_bytes"] == 5_000
    order = [
        name for _, name, _ in simulation.calls if name in {"weight_streaming_budget_v2", "create_execution_context"}
    ]
    assert order[0] == "weight_streaming_budget_v2"


def test_weights_leave_room_for_what_runs_take(lower, captured, simulation):
    simulation.streamable = 100_000
    folder, _ = lower("fp32", weight_streaming=True)
    with opened(folder) as runtime:
        assert runtime.configuration["memory"]["streaming_budget_bytes"] == 100_000
        engine, free = runtime._engine._body, (512 << 20) + 100_000  # room for its weights, and nothing else
        simulation.device.free_bytes = lambda: free - engine.budget
        inputs = example(0, (4, 16, 16, 12))
        assert close(runtime.run(inputs), eager(captured[0], inputs))
        memory = runtime.configuration["memory"]
        assert memory["activations_bytes"] == 4096 + 4 * (4 * 12 * 64 + 4 * 8 * 16 * 16) + SCRATCH
        assert memory["streaming_budget_bytes"] == 100_000 - memory["activations_bytes"]
        assert close(runtime.run(inputs), eager(captured[0], inputs))


def test_the_budget_is_what_was_read_back_and_leaves_what_others_want(lower, simulation):
    simulation.streamable, simulation.budget_step = 5_000, 1_000
    simulation.device.expect("another part", 1 << 20)
    simulation.device.free = (512 << 20) + (1 << 20) + 2_500
    folder, _ = lower("fp32", weight_streaming=True)
    with opened(folder) as runtime:
        assert runtime.configuration["memory"]["streaming_budget_bytes"] == 2_000


def test_too_little_device_memory_is_an_error_with_a_way_out(lower, captured, simulation):
    folder, _ = lower("fp32")
    with opened(folder) as runtime:
        simulation.device.total = 10_000
        with pytest.raises(ResourceError, match=r"little has too little device memory for rows 4×12×64") as raised:
            runtime.run(example(0, (4, 16, 16, 12)))
        assert "a smaller picture" in raised.value.fix
        assert "+weight_streaming" in raised.value.fix
        simulation.device.total = simulation.device.free
        inputs = example()
        assert close(runtime.run(inputs), eager(captured[0], inputs))


def test_a_part_that_fails_to_open_leaves_nothing(lower, simulation):
    folder, _ = lower("fp16")
    products = json.loads((folder / ABOUT).read_text())["products"]
    simulation.other_precision = dict.fromkeys(products, "Float")
    with pytest.raises(ArtifactError):
        opened(folder)
    assert simulation.device.lacking == 0


def test_no_room_for_an_engine_is_told_from_an_engine_that_is_none(lower, monkeypatch):
    folder, _ = lower("fp32")

    def full(self, serialized_engine):
        self.logger.log(self.module.ILogger.Severity.ERROR, "Error Code 2: OutOfMemory: Requested size was 9 bytes")
        self.logger.log(self.module.ILogger.Severity.ERROR, "CUDA: out of memory")

    monkeypatch.setattr(STANDIN.Runtime, "deserialize_cuda_engine", full)
    with pytest.raises(ResourceError, match="out of memory") as raised:
        opened(folder)
    assert "--offload parts" in raised.value.fix


def test_a_process_has_one_logger_and_each_part_hears_its_own(lower, simulation):
    one, _ = lower("fp32", name="one")
    two, _ = lower("fp32", name="two")
    with opened(one) as first, opened(two) as second:
        assert first._logger is second._logger
        first.run(example())
        first._logger.log(simulation.module.ILogger.Severity.WARNING, "of the first")
        second.run(example())
        second._logger.log(simulation.module.ILogger.Severity.WARNING, "of the second")
        assert (first._log, second._log) == (["WARNING: of the first"], ["WARNING: of the second"])


def test_a_closed_part_lets_its_engine_go(lower, simulation):
    folder, _ = lower("fp32", refit=True)
    runtime = opened(folder, graphs=True)
    runtime.run(example())
    engine = weakref.ref(runtime._engine._body)
    runtime.close()
    gc.collect()
    assert engine() is None


def test_launches_are_not_recorded_where_weights_are_streamed(lower, simulation, captured):
    simulation.streamable, simulation.device.free = 5_000, 1_000
    folder, _ = lower("fp32", weight_streaming=True)
    with opened(folder, graphs=True) as runtime:
        inputs = example()
        assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert not runtime.configuration["cuda_graphs"]
        assert "no cuda_graphs" in runtime.configuration["fallback"]
        assert runtime.configuration["runs"]["graph_captures"] == 0


def test_device_memory_is_reported(lower):
    folder, _ = lower("fp32")
    with opened(folder) as runtime:
        memory = runtime.configuration["memory"]
    assert memory["plan_bytes"] == (folder / PLAN).stat().st_size
    assert memory["weights_bytes"] > 4 * (64 * 96 * 2)
    assert memory["activations_bytes"] == BEST
    assert memory["most_activations_bytes"] == 4096 + 4 * (6 * 12 * 64 + 6 * 8 * 16 * 16)
    assert memory["scratch_bytes"] == memory["streamable_bytes"] == 0


# What really runs


def test_a_layer_in_another_precision_is_reported(lower, simulation):
    folder, _ = lower("fp16")
    simulation.other_precision = {"node_conv2d": "Float"}
    with opened(folder) as runtime:
        assert runtime.configuration["other_precision"] == {"node_conv2d": "float32, asked for float16"}
        assert runtime.configuration["precision"] == {"float16": 2, "float32": 1}


def test_a_whole_part_in_another_precision_is_an_error(lower, simulation):
    folder, _ = lower("fp16")
    products = json.loads((folder / ABOUT).read_text())["products"]
    simulation.other_precision = dict.fromkeys(products, "Float")
    with pytest.raises(ArtifactError, match="was to compute in float16, but its engine has its products 3 in float32"):
        opened(folder)


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        ({"DataType": "Half", "Format": "Row major linear"}, "float16"),
        ({"Datatype": "FP8", "Format": "kLINEAR"}, "float8"),
        ({"Datatype": "FP8E4M3"}, "float8"),
        ({"Datatype": "Int4"}, "int4"),
        ({"DataType": "BFloat16"}, "bfloat16"),
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
        ({"Format/Datatype": "Row major linear FP32 format"}, "float32"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, "?"),
    ],
)
def test_dtypes_as_the_inspector_spells_them(tensor, dtype):
    assert dtype_of(tensor) == dtype


def test_nodes_whose_names_begin_alike_are_told_apart():
    layers = [
        {"Name": "node_linear_1", "LayerType": "gemm", "Inputs": [{"DataType": "Half"}]},
        {"Name": "node_linear", "LayerType": "gemm", "Inputs": [{"DataType": "Float"}]},
    ]
    found = inspect(
        [json.dumps({"Layers": layers})], {"node_linear": "float16", "node_linear_1": "float16", "gone": "float16"}
    )
    assert found.other == {"node_linear": "float32, asked for float16"}
    assert found.unseen == ["gone"]


def layer(*inputs, name="node_linear", kind="gemm", metadata=""):
    taken = [{"DataType": dtype, "Dimensions": sizes} for dtype, sizes in inputs]
    return {"Name": name, "LayerType": kind, "Inputs": taken, "Metadata": metadata}


ROWS, WEIGHT, STEPS = [2, 77, 64], [96, 64], [96]


@pytest.mark.parametrize(
    ("read", "ran"),
    [
        ([layer(("Int8", ROWS), ("Int8", WEIGHT), ("Half", STEPS))], "int8"),
        ([layer(("Int8", ROWS), ("Half", STEPS), ("Half", []))], "int8"),
        ([layer(("Int8", ROWS), ("Int8", WEIGHT), ("Half", ROWS))], "int8"),
        ([layer(("Half", ROWS), ("Half", WEIGHT))], "float16"),
        ([layer(("Half", ROWS), ("Int8", WEIGHT), ("Half", STEPS))], "undecided"),
        ([layer(("Int8", ROWS), ("Half", ROWS))], "undecided"),
        ([layer(("Half", ROWS), ("Int8", WEIGHT), metadata="node_linear.rounded node_linear")], "int8"),
        ([layer(("Half", ROWS), ("Int8", WEIGHT), ("Int8", WEIGHT), metadata="node_linear node_other")], "undecided"),
        ([layer(("Int8", ROWS), ("Int8", WEIGHT)), layer(("Float", ROWS), name="node_linear [profile 1]")], "float32"),
        ([layer(("Float", ROWS), kind="kgen")], "float32"),
        ([layer(("Int32", ROWS))], "unseen"),
    ],
)
def test_a_product_is_of_codes_where_both_of_its_factors_are(read, ran):
    found = inspect([json.dumps({"Layers": read})], {"node_linear": "int8", "node_other": "int8"})
    told = {"undecided": found.undecided, "unseen": found.unseen}
    if ran in told:
        assert "node_linear" in told[ran]
    else:
        assert found.other.get("node_linear", "int8, as").startswith(ran)
        assert "node_linear" not in (*found.undecided, *found.unseen)


def test_each_profile_is_judged_by_its_own_layers():
    ours, bias = layer(("Int8", ROWS), ("Int8", WEIGHT)), layer(("Float", ROWS), kind="kgen")
    products = {"node_linear": "int8"}

    def of(*profiles):
        return inspect([json.dumps({"Layers": each}) for each in profiles], products)

    assert of([ours, bias]).precision == {"int8": 1}, "what adds a bias multiplies nothing"
    assert of([ours], [bias]).other == {"node_linear": "float32, asked for int8"}, "nothing else multiplies there"
    assert of([ours], [layer(("Half", ROWS), name="another")]).unseen == ["node_linear"]


def test_codes_that_are_widened_before_they_are_multiplied_are_said(lower, simulation):
    """Activations in half precision by weights that are codes still: no part that was to be int8."""
    scales = dict.fromkeys(("first", "second", "take"), (Grid((0.03,)), None))
    folder, _ = lower("w8a8", activations=scales, compute="fp16")
    products = json.loads((folder / ABOUT).read_text())["products"]
    simulation.other_precision = dict.fromkeys(products, "Half")
    with opened(folder) as runtime:
        assert "doesn't tell what 3 of 3 products run in" in runtime.configuration["fallback"]
        assert runtime.configuration["fusion"]["undecided_products"] == 3


def test_large_engines_are_looked_at_at_once():
    names = [f"node_linear_{number}" for number in range(3_000)]
    layers = [
        {
            "Name": f"{name}_myl",
            "LayerType": "gemm",
            "Inputs": [{"DataType": "Half"}],
            "Metadata": f"[ONNX Layer: {name}]",
        }
        for name in (*names, *(f"other_{name}" for name in names))
    ]
    started = time.process_time()
    found = inspect([json.dumps({"Layers": layers})], dict.fromkeys(names, "float16"))
    assert found.precision == {"float16": 3_000}
    assert time.process_time() - started < 5  # looking for each name in each layer takes half a minute


# LoRAs


def test_loras_go_on_and_off_bit_for_bit(lower, captured, simulation):
    folder, _ = lower("fp32", refit=True)
    inputs, a, b = example(), {"first.weight": [delta(1)]}, {"first.weight": [delta(2)], "take.weight": [taken(3)]}
    with opened(folder) as runtime:
        plain = runtime.run(inputs)
        assert runtime.adapt(a)
        with_a = runtime.run(inputs)
        assert close(with_a, eager(captured[0], inputs, a))
        assert len(simulation.named("set_named_weights")) == 1  # changed weights only
        assert runtime.adapt(b)
        assert close(runtime.run(inputs), eager(captured[0], inputs, b))
        assert runtime.adapt(a)
        assert runtime.configuration["refit"] == {"changed": 1, "restored": 1, "unchanged": 0}
        again = runtime.run(inputs)
        assert all(torch.equal(again[name], with_a[name]) for name in again)
        assert runtime.adapt({})
        back = runtime.run(inputs)
        assert all(torch.equal(back[name], plain[name]) for name in back)
    assert not torch.equal(with_a["hidden"], plain["hidden"])


def taken(seed):
    generator = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(64, 2, 1, 1, generator=generator), torch.randn(2, 8, 3, 3, generator=generator), 0.1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_loras_go_on_and_off_in_two_bytes(lower, captured, precision):
    folder, _ = lower(precision, refit=True)
    inputs, a, b = example(), {"first.weight": [delta(1)]}, {"first.weight": [delta(2)], "take.weight": [taken(3)]}
    with opened(folder) as runtime:
        plain = runtime.run(inputs)
        for deltas in (a, b, a):
            assert runtime.adapt(deltas)
            assert close(runtime.run(inputs), eager(captured[0], inputs, deltas), 0.1)
        assert runtime.adapt({})
        back = runtime.run(inputs)
        assert all(torch.equal(back[name], plain[name]) for name in back)


def test_a_lora_changes_all_copies_of_a_weight(tmp_path, monkeypatch):
    """Two initializers of one tensor of the checkpoint."""
    from bakeoff.runtimes import tensorrt_refit

    files = SimpleNamespace(
        weights={"one": ("w", False), "two": ("w", True), "three": ("v", False)}, folder=tmp_path, refits=True
    )
    refit = tensorrt_refit.Refit(None, None, None, files)
    stored = SimpleNamespace(read=lambda name: torch.zeros(2, 3) if name == "one" else torch.zeros(3, 2))
    monkeypatch.setattr(tensorrt_refit, "_Stored", lambda _: stored)
    given = {}
    monkeypatch.setattr(refit, "_apply", lambda values, _: given.update(values) or 0)
    refit.change({"w": [Delta(torch.ones(2, 1), torch.ones(1, 3), 1.0)]})
    assert {name: tuple(value.shape) for name, value in given.items()} == {"one": (2, 3), "two": (3, 2)}
    assert all(bool((value == 1).all()) for value in given.values())


def test_a_refitted_engine_is_the_one_that_opens_with_the_lora(lower):
    folder, _ = lower("fp32", refit=True)
    inputs, a = example(), {"first.weight": [delta(1)]}
    with opened(folder, deltas=a) as fresh, opened(folder) as refitted:
        refitted.adapt(a)
        one, two = fresh.run(inputs), refitted.run(inputs)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_recorded_graphs_see_new_weights(lower, captured):
    folder, _ = lower("fp32", refit=True)
    inputs, a = example(), {"first.weight": [delta(1)]}
    with opened(folder, graphs=True) as runtime:
        runtime.run(inputs)
        runtime.run(inputs)
        runtime.adapt(a)
        for _ in range(2):
            assert close(runtime.run(inputs), eager(captured[0], inputs, a))


def test_weights_that_tensorrt_combined_go_along(lower, captured, simulation):
    folder, _ = lower("fp32", refit=True)
    weights = {tensor: name for name, (tensor, _) in json.loads((folder / ABOUT).read_text())["weights"].items()}
    simulation.extra_missing = [weights["second.weight"], weights["take.weight"]]
    inputs, a = example(), {"first.weight": [delta(1)]}
    with opened(folder) as runtime:
        runtime.adapt(a)
        assert runtime.configuration["refit"]["unchanged"] == 2, "the second one makes it want the third"
        assert close(runtime.run(inputs), eager(captured[0], inputs, a))


def test_layers_of_another_float_than_the_part_computes_in_are_refused(captured, simulation, tmp_path):
    """They would be computed in what the others are."""
    subject = subject_of(captured[0], "w8a8", {"compute": "fp16"}, tmp_path)
    subject = replace(subject, mixture=plugins.mixture("w8a8", {"first": "bf16"}))
    with pytest.raises(RecipeError, match="layers are to be in bf16, where tensorrt:w8a8 computes in fp16"):
        TensorRTExporter().lower(subject, tmp_path)


def test_an_engine_that_names_no_product_says_so(lower, monkeypatch):
    folder, _ = lower("fp16")
    with opened(folder) as runtime:
        assert runtime.configuration["fallback"] is None
    monkeypatch.setattr(tensorrt_runtime, "inspect", lambda *_: Inspection(unseen=["a", "b", "c"]))
    with opened(folder) as runtime:
        assert "doesn't tell what 3 of 3 products run in" in runtime.configuration["fallback"]


def test_a_stripped_plan_that_takes_no_weights_is_refused(lower, monkeypatch):
    """It would run with none."""
    folder, _ = lower("fp32", strip=True)
    monkeypatch.setattr(STANDIN.Engine, "refittable", False)
    with pytest.raises(ArtifactError, match="has no weights, and TensorRT says that it takes none"):
        opened(folder)


def test_a_stripped_plan_gets_its_weights_when_it_opens(lower, captured):
    folder, _ = lower("fp32", strip=True)
    inputs = example()
    with opened(folder) as runtime:
        assert close(runtime.run(inputs), eager(captured[0], inputs))
        assert not runtime.adapt({"first.weight": [delta(1)]})
    with pytest.raises(ArtifactError, match="identical weights alone"):
        opened(folder, deltas={"first.weight": [delta(1)]})


def test_loras_go_on_a_plan_that_got_its_weights_when_it_opened(lower, captured):
    folder, _ = lower("fp32", strip=True, refit=True)
    inputs, a, b = example(), {"first.weight": [delta(1)]}, {"take.weight": [taken(2)]}
    with opened(folder) as runtime:
        for deltas in (a, b, {}):
            assert runtime.adapt(deltas)
            assert close(runtime.run(inputs), eager(captured[0], inputs, deltas))


def test_an_engine_whose_exchange_failed_is_closed(lower, captured, simulation):
    folder, _ = lower("fp32", refit=True)
    inputs, both = example(), {"first.weight": [delta(1)], "take.weight": [taken(2)]}
    with opened(folder) as runtime:
        simulation.refit_fails_after = 1
        assert not runtime.adapt(both)  # so it is opened anew
        with pytest.raises(AssertionError, match="closed"):
            runtime.run(inputs)
    with pytest.raises(ArtifactError, match="refused to exchange weights"):
        opened(folder, deltas=both)
    simulation.refit_fails_after = None
    with opened(folder, deltas=both) as runtime:
        assert close(runtime.run(inputs), eager(captured[0], inputs, both))


def test_weights_that_a_failed_exchange_may_have_changed_go_back(lower, captured, simulation):
    from bakeoff.runtimes.tensorrt_refit import Refit

    folder, _ = lower("fp32", refit=True)
    with opened(folder) as runtime:
        inputs = example()
        refit = runtime._refit
        assert isinstance(refit, Refit)
        simulation.refit_fails_after = 1
        with pytest.raises(ArtifactError):
            refit.change({"first.weight": [delta(1)], "take.weight": [taken(2)]})
        simulation.refit_fails_after = None
        refit.change({})
        assert close(runtime.run(inputs), eager(captured[0], inputs))


def test_engines_that_take_no_loras_say_so(lower):
    folder, _ = lower("fp32")
    with pytest.raises(InputError, match="LoRAs can't be added") as raised:
        TensorRTRuntime.shapes(folder)
    assert "+refit" in raised.value.fix
    with pytest.raises(ArtifactError, match="can't be refitted"):
        opened(folder, deltas={"first.weight": [delta(1)]})


def test_lora_shapes_are_the_checkpoints(lower):
    folder, _ = lower("fp32", refit=True)
    shapes = TensorRTRuntime.shapes(folder)
    assert shapes["first.weight"] == (96, 64)
    assert shapes["take.weight"] == (64, 8, 3, 3)


# Trust


def test_a_plan_without_a_manifest_is_not_opened(lower, simulation):
    folder, _ = lower("fp32")
    with pytest.raises(ArtifactError, match="no manifest"):
        opened(folder, hashes={})
    assert not simulation.named("deserialize_cuda_engine")


@pytest.mark.parametrize("name", [PLAN, ABOUT])
def test_a_changed_file_is_not_opened(lower, simulation, name):
    folder, _ = lower("fp32")
    hashes = vouched(folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptError, match="is not what was written"):
        opened(folder, hashes=hashes)
    assert not simulation.named("deserialize_cuda_engine")


@pytest.mark.parametrize(
    ("options", "changed", "opens"),
    [
        ({}, {"name": "NVIDIA A100"}, False),
        ({}, {"capability": "8.0"}, False),
        ({}, {"driver": "581.0"}, True),
        ({"hardware": "same_compute_capability"}, {"name": "NVIDIA H200"}, True),
        ({"hardware": "same_compute_capability"}, {"capability": "8.0"}, False),
        ({"hardware": "ampere_plus"}, {"name": "NVIDIA A100", "capability": "8.0"}, True),
    ],
)
def test_a_plan_is_opened_on_the_hardware_that_it_is_for(lower, monkeypatch, options, changed, opens):
    folder, _ = lower("fp32", **options)
    monkeypatch.setattr(nvinfer, "device", lambda: replace(GPU, **changed))
    if opens:
        opened(folder).close()
    else:
        with pytest.raises(ArtifactError, match="was built for another machine"):
            opened(folder)


def test_another_tensorrt_opens_what_was_built_for_it_alone(lower, simulation):
    folder, _ = lower("fp32", name="one")
    compatible, _ = lower("fp32", name="two", version_compatible=True)
    simulation.module.__version__ = "11.5.0.1"
    with pytest.raises(ArtifactError, match=r"tensorrt 11\.4\.0\.106, here 11\.5\.0\.1"):
        opened(folder)
    opened(compatible).close()


# Settings, keys, the way here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch:4:2:1", "sizes that rise"),
        ("batch:0", "sizes that rise"),
        ("hight:8", "Did you mean 'height'"),
        ("batch=two", "expected a dimension"),
    ],
)
def test_profiles_that_mean_nothing(text, message):
    with pytest.raises(RecipeError, match=message):
        Settings.read("fp16", {"profiles": text})


def test_settings_have_all_defaults_written_out():
    settings = Settings.read("w8a8", {}).as_dict()
    assert settings["compute"] == "bf16"
    assert settings["profiles"] == [{name: list(sizes) for name, sizes in sorted(DEFAULTS.items())}]
    assert json.loads(json.dumps(settings)) == settings
    with pytest.raises(RecipeError, match="compute=bf16 in tensorrt:fp16"):
        Settings.read("fp16", {"compute": "bf16"})
    with pytest.raises(RecipeError, match="workspace_mib"):
        Settings.read("fp16", {"workspace_mib": "lots"})


def test_a_recipe_carries_all_options():
    text = "tensorrt:fp8+compute=fp16+level=5+profiles=batch:1:2:4/height:8:64:96|batch:8+refit+workspace_mib=100"
    recipe, _ = parse(text)
    settings = Settings.read(recipe.default.precision, recipe.default.options)
    assert len(settings.profiles) == 2
    assert settings.profiles[1]["batch"] == (8, 8, 8)
    assert (settings.level, settings.refit, settings.workspace_bytes) == (5, True, 100 << 20)
    assert parse(str(recipe))[0] == recipe


def test_the_key_says_what_the_plan_depends_on(simulation):
    fields = TensorRTExporter().key_fields("fp16", {"level": "2"})
    assert fields["settings"]["level"] == 2
    assert fields["bound"] == {
        "tensorrt": "11.4.0.106",
        "onnx_parser": "110400",
        "gpu": GPU.name,
        "compute_capability": "9.0",
        "driver": "580.65.06",
        "cuda": "13.0",
    }
    assert set(fields["lowered_with"]) == {"torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript"}


def test_the_files_say_what_was_built(lower):
    folder, _ = lower("fp16")
    about = json.loads((folder / ABOUT).read_text())
    assert len(about["onnx"]) == 64
    assert about["bound"]["gpu"] == GPU.name
    assert set(about["products"].values()) == {"float16"}


def test_old_gpus_are_told_which_precision_they_lack(simulation, monkeypatch):
    monkeypatch.setattr(nvinfer, "device", lambda: replace(GPU, capability="8.6"))
    TensorRTExporter().check("w8a8", {})
    with pytest.raises(UnavailableError, match=r"compute capability 8\.6; fp8 takes 8\.9"):
        TensorRTExporter().check("fp8", {})
    monkeypatch.setattr(nvinfer, "device", lambda: replace(GPU, capability="7.5"))
    TensorRTExporter().check("w8a8", {"compute": "fp16"})
    with pytest.raises(UnavailableError, match=r"compute capability 7\.5; bf16 takes 8\.0"):
        TensorRTExporter().check("w8a8", {})


def test_without_a_gpu_an_export_is_refused_before_any_work(run_cli, tmp_path):
    if cuda.first()[0] is not None:
        pytest.skip("there is a CUDA device here")
    finished = run_cli("export", "shapes", "-o", tmp_path / "out", "--recipe", "tensorrt:fp16")
    assert finished.returncode == UnavailableError.exit_code
    assert "tensorrt-cu13" in finished.stderr
    assert "NVIDIA driver" in finished.stderr
    assert "hint:" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_doctor_says_what_is_missing_and_how_to_get_it(run_json):
    if cuda.first()[0] is not None:
        pytest.skip("there is a CUDA device here")
    found = run_json("doctor")["backends"]["tensorrt"]
    assert not found["ok"]
    assert "tensorrt-cu13 is not installed" in found["reason"]
    assert "pip install 'bakeoff[tensorrt]'" in found["fix"]


def test_no_tensorrt_is_touched_where_no_device_was_found():
    code = (
        "import sys; from bakeoff import nvinfer, plugins; from bakeoff.errors import UnavailableError\n"
        "sys.modules['tensorrt'] = None\n"
        "for touch in (nvinfer.library, nvinfer.binding):\n"
        "    try: touch()\n"
        "    except UnavailableError as error: print(error.message)\n"
        "print(plugins.exporter('tensorrt').probe().ok, plugins.runtime('tensorrt').probe().ok)"
    )
    if cuda.first()[0] is not None:
        pytest.skip("there is a CUDA device here")
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.count("TensorRT can't be used") == 2
    assert found.stdout.endswith("False False\n")


def test_one_module_alone_imports_tensorrt():
    files = [*ROOT.glob("*.py"), *(ROOT / "exporters").glob("*.py"), *(ROOT / "runtimes").glob("*.py")]
    for file in files:
        tree = ast.parse(file.read_text())
        named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert "tensorrt" not in {str(name).partition(".")[0] for name in named}, file
        told = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("import_module")]
        assert not [n for n in told if "'tensorrt'" in ast.unparse(n)] or file.name == "nvinfer.py"


def test_a_device_that_ends_the_process_is_no_device(monkeypatch):
    monkeypatch.setattr(cuda, "in_child", lambda *_: ({"device": None, "reason": "cuInit gave 999"}, None))
    cuda.first.cache_clear()
    assert cuda.first() == (None, "cuInit gave 999")
    cuda.first.cache_clear()


def test_fp8_takes_the_largest_magnitude_that_calibration_saw(captured):
    from bakeoff.bake import _activations
    from bakeoff.quantize.calibration import Calibration
    from bakeoff.recipe import PartRecipe

    seen, values = Calibration(), torch.cat([torch.randn(1_000_000), torch.tensor([40.0])])
    seen.see("little", "first", values, values)
    part = SimpleNamespace(name="little", module="little")
    checkpoint = Checkpoint.open(captured[0])
    found = {}
    for precision in ("w8a8", "fp8"):
        parts = {"little": PartRecipe("tensorrt", precision)}
        source = SimpleNamespace(checkpoint=lambda _: checkpoint)
        planned = SimpleNamespace(parts=parts, calibration=seen, source=source)
        found[precision] = _activations(planned, part)["first"][0].even * 127
    assert found["fp8"] == pytest.approx(40.0, rel=1e-3)
    assert found["w8a8"] < 20


# The list of names


def test_the_list_has_nothing_that_tensorrt_11_removed():
    listed = STANDIN.API
    assert not {"FP16", "INT8", "BF16", "FP8", "OBEY_PRECISION_CONSTRAINTS"} & set(listed["enums"]["BuilderFlag"])
    assert "EXPLICIT_BATCH" not in listed["enums"]["NetworkDefinitionCreationFlag"]
    gone = {"get_binding_shape", "execute_async_v2", "device_memory_size", "set_binding_shape", "max_workspace_size"}
    for known in listed["classes"].values():
        assert not gone & {*known["methods"], *known["attributes"]}
    assert "Apache-2.0" in listed["licence"]


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.BuilderFlag.FP16,
        lambda m: m.Builder(),
        lambda m: builder(m).create_network(1, 2),
        lambda m: builder(m).create_builder_config().set_timing_cache(None),
        lambda m: builder(m).create_builder_config().max_workspace_size,
        lambda m: setattr(builder(m).create_builder_config(), "max_workspace_size", 1),
        lambda m: setattr(builder(m), "num_DLA_cores", 1),
        lambda m: m.ICudaEngine(),
        lambda m: m.Runtime(logger=None, other=1),
    ],
)
def test_what_is_not_in_the_list_fails(use):
    with pytest.raises((AttributeError, TypeError)):
        use(STANDIN.make(STANDIN.Simulation()))


def builder(module):
    return module.Builder(nvinfer.logger(module, []))


STUBS = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
"""Library -> what the bindings want of it. They are here to look at the bindings' names; nothing of TensorRT's is made."""
COMPARE = """
import json, re, sys
import tensorrt_bindings.tensorrt as real
api, problems = json.load(open(sys.argv[1])), []
for name, members in api["enums"].items():
    owner = real
    for word in name.split("."):
        owner = getattr(owner, word)
    if list(owner.__members__) != members:
        problems.append(f"{name}: {list(owner.__members__)}")
def arguments(doc, method):
    found = []
    for line in doc.splitlines():
        match = re.match(rf"(?:\\d+\\. )?{method}\\((.*)\\) -> ", line.strip())
        if match and not match[1].startswith("*args"):
            plain, depth = "", 0
            for letter in match[1]:
                depth += (letter in "[(<") - (letter in "])>")
                plain += letter if depth == 0 else ""
            each = [piece.strip() for piece in plain.split(",")]
            names = [piece.partition(":")[0] + ("=" if " = " in piece else "") for piece in each if piece]
            found.append([n for n in names if n != "self"])
    return found
for name, listed in api["classes"].items():
    kind = getattr(real, name)
    for method, overloads in listed["methods"].items():
        got = arguments(getattr(kind, method).__doc__ or "", method)
        if got != overloads:
            problems.append(f"{name}.{method}: {got}, listed {overloads}")
    for attribute, access in listed["attributes"].items():
        found = vars(kind).get(attribute)
        if not isinstance(found, property) or ("rw" if found.fset else "ro") != access:
            problems.append(f"{name}.{attribute}")
for function in api["functions"]:
    if not hasattr(real, function):
        problems.append(function)
print(json.dumps(problems))
"""


@pytest.mark.interop
def test_the_list_is_the_bindings(tmp_path):
    """The wheel of the bindings (1 MB, no GPU library) is looked at in a process of its own, and dropped again."""
    package = f"{STANDIN.API['package']}=={STANDIN.API['version']}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), package]
    installed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if installed.returncode:
        pytest.skip(f"pip can't install {package}: {installed.stderr.strip()[-200:]}")
    for library, symbols in STUBS.items():
        source = "".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in symbols)
        built = subprocess.run(
            [shutil.which("cc") or "/usr/bin/cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / library)],
            input=source,
            capture_output=True,
            text=True,
            check=False,
        )
        if built.returncode:
            pytest.skip(f"no C compiler for the stub libraries: {built.stderr[:200]}")
    listed = ROOT / "tests" / "tensorrt" / "api.json"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "LD_LIBRARY_PATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", COMPARE, str(listed)], capture_output=True, text=True, check=False, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == []


# All of it together


@pytest.mark.slow
def test_an_artifact_with_a_tensorrt_part_draws_what_torch_draws(simulation, baked, tmp_path, monkeypatch):
    from bakeoff.bake import export
    from bakeoff.runtimes.engine import load

    monkeypatch.setattr(nvinfer, "PACKAGE", "onnxruntime")  # some package that is installed
    recipe, _ = parse("torch:fp32,vae_decoder=tensorrt:fp32+refit")
    artifact = export("shapes", tmp_path / "artifact", recipe, prove=False)
    assert artifact.manifest.hardware == {"vae_decoder": nvinfer.binding()}
    again = export("shapes", tmp_path / "artifact", recipe, prove=False)
    assert again.manifest.key == artifact.manifest.key
    assert Artifact.open(tmp_path / "artifact").verify() == []
    prompts, options = "a large red circle on a white background", {"steps": 3, "seeds": 0}
    with load(tmp_path / "artifact") as engine, load(baked("torch:fp32")) as reference:
        got, wanted = engine.generate(prompts, **options).images, reference.generate(prompts, **options).images
        assert engine.configuration["vae_decoder"]["device"] == "cuda"
    assert abs(got.astype(int) - wanted.astype(int)).max() <= 1
    (tmp_path / "artifact" / "vae_decoder" / PLAN).write_bytes(
        (tmp_path / "artifact" / "vae_decoder" / PLAN).read_bytes()[:-1] + b"x"
    )
    with load(tmp_path / "artifact") as engine, pytest.raises(CorruptError, match="not what was written"):
        engine.generate(prompts, **options)


def test_placements_device_is_the_gpu_whatever_was_asked():
    assert TensorRTRuntime.device_for(Placement(device="cpu")) == "cuda"
