"""ONNX Runtime's execution providers: options by name, device tensors, CUDA graphs, and what stands in their way.

No GPU is needed: a stand-in for `InferenceSession` refuses options that the provider doesn't have, as the real one
does, and then computes on the real CPU. `make test-interop` runs OpenVINO's provider for real.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from bakeoff import hardware
from bakeoff.components.component import Port
from bakeoff.errors import UnavailableError
from bakeoff.recipe import Placement
from bakeoff.runtimes import providers
from bakeoff.runtimes.onnx_binding import KEPT, DeviceBinding
from bakeoff.runtimes.onnxruntime import OnnxRuntime
from bakeoff.runtimes.runtime import PartFiles

onnxruntime = pytest.importorskip("onnxruntime")

KNOWN = {
    "CUDAExecutionProvider": {
        "device_id", "arena_extend_strategy", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "do_copy_in_default_stream",
        "enable_cuda_graph", "gpu_mem_limit", "prefer_nhwc", "tunable_op_enable", "tunable_op_tuning_enable", "use_tf32",
        "use_ep_level_unified_stream", "user_compute_stream", "has_user_compute_stream", "sdpa_kernel",
    },
    "TensorrtExecutionProvider": {
        "device_id", "trt_engine_cache_enable", "trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path",
        "trt_fp16_enable", "trt_cuda_graph_enable", "trt_builder_optimization_level", "trt_max_workspace_size",
    },
    "OpenVINOExecutionProvider": {"device_type", "precision", "num_of_threads", "load_config", "cache_dir"},
    "CoreMLExecutionProvider": {"ModelFormat", "MLComputeUnits", "AllowLowPrecisionAccumulationOnGPU"},
    "DmlExecutionProvider": {"device_id", "performance_preference", "disable_metacommands"},
    "MIGraphXExecutionProvider": {"device_id", "migraphx_fp16_enable"},
}  # fmt: skip
"""Names in ONNX Runtime's provider_options of each provider (`*_execution_provider_info.cc`, `*_provider_factory.cc`)."""
SESSION = onnxruntime.InferenceSession


class Recorder(SESSION):
    """Takes a provider's options as the real session does, and computes on the CPU."""

    made = ()

    def __init__(self, path, options, providers, **rest):
        for provider, given in [each for each in providers if not isinstance(each, str)]:
            unknown = set(given) - KNOWN[provider]
            if unknown:
                message = f"Unknown provider option: {unknown}"
                raise ValueError(message)
            assert all(isinstance(value, str) for value in given.values())
        self.given = [each if isinstance(each, str) else each[0] for each in providers]
        self.options = dict([each for each in providers if not isinstance(each, str)])
        self.graph_ids = []
        Recorder.made = (*Recorder.made, self)
        super().__init__(path, options, providers=["CPUExecutionProvider"], **rest)

    def get_providers(self):
        return self.given

    def get_provider_options(self):
        return self.options

    def run_with_iobinding(self, binding, run_options=None):
        if run_options is not None:
            self.graph_ids.append(run_options.get_run_config_entry("gpu_graph_id"))
        super().run_with_iobinding(binding)


@pytest.fixture
def model(tmp_path):
    """Return a folder with a small model: y = relu(conv(x))."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((16, 4, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", n, "h", "w"]) for name, n in (("x", 4), ("y", 16))
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "model.onnx"
    )
    return tmp_path


def files(folder, precision="fp32"):
    inputs = (Port("x", "float32", ("batch", 4, "height", "width")),)
    outputs = (Port("y", "float32", ("batch", 16, "height", "width")),)
    return PartFiles("unet", folder, precision, inputs, outputs, build=lambda dtype: None)


def picture(seed, rows=2):
    return {"x": torch.randn(rows, 4, 8, 12, generator=torch.Generator().manual_seed(seed))}


def has(monkeypatch, provider):
    """Let this ONNX Runtime have a provider, and the machine every device."""
    here = hardware.Availability(ok=True, reason="here")
    monkeypatch.setattr(hardware, "_DETECTORS", dict.fromkeys(hardware._DETECTORS, lambda: here))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorder)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    there = {name: torch.device("cpu") for name in providers.NVIDIA}
    monkeypatch.setattr(providers, "torch_device", there.get)
    monkeypatch.setattr(Recorder, "made", ())


@pytest.mark.parametrize(
    ("device", "provider", "expected"),
    [
        ("cuda", "CUDAExecutionProvider", {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}),
        ("rocm", "MIGraphXExecutionProvider", {}),
        ("directml", "DmlExecutionProvider", {"device_id": "0"}),
        ("mps", "CoreMLExecutionProvider", {"AllowLowPrecisionAccumulationOnGPU": "0"}),
        ("gpu", "OpenVINOExecutionProvider", {"device_type": "GPU", "precision": "FP32"}),
        ("npu", "OpenVINOExecutionProvider", {"device_type": "NPU", "precision": "FP32"}),
    ],
)
def test_a_placement_chooses_the_provider_and_its_options(model, monkeypatch, device, provider, expected):
    with OnnxRuntime(files(model), Placement("cpu")) as plain:
        right = plain.run(picture(0))["y"]
    has(monkeypatch, provider)
    with OnnxRuntime(files(model), Placement(device)) as runtime:
        assert runtime.configuration["providers"] == [provider, "CPUExecutionProvider"]
        assert runtime.configuration["device"] == device
        assert runtime.configuration["fallback"] is None
        assert expected.items() <= runtime.configuration["provider_options"].items()
        assert torch.equal(runtime.run(picture(0))["y"], right)
        assert OnnxRuntime.device_for(Placement(device)) == device


def test_where_nodes_run_is_told_or_said_not_to_be_known(model, monkeypatch):
    has(monkeypatch, "CUDAExecutionProvider")
    with OnnxRuntime(files(model), Placement("cuda")) as runtime:
        assert sum(runtime.configuration["nodes"].values()) > 0
    monkeypatch.setattr(Recorder, "get_provider_graph_assignment_info", list, raising=False)
    with OnnxRuntime(files(model), Placement("cuda")) as runtime:
        assert "doesn't tell which nodes run on the CPU" in runtime.configuration["fallback"]
    with OnnxRuntime(files(model), Placement("cpu")) as runtime:
        assert runtime.configuration["fallback"] is None


def test_half_precision_may_use_tf32_and_options_of_ones_own_come_last(model, monkeypatch):
    has(monkeypatch, "CUDAExecutionProvider")
    asked = Placement("cuda", provider_options="cudnn_conv_algo_search=HEURISTIC;gpu_mem_limit=1000000000")
    with OnnxRuntime(files(model, "bf16"), asked) as runtime:
        told = runtime.configuration["provider_options"]
    assert (told["use_tf32"], told["cudnn_conv_algo_search"], told["gpu_mem_limit"]) == ("1", "HEURISTIC", "1000000000")


def test_engines_are_kept_apart_by_weights_and_not_kept_of_loras(model, tmp_path, monkeypatch):
    """TensorRT's provider tells engines apart by the names in a graph alone."""
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path / "home"))
    other = shutil.copytree(model, tmp_path / "other")
    same = shutil.copytree(model, tmp_path / "same")
    weights = next(file for file in other.iterdir() if file.suffix in {".onnx", ".safetensors", ".data"})
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    name = "TensorrtExecutionProvider"
    folders = [providers.engine_cache(name, files(each)) for each in (model, other, same)]
    assert folders[0] == folders[2] != folders[1]
    assert providers.engine_cache("CUDAExecutionProvider", files(model)) is None
    adapted = replace(files(model), deltas={"w": ()})
    assert providers.engine_cache(name, adapted) is None
    kept = providers.options_of(name, "cuda", "fp32", Placement("cuda"), folders[0])
    assert kept["trt_engine_cache_path"] == str(folders[0])
    assert "trt_engine_cache_enable" not in providers.options_of(name, "cuda", "fp32", Placement("cuda"))


def test_a_provider_that_computes_in_float16_says_so():
    asked = providers.options_of("TensorrtExecutionProvider", "cuda", "fp16", Placement("cuda"))
    assert providers.computes_in_half("TensorrtExecutionProvider", asked)
    plain = providers.options_of("TensorrtExecutionProvider", "cuda", "fp32", Placement("cuda"))
    assert not providers.computes_in_half("TensorrtExecutionProvider", plain)
    assert providers.computes_in_half("OpenVINOExecutionProvider", {"precision": "FP16"})
    _, behind, _ = providers.listed("TensorrtExecutionProvider", plain, "fp32")
    assert behind == ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0"})


def test_an_option_that_the_provider_has_not_is_refused(model, monkeypatch):
    has(monkeypatch, "CUDAExecutionProvider")
    with pytest.raises(UnavailableError, match="Unknown provider option"):
        OnnxRuntime(files(model), Placement("cuda", provider_options="cudnn_algo=1"))


def test_cuda_graphs_are_recorded_once_a_shape_from_tensors_that_stay(model, monkeypatch):
    has(monkeypatch, "CUDAExecutionProvider")
    with OnnxRuntime(files(model), Placement("cpu", provider="CPUExecutionProvider")) as plain:
        right = {seed: plain.run(picture(seed))["y"] for seed in (0, 1)}
    with OnnxRuntime(files(model), Placement("cuda", cuda_graphs=True)) as runtime:
        assert runtime.configuration["cuda_graphs"]
        session = Recorder.made[-1]
        assert session.options["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"
        first = runtime.run(picture(0))["y"]
        kept = first.clone()
        assert torch.equal(runtime.run(picture(1))["y"], right[1])
        assert torch.equal(first, kept)
        assert torch.equal(kept, right[0])
        for rows in range(3, 4 + KEPT):
            runtime.run(picture(0, rows))
        runtime.run(picture(0))
    assert session.graph_ids[:3] == ["1", "1", "2"]
    assert session.graph_ids[-2:] == ["-1", "1"]  # no more graphs than are kept; those that are stay


def test_device_tensors_of_the_real_session(model):
    session = SESSION(model / "model.onnx", providers=["CPUExecutionProvider"])
    binding = DeviceBinding(session, torch.device("cpu"), {"y": "float32"})
    shape = {"y": (2, 16, 8, 12)}
    for seed in (0, 1, 0):
        given = picture(seed)
        expected = session.run(None, {"x": given["x"].numpy()})[0]
        assert np.array_equal(binding.run(given, shape)["y"].numpy(), expected)
    filled = []
    binding.same.active = True
    monkey = picture(3)
    binding.run(monkey, shape)
    slot = next(iter(binding._slots.values()))
    fill = slot.inputs["x"].copy_
    slot.inputs["x"].copy_ = lambda data, **_: (filled.append(1), fill(data))
    binding.run(monkey, shape)
    assert not filled  # the same tensor is there already
    monkey["x"].mul_(2)
    expected = session.run(None, {"x": monkey["x"].numpy()})[0]
    assert np.array_equal(binding.run(monkey, shape)["y"].numpy(), expected)
    assert filled == [1]
    for rows in range(3, 4 + KEPT):
        binding.run(picture(0, rows), {"y": (rows, 16, 8, 12)})
    assert len(binding._slots) == KEPT
    recorded = DeviceBinding(session, torch.device("cpu"), {"y": "float32"}, graphs=True)
    for rows in range(1, 4 * KEPT):
        recorded._slot(picture(0, rows), {"y": (rows, 16, 8, 12)})
    assert len(recorded._slots) == 2 * KEPT, "those that are recorded, and the last that aren't"


def test_a_provider_that_cannot_start_is_no_silent_fallback(model, monkeypatch):
    has(monkeypatch, "CUDAExecutionProvider")
    monkeypatch.setattr(Recorder, "get_providers", lambda self: ["CPUExecutionProvider"])
    with OnnxRuntime(files(model), Placement("cuda")) as runtime:
        assert runtime.configuration["fallback"] == (
            "ONNX Runtime couldn't start CUDAExecutionProvider: using CPUExecutionProvider"
        )
        assert runtime.configuration["device"] == "cpu"
    for option in ({"provider": "CUDAExecutionProvider"}, {"cuda_graphs": True}, {"provider_options": "use_tf32=1"}):
        with pytest.raises(UnavailableError, match="couldn't start CUDAExecutionProvider"):
            OnnxRuntime(files(model), Placement("cuda", **option))


def test_another_gpu_is_chosen_by_the_environment(model, monkeypatch):
    """Tensors, memory and guards are of the first one that is shown."""
    has(monkeypatch, "CUDAExecutionProvider")
    with OnnxRuntime(files(model), Placement("cuda", provider_options="device_id=0")):
        pass
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reason, fix = providers.option_obstacle(
        "provider_options", Placement(provider="CUDAExecutionProvider", provider_options="device_id=1")
    )
    assert "device_id=1" in reason
    assert "CUDA_VISIBLE_DEVICES=1" in fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    _, fix = providers.option_obstacle(
        "provider_options", Placement(provider="CUDAExecutionProvider", provider_options="device_id=1")
    )
    assert fix.endswith("CUDA_VISIBLE_DEVICES=3")


def test_a_provider_that_is_not_built_in_says_how_to_get_it():
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider") as raised:
        providers.choose(Placement(provider="CUDAExecutionProvider"))
    assert "onnx-gpu" in raised.value.fix


def test_nvml_tells_of_a_gpu_where_torch_is_built_without(monkeypatch):
    has(monkeypatch, "CUDAExecutionProvider")
    missing = hardware.Availability(ok=False, reason="no CUDA in this torch", fix="")
    monkeypatch.setitem(hardware._DETECTORS, "cuda", lambda: missing)
    assert providers.choose(Placement("cuda"))[:2] == ("CPUExecutionProvider", "cpu")
    monkeypatch.setattr(providers.nvidia, "describe", lambda: [{"name": "a GPU"}])
    assert providers.choose(Placement("cuda")) == ("CUDAExecutionProvider", "cuda", None)


@pytest.mark.parametrize(("installed", "refused"), [("11.4.0.106", True), ("10.13.2", False), (None, False)])
def test_two_tensorrts_exclude_each_other(model, monkeypatch, installed, refused):
    def version(package):
        if installed is None or package != "tensorrt-cu13":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    has(monkeypatch, "TensorrtExecutionProvider")
    placement = Placement(provider="TensorrtExecutionProvider")
    if refused:
        with pytest.raises(UnavailableError, match=r"links TensorRT 10, here is tensorrt-cu13 11\.4") as raised:
            OnnxRuntime(files(model), placement)
        assert "environment of its own" in raised.value.fix
        return
    with OnnxRuntime(files(model), placement) as runtime:
        assert runtime.configuration["providers"][:2] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
        assert runtime.configuration["device"] == "cuda"


@pytest.mark.interop
def test_openvinos_provider_runs_for_real(model):
    """In an environment with onnxruntime-openvino: the same numbers, its own options, and no silent fallback."""
    code = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from test_providers import files, picture
from pathlib import Path
from bakeoff.errors import UnavailableError
from bakeoff.recipe import Placement
from bakeoff.runtimes.onnxruntime import OnnxRuntime
folder, told = Path(sys.argv[1]), {}
with OnnxRuntime(files(folder), Placement("cpu")) as plain:
    right = plain.run(picture(0))["y"]
    told["plain"] = plain.configuration["providers"]
with OnnxRuntime(files(folder), Placement("cpu", threads=1, provider="OpenVINOExecutionProvider")) as runtime:
    told |= {"error": float((runtime.run(picture(0))["y"] - right).abs().max()), **runtime.configuration}
for name, placement in (
    ("option", Placement("cpu", provider="OpenVINOExecutionProvider", provider_options="bogus=1")),
    ("device", Placement("npu", provider="OpenVINOExecutionProvider")),
):
    try:
        OnnxRuntime(files(folder), placement)
    except UnavailableError as error:
        told[name] = error.message
print(json.dumps(told))
"""
    command = [os.environ["ORT_OPENVINO_PYTHON"], "-P", "-c", code, str(model), os.path.dirname(__file__)]  # noqa: PTH120
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["plain"] == ["CPUExecutionProvider"]
    assert told["providers"] == ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    assert told["error"] < 1e-4
    assert "couldn't start OpenVINOExecutionProvider" in told["option"]
    assert "couldn't start OpenVINOExecutionProvider" in told["device"]
