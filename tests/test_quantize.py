"""Low-bit weights: what a format does to numbers, and that every backend computes with exactly those."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from diffusers import ModelMixin, TorchAoConfig, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

import bakeoff
from bakeoff import hardware, plugins
from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.components import byte_layers
from bakeoff.components.byte_layers import ByteLayer
from bakeoff.components.component import Component, Port, Sizes
from bakeoff.components.loading import load_diffusers
from bakeoff.errors import InputError, RecipeError, UnavailableError
from bakeoff.exporters.capture import module_on_hollow, on_hollow
from bakeoff.exporters.corrected import lower_corrected
from bakeoff.exporters.exporter import Subject
from bakeoff.exporters.onnx_codes import Encoder
from bakeoff.exporters.torch import layout_of
from bakeoff.parity.distance import relative_error
from bakeoff.parity.proof import names_in, scales_of
from bakeoff.plan import plan
from bakeoff.precisions import cells, markdown
from bakeoff.quantize.calibration import Calibration
from bakeoff.quantize.channels import Channels
from bakeoff.quantize.grid import Grid
from bakeoff.quantize.nf4 import LEVELS
from bakeoff.recipe import PRECISIONS, Placement, parse
from bakeoff.runtimes.engine import load
from bakeoff.runtimes.opening import open_part, read_folder
from bakeoff.runtimes.runtime import PartFiles
from bakeoff.sources.lora import Delta
from bakeoff.sources.source import Source
from bakeoff.weights import Checkpoint

SHAPES = Path(bakeoff.__file__).parent / "models" / "shapes"
FORMATS = ["int8", "int4", "nf4"]
BACKENDS = {"onnx": 1e-5, "openvino": 1e-2, "torch": 1e-2}
"""Backend -> distance to eager float32 with rounded weights: the last two compute in bfloat16."""
LEAST_DB = {"int8": 40, "int4": 20, "nf4": 20}
"""What a normal distribution keeps in each format."""


def rows(count=64, width=256, seed=0, scale=1.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(1e-6, 1e6))
def test_a_format_keeps_what_its_bits_can(name, seed, scale):
    weight_format, weights = plugins.weight_format(name), rows(seed=seed, scale=scale)
    codes, scales = weight_format.pack(weights)
    assert codes.dtype == torch.int8
    assert codes.shape == weights.shape
    assert scales.numel() * 4 == weight_format.stored_bytes(weights.shape)[1]
    error = relative_error(weight_format.unpack(codes, scales), weights)
    assert -20 * math.log10(error) > LEAST_DB[name]


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_rounded_stays(name):
    weight_format = plugins.weight_format(name)
    once = weight_format.unpack(*weight_format.pack(rows()))
    again = weight_format.unpack(*weight_format.pack(once))
    assert relative_error(again, once) < (1e-6 if name != "int4" else 0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_single_outliers(name):
    weight_format, weights = plugins.weight_format(name), rows()
    weights[3], weights[5, 7] = 0.0, 1000.0
    rounded = weight_format.unpack(*weight_format.pack(weights))
    assert torch.equal(rounded[3], weights[3])
    assert rounded[5, 7] == pytest.approx(1000.0, rel=0.26)
    assert relative_error(rounded[10:], weights[10:]) < 0.12


def test_nf4_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight_format, weights = plugins.weight_format("nf4"), rows()
    codes, scales = weight_format.pack(weights)
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    pairs = codes.flatten().unflatten(0, (-1, 2)).to(torch.uint8)
    assert torch.equal(packed.flatten(), (pairs[:, 0] << 4) | pairs[:, 1])
    assert torch.equal(state.absmax, scales.flatten())
    assert torch.equal(state.code, torch.tensor(LEVELS))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("int8", (320,), "not a matrix"),
        ("int8", (1, 4096), "not a matrix"),
        ("int8", (8, 8), "under 4096"),
        ("int8", (320, 4, 3, 3), None),
        ("int4", (320, 320, 3, 3), "not convolutions"),
        ("nf4", (320, 100), "100 inputs"),
        ("nf4", (320, 320), None),
    ],
)
def test_what_is_left_as_it_is_and_why(name, shape, reason):
    found = plugins.weight_format(name).obstacle(shape)
    assert (found is None) if reason is None else (reason in found)


class Mixed(Component):
    """A table, a matrix on rows, one on a single vector with a bias, and a convolution."""

    name = "mixed"
    operations = 4

    def inputs(self, config):
        return (
            Port("ids", "int64", ("batch", "sequence")),
            Port("time", "float32", ("batch", 128)),
            Port("picture", "float32", ("batch", 16, "height", "width")),
        )

    def outputs(self, config):
        return (
            Port("tokens", "float32", ("batch", "sequence", 192)),
            Port("mixed", "float32", ("batch", 64, "height", "width")),
        )

    def load(self, folder, dtype):
        return load_diffusers(Layers, folder, dtype)

    def flat(self, module):
        return Flat(module)

    def example(self, config, sizes, seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = {port.name: port.shape(sizes.as_dict()) for port in self.inputs(config)}
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if name != "ids"}
        return {"ids": torch.randint(256, shapes["ids"], generator=generator), **made}

    def stand_in(self, runners, config):
        raise NotImplementedError


class Layers(ModelMixin, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 128)
        self.matrix = nn.Linear(128, 192, bias=False)
        self.vector = nn.Linear(128, 64)
        self.take = nn.Conv2d(16, 64, 3, padding=1)


class Flat(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, ids, time, picture):
        tokens = self.module.matrix(torch.tanh(self.module.table(ids)))
        return tokens, self.module.take(picture) + self.module.vector(time)[:, :, None, None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A module folder whose weights are bfloat16, so that nothing but the format rounds them."""
    folder = tmp_path_factory.mktemp("mixed")
    torch.manual_seed(0)
    Layers().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_source(tmp_path_factory):
    """The same in float32."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    Layers().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_computes_with_the_formats_weights(source, tmp_path, backend, name):
    made, weight_format = Mixed(), plugins.weight_format(name)
    files, lowered = lower(made, source, tmp_path, backend, name)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    kept = {key.removesuffix(".weight"): "bf16" for key in lowered.kept}
    eager = plugins.mixture(name, kept).round_module(made.load(source, torch.float32), {})
    expected = dict(zip(("tokens", "mixed"), made.flat(eager)(*inputs.values()), strict=True))
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)
    for key, tensor in expected.items():
        assert relative_error(got[key], tensor.detach()) < BACKENDS[backend], key
    if name == "int8" and backend != "torch":
        assert not kept
    in_bytes = (backend, name) == ("torch", "int4")  # where torchao keeps each code in a byte
    assert lowered.weight_bytes[f"{name} in bytes" if in_bytes else name] == (2 if in_bytes else 1) * sum(
        weight_format.stored_bytes(entry.shape)[0]
        for entry in Checkpoint.open(source).entries.values()
        if len(entry.shape) > 1 and entry.name not in lowered.kept
    )


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_computes_for_known_inputs(wide_source, tmp_path, backend, name):
    """Scales are searched for them, and biases corrected: of those layers alone that the backend has codes for."""
    made, generator = Mixed(), torch.Generator().manual_seed(0)
    known = {"matrix": Channels(), "vector": Channels(), "take": Channels()}
    for layer, channels in known.items():
        values = torch.randn(64, 16 if layer == "take" else 128, generator=generator)
        channels.see(values * torch.linspace(0, 2, values.shape[1]) + 1, 1)
    mixture = replace(plugins.mixture(name), known=known)
    files, lowered = lower(made, wide_source, tmp_path, backend, name, mixture=mixture)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    kept = {key.removesuffix(".weight"): "bf16" for key in lowered.kept}
    assert ("take" in kept) == (backend == "torch" or name == "int4")
    coded = replace(mixture, layers=kept)
    with torch.no_grad():
        expected = made.flat(coded.round_module(made.load(wide_source, torch.float32), {}))(*inputs.values())
        plain = plugins.mixture(name, kept).round_module(made.load(wide_source, torch.float32), {})
        other = made.flat(plain)(*inputs.values())
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)
    for key, near, far in zip(("tokens", "mixed"), expected, other, strict=True):
        assert relative_error(got[key], near) < 1e-2, key  # biases and what has no codes are of bfloat16
        rounds_more = (backend, name) == ("torch", "int8")  # bitsandbytes, activations
        if not rounds_more and (name == "int4" or key == "mixed"):
            assert relative_error(got[key], near) < 0.7 * relative_error(got[key], far), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_are_rounded_as_they_come(source, tmp_path, backend):
    made = Mixed()
    files, _ = lower(made, source, tmp_path, backend, "w8a8-dynamic")
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        eager, alike = (
            made.flat(plugins.mixture(name).round_module(made.load(source, torch.float32), {}))(*inputs.values())
            for name in ("int8", "w8a8-dynamic")
        )
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)
        ran, fallback = (runtime.configuration[name] for name in ("precision", "fallback"))
    if backend == "openvino" and (hardware.overflows_bytes() or hardware.has_instructions("amx_int8")):
        assert "doesn't round activations" in fallback
        tolerance = 1e-5 if hardware.overflows_bytes() else 1e-2  # floats there, bfloat16 with AMX
        pairs = zip(("tokens", "mixed"), eager, strict=True)
        assert all(relative_error(got[key], wide) < tolerance for key, wide in pairs)
        return
    assert fallback is None
    for key, wide, rounded in zip(("tokens", "mixed"), eager, alike, strict=True):
        assert 1e-4 < relative_error(got[key], wide) < 2e-2
        if backend == "onnx":
            assert relative_error(got[key], rounded) < 1e-5
    assert "int8" in ran or "i8" in ran
    assert backend != "torch" or ran == {"int8": 2, "bfloat16": 1}


@pytest.mark.parametrize("fed", ["input", "node"])
@pytest.mark.parametrize("precision", ["w8a8", "w8a8-dynamic"])
def test_an_activation_is_rounded_before_all_that_take_it(tmp_path, precision, fed):
    """Parameters come in the order of their registration, `key` first; `query` runs first."""
    save_file({name: torch.randn(64, 64) for name in ("key.weight", "query.weight")}, tmp_path / "model.safetensors")
    taken = onnx_ir.Value(name="x", shape=onnx_ir.Shape([2, 64]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    nodes = [onnx_ir.node("Tanh", [taken], name="before")] if fed == "node" else []
    weights = {name: onnx_ir.Value(name=name, shape=onnx_ir.Shape([64, 64])) for name in ("key.weight", "query.weight")}
    for name in ("query", "key"):
        turned = onnx_ir.node("Transpose", [weights[f"{name}.weight"]], {"perm": [1, 0]}, name=f"{name}.turned")
        given = nodes[0].outputs[0] if fed == "node" else taken
        nodes += [turned, onnx_ir.node("MatMul", [given, turned.outputs[0]], name=name)]
    outputs = [node.outputs[0] for node in nodes if node.op_type == "MatMul"]
    graph = onnx_ir.Graph([taken], outputs, nodes=nodes, initializers=[*weights.values()], opset_imports={"": 20})
    grids = {name: (Grid((0.01,)), None) for name in ("key", "query")}
    encoder = Encoder(onnx_ir.Model(graph, ir_version=10), plugins.mixture(precision), precision, grids)
    entries = Checkpoint.open(tmp_path).entries
    for name in ("key.weight", "query.weight"):
        assert isinstance(encoder.encode(weights[name], entries[name]), list)
    made = {taken, *graph.initializers.values()}
    for node in graph:
        assert made.issuperset(node.inputs), node.name
        made |= {*node.outputs}
    assert sum("QuantizeLinear" in node.op_type for node in graph) == 1


def even(scales):
    """Return layer -> grids around nought, from the steps of its input and output."""
    return {layer: tuple(Grid((step,)) for step in both) for layer, both in scales.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_are_rounded_with_calibrated_scales(source, tmp_path, backend):
    made, scales = Mixed(), even({"matrix": (0.01, 0.02), "vector": (0.03, 0.02), "take": (0.03, 0.02)})
    files, _ = lower(made, source, tmp_path, backend, "w8a8", scales)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        wide = made.flat(made.load(source, torch.float32))(*inputs.values())
        layers = plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}, scales)
        expected = made.flat(layers)(*inputs.values())
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)
        ran = runtime.configuration["precision"]
    if backend == "onnx":
        operators = Counter(node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
        assert operators["MatMulIntegerToFloat"] == 2
        assert operators["QuantizeLinear"] == 4
        assert ran == {"int8": 3}, "the convolution becomes QLinearConv when it is opened"
    elif backend == "torch":
        assert ran == ("bfloat16" if hardware.overflows_bytes() else {"int8": 3, "bfloat16": 0})
    elif not hardware.overflows_bytes():
        assert sum(ran.get(kind, 0) for kind in ("i8", "u8")) == 3
    for key, far, near in zip(("tokens", "mixed"), wide, expected, strict=True):
        most = 4e-3 if backend == "onnx" else 1.5e-2  # a value between two steps may go either way
        assert relative_error(got[key], near) < most, key
        assert relative_error(got[key], far) < 5e-2


@pytest.mark.parametrize(("backend", "outputs"), [("onnx", True), ("onnx", False), ("openvino", False)])
@pytest.mark.parametrize("biased", [True, False])
def test_channels_have_steps_of_their_own(source, tmp_path, monkeypatch, backend, outputs, biased):
    monkeypatch.setattr("bakeoff.exporters.onnx_weights._INLINE_BYTES", 64)  # as if the bias were a large model's
    made, module = Mixed(), load_file(Checkpoint.open(source).files[0])
    generator = torch.Generator().manual_seed(0)
    steps = [tuple((0.01 + 0.2 * torch.rand(n, generator=generator)).tolist()) for n in (16, 64)]
    zeros = tuple(torch.randint(-60, 60, (64,), generator=generator).tolist())
    given = Grid(steps[0], (-40,))
    grids = {"take": (given, Grid(steps[1], zeros) if outputs else None), "matrix": (Grid((0.04,), (20,)), None)}
    if not biased:
        source = shutil.copytree(source, tmp_path / "unbiased")
        save_file({**module, "take.bias": torch.zeros(64, dtype=torch.bfloat16)}, Checkpoint.open(source).files[0])
    files, _ = lower(made, source, tmp_path, backend, "w8a8", grids)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        wide = made.flat(plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}))(*inputs.values())
        layers = plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}, grids)
        expected = made.flat(layers)(*inputs.values())
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)
        ran = runtime.configuration["precision"]
    for key, far, near in zip(("tokens", "mixed"), wide, expected, strict=True):
        assert relative_error(got[key], near) < 1.5e-2, key
        assert relative_error(far, near) > 1.7e-2, key  # leaving the rounding out would show
    integers = backend == "openvino" and not hardware.overflows_bytes()
    assert not integers or sum(ran.get(kind, 0) for kind in ("i8", "u8")) >= 2


class Take(Flat):
    def forward(self, picture):
        return (self.module.take(picture),)


class Lasting(Mixed):
    """What the convolution makes is an output as it is, as in the UNets of Stable Diffusion."""

    def outputs(self, config):
        return (Port("made", "float32", ("batch", 64, "height", "width")),)

    def inputs(self, config):
        return super().inputs(config)[2:]

    def flat(self, module):
        return Take(module)

    def example(self, config, sizes, seed):
        generator = torch.Generator().manual_seed(seed)
        return {"picture": torch.randn(sizes.batch, 16, sizes.height, sizes.width, generator=generator)}


@pytest.mark.parametrize(
    ("backend", "rounded"), [("onnx", True), ("onnx", False), ("openvino", False), ("torch", False)]
)
@pytest.mark.parametrize("by_channel", [True, False])
def test_a_convolution_that_makes_an_output(source, tmp_path, backend, rounded, by_channel):
    made, generator = Lasting(), torch.Generator().manual_seed(0)
    steps = tuple((0.01 + 0.05 * torch.rand(64, generator=generator)).tolist()) if by_channel else (0.03,)
    zeros = tuple(torch.randint(-60, 60, (64,), generator=generator).tolist()) if by_channel else (0,)
    grids = {"take": (Grid((0.03,)), Grid(steps, zeros) if rounded else None)}
    files, _ = lower(made, source, tmp_path, backend, "w8a8", grids)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        layers = plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}, grids)
        (expected,) = made.flat(layers)(*inputs.values())
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)["made"]
    assert relative_error(got, expected) < 1.5e-2


def test_openvinos_weights_take_the_very_steps_that_activations_are_rounded_with(source, tmp_path, monkeypatch):
    """The plugin's steps have 8 significant bits: weights made for longer ones would scale each channel by up to 0.4 %."""
    from bakeoff.exporters.openvino_activations import shortened
    from bakeoff.runtimes import openvino

    monkeypatch.setitem(openvino._HINTS, "w8a8", "f32")
    made, generator = Lasting(), torch.Generator().manual_seed(0)
    grids = {"take": (Grid(tuple((0.01 + 0.2 * torch.rand(16, generator=generator)).tolist()), (-40,)), None)}
    files, _ = lower(made, source, tmp_path, "openvino", "w8a8", grids)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        short = plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}, shortened(grids))
        (expected,) = made.flat(short)(*inputs.values())
    with plugins.runtime("openvino")(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)["made"]
    assert relative_error(got, expected) < 1e-5


@pytest.fixture(scope="module")
def extreme_source(tmp_path_factory):
    """A module folder whose weights' codes are all 127 or -127, the table's values all 1 or -1."""
    folder = tmp_path_factory.mktemp("extreme")
    generator = torch.Generator().manual_seed(0)
    layers = Layers().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1)
    layers.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("offload", ["none", pytest.param("mapped", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["int8", "w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_large_products_dont_overflow(extreme_source, tmp_path, backend, precision, offload):
    """On a CPU without VNNI, 255 × 127 + 255 × 127 is 32,767 in the quickest kernels: half of what it should be."""
    if precision not in plugins.exporter(backend).precisions:
        pytest.skip(f"no {backend}:{precision}")
    made = Mixed()
    scales = even({"matrix": (0.8 / 127, 0.1), "vector": (1 / 127, 1.0), "take": (1 / 127, 1.0)})
    files, _ = lower(made, extreme_source, tmp_path, backend, precision, scales)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    inputs |= {name: inputs[name].sign() for name in ("time", "picture")}
    with torch.no_grad():
        eager = plugins.mixture(precision).round_module(made.load(extreme_source, torch.float32), {}, scales)
        expected = dict(zip(("tokens", "mixed"), made.flat(eager)(*inputs.values()), strict=True))
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1, offload=offload)) as runtime:
        got = runtime.run(inputs)
        said = runtime.configuration
        if backend == "onnx":
            inside = runtime.tap(inputs, list(expected))
            assert all(relative_error(inside[key].float(), got[key]) < 2e-2 for key in expected)
    for key, tensor in expected.items():
        assert relative_error(got[key], tensor) < (2e-2 if precision == "w8a8" else BACKENDS[backend]), key
    if backend == "openvino" and precision != "int8" and hardware.overflows_bytes():
        assert "no VNNI" in said["fallback"]
        assert not {"i8", "u8"} & set(said["precision"])


def test_torch_multiplies_integers_where_the_cpu_can(source, tmp_path):
    """Codes of at most 64 overflow nowhere: so oneDNN's kernels can be held to floats here, whatever the CPU."""
    made, scales = Mixed(), even({"matrix": (0.01, 0.02), "vector": (0.03, 0.02), "take": (0.03, 0.02)})
    files, _ = lower(made, source, tmp_path, "torch", "w8a8", scales)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with plugins.runtime("torch")(files, Placement(device="cpu", threads=1)) as runtime:
        layers = [layer for layer in runtime.module().modules() if isinstance(layer, ByteLayer)]
        outputs = []
        for layer in layers:
            layer.weight.data = layer.weight.clamp(-64, 63)
        for integers in (False, True):
            for layer in layers:
                layer.integers = integers
            outputs.append(runtime.run(inputs))
    assert len(layers) == 3
    for key, wide in outputs[0].items():
        assert relative_error(outputs[1][key], wide) < 5e-3, key
    assert any(layer._packed is not None for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "laid_out",
    [
        lambda rows: rows,
        lambda rows: rows.contiguous(memory_format=torch.channels_last),
        lambda rows: rows[:, ::2],
        lambda rows: rows[:1].expand(3, -1, -1, -1),
        lambda rows: rows.flatten(0, 2).T,
        lambda rows: rows[..., :0],
    ],
)
def test_activations_are_rounded_piece_by_piece_as_all_at_once(monkeypatch, dtype, laid_out):
    monkeypatch.setattr(byte_layers, "_PIECE", 100)
    given = laid_out(torch.randn(2, 6, 7, 9, generator=torch.Generator().manual_seed(0)).to(dtype))
    codes = byte_layers.unsigned_codes(given, 0.02)
    assert torch.equal(codes, (given.float() / 0.02).round().clamp(-128, 127).add(128).to(torch.uint8))


def test_a_layer_that_was_not_calibrated_keeps_its_activations(source, tmp_path):
    made, scales = Mixed(), even({"matrix": (0.01, 0.02)})
    files, lowered = lower(made, source, tmp_path, "torch", "w8a8", scales)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        eager = plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}, scales)
        expected = dict(zip(("tokens", "mixed"), made.flat(eager)(*inputs.values()), strict=True))
    with plugins.runtime("torch")(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)
    assert all(relative_error(got[key], tensor) < 1e-2 for key, tensor in expected.items())
    assert lowered.weight_bytes["int8"] == 192 * 128 + 64 * 128 + 64 * 16 * 9
    assert lowered.kept == {
        "table.weight": "bakeoff has codes for Linear layers and convolutions that pad with zeros alone"
    }


def test_int8_in_torch_with_convolutions(source, tmp_path):
    """Weights alone: every activation stays, and no layer's product is of integers."""
    made = Mixed()
    files, lowered = lower(made, source, tmp_path, "torch", "int8", options={"codes": "bakeoff"})
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    eager = plugins.mixture("int8", {"table": "bf16"}).round_module(made.load(source, torch.float32), {})
    expected = dict(zip(("tokens", "mixed"), made.flat(eager)(*inputs.values()), strict=True))
    with plugins.runtime("torch")(files, Placement(device="cpu", threads=1)) as runtime:
        layers = [layer for layer in runtime.module().modules() if isinstance(layer, ByteLayer)]
        got = runtime.run(inputs)
        assert runtime.configuration["precision"] == "bfloat16"
        assert runtime.configuration["fallback"] is None
    assert [layer.rounds for layer in layers] == [False] * 3
    for key, tensor in expected.items():
        assert relative_error(got[key], tensor.detach()) < 5e-3, key
    assert lowered.weight_bytes["int8"] == 192 * 128 + 64 * 128 + 64 * 16 * 9
    assert set(lowered.kept) == {"table.weight"}


def test_whose_codes_is_asked_of_int8_alone():
    with pytest.raises(RecipeError, match="for int8 alone, got nf4") as caught:
        plan("shapes", parse("torch:nf4+codes=bakeoff,vae_encoder=torch:bf16,vae_decoder=torch:bf16")[0])
    assert "leave codes out" in caught.value.fix


class Attending(Mixed):
    """One attention, its queries with a bias, its keys without one."""

    name = "attending"
    heads = 2

    def inputs(self, config):
        return (Port("given", "float32", ("batch", "sequence", 96)),)

    def outputs(self, config):
        return (Port("tokens", "float32", ("batch", "sequence", 96)),)

    def load(self, folder, dtype):
        module = Projections()
        module.load_state_dict(load_file(Checkpoint.open(folder).files[0]))
        return module.to(dtype).eval()

    def flat(self, module):
        return FlatAttention(module, self.heads)

    def example(self, config, sizes, seed):
        shape = self.inputs(config)[0].shape(sizes.as_dict())
        return {"given": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(96, 96), nn.Linear(96, 96)
        self.key = nn.Linear(96, 96, bias=False)


class FlatAttention(nn.Module):
    def __init__(self, module, heads):
        super().__init__()
        self.module, self.heads = module, heads

    def forward(self, given):
        made = (self.module.query(given), self.module.key(given), self.module.value(given))
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in made)
        return (nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2),)


@pytest.mark.parametrize(
    ("heads", "rounded"),
    [(1, not hardware.has_instructions("amx_bf16")), (2, True), (3, False)],
    ids=["heads of 96", "heads of 48", "heads of 32"],
)
def test_openvino_rounds_queries_and_keys_of_large_heads_but_no_values(tmp_path, heads, rounded):
    """Small ones it doesn't: OpenVINO gets them wrong on processors with AMX, where there are as many keys as channels.

    The largest only where there is no AMX, with which they are no quicker for it.
    """
    made, source = Attending(), tmp_path / "source"
    made.heads = heads
    source.mkdir()
    torch.manual_seed(0)
    save_file(Projections().to(torch.bfloat16).state_dict(), source / "model.safetensors")
    (source / "config.json").write_text("{}")
    scales = even({"query": (0.03, 0.5), "key": (0.03, 0.25), "value": (0.03, 0.02)})
    files, _ = lower(made, source, tmp_path, "openvino", "w8a8", scales)
    inputs = made.example({}, Sizes(2, 8, 8, 32), seed=1)
    eager = plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}, scales)
    with torch.no_grad():
        wide = made.flat(eager)(inputs["given"])[0]
        for path in ("query", "key"):
            getattr(eager, path).register_forward_hook(lambda *step, grid=scales[path][1]: grid.round(step[-1], -1))
        coarse = made.flat(eager)(inputs["given"])[0]
    with plugins.runtime("openvino")(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)["tokens"]
    assert relative_error(got, coarse if rounded else wide) < 3e-2
    assert relative_error(wide, coarse) > 5e-2  # so coarse are these steps that leaving them out would show


def test_openvino_rounds_nought_to_nought():
    """A norm without a mean makes whole numbers of millionths of a step."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset13

    from bakeoff.exporters.openvino_activations import _rounded, shortened

    generator = torch.Generator().manual_seed(0)
    grids = [Grid((float(step),)) for step in torch.rand(60, generator=generator)]
    grids += [Grid((float(step),), (zero,)) for zero, step in enumerate(torch.rand(60, generator=generator), -30)]
    grids = [grid for grid, _ in shortened({str(index): (grid, None) for index, grid in enumerate(grids)}).values()]
    taken = opset13.parameter([1, 16, 1, 1], openvino.Type.f32)
    model = openvino.Model([_rounded(taken.output(0), grid) for grid in grids], [taken])
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = torch.linspace(0, 0.4, 16).reshape(1, 16, 1, 1)
    for grid, made in zip(grids, compiled([values.numpy()]).values(), strict=True):
        assert made.flat[0] == 0
        assert torch.allclose(torch.from_numpy(made), grid.round(values, 1), atol=grid.steps[0] * 1.01)


@pytest.mark.parametrize("name", FORMATS)
def test_openvino_adds_loras_to_codes(source, tmp_path, name):
    made = Mixed()
    files, _ = lower(made, source, tmp_path, "openvino", name)
    delta = Delta(rows(192, 4, seed=1), rows(4, 128, seed=2), 0.1)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    eager = plugins.mixture(name).round_module(made.load(source, torch.float32), {})
    with torch.no_grad():
        eager.matrix.weight += delta.tensor((192, 128))
    expected = made.flat(eager)(*inputs.values())[0].detach()
    assert plugins.runtime("openvino").shapes(files.folder)["matrix.weight"][0] == 192
    with plugins.runtime("openvino")(replace(files, deltas={"matrix.weight": [delta]}), Placement()) as runtime:
        assert relative_error(runtime.run(inputs)["tokens"], expected) < 1e-2


def test_openvino_adds_loras_to_weights_of_channels_steps(source, tmp_path):
    """Such weights are multiplied by the steps in which the convolution takes each channel."""
    made, generator = Lasting(), torch.Generator().manual_seed(0)
    grids = {"take": (Grid(tuple((0.01 + 0.2 * torch.rand(16, generator=generator)).tolist()), (-40,)), None)}
    files, lowered = lower(made, source, tmp_path, "openvino", "w8a8", grids)
    delta = Delta(rows(64, 4, seed=1), rows(4, 16 * 9, seed=2), 0.1)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        eager = plugins.mixture("w8a8").round_module(made.load(source, torch.float32), {}, lowered.activations)
        eager.take.weight += delta.tensor(eager.take.weight.shape)
        (expected,) = made.flat(eager)(*inputs.values())
    with plugins.runtime("openvino")(replace(files, deltas={"take.weight": [delta]}), Placement()) as runtime:
        assert relative_error(runtime.run(inputs)["made"], expected) < 1e-2


def test_openvino_keeps_float16_where_loras_are_added(source, tmp_path, monkeypatch):
    from bakeoff.runtimes import openvino

    monkeypatch.setitem(openvino._HINTS, "fp16", "f32")
    made = Mixed()
    files, _ = lower(made, source, tmp_path, "openvino", "fp16")
    delta = Delta(rows(192, 4, seed=1), rows(4, 128, seed=2), 0.1)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    eager = made.load(source, torch.float32)
    with torch.no_grad():
        eager.matrix.weight += delta.tensor((192, 128))
        expected = made.flat(eager)(*inputs.values())[0]
    with plugins.runtime("openvino")(replace(files, deltas={"matrix.weight": [delta]}), Placement()) as runtime:
        assert relative_error(runtime.run(inputs)["tokens"], expected) < 5e-4


MIXED = {
    "onnx": ("w8a8", {"matrix": "nf4", "vector": "fp32", "take": "int8"}),
    "openvino": ("w8a8", {"matrix": "nf4", "vector": "fp32", "take": "int8"}),
    "torch": ("bf16", {"vector": "fp32", "take": "fp32"}),
}


@pytest.mark.parametrize("backend", MIXED)
def test_layers_of_other_precisions(wide_source, tmp_path, backend):
    precision, layers = MIXED[backend]
    made, mixture = Mixed(), plugins.mixture(precision, layers)
    files, lowered = lower(made, wide_source, tmp_path, backend, precision, layers=layers)
    inputs = made.example({}, Sizes(3, 6, 10, 5), seed=1)
    with torch.no_grad():
        expected = made.flat(mixture.round_module(made.load(wide_source, torch.float32), {}))(*inputs.values())
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        got = runtime.run(inputs)
    for key, wide in zip(("tokens", "mixed"), expected, strict=True):
        assert relative_error(got[key], wide) < {"onnx": 4e-3}.get(backend, 1e-2), key
    assert lowered.weight_bytes["float32"] >= 4 * 64 * 128
    if backend == "torch":
        assert relative_error(got["mixed"], expected[1]) < 3e-3  # its layers compute in float32
    else:
        assert lowered.weight_bytes["nf4"] == 192 * 128 // 2
        assert lowered.weight_bytes["int8"] == 64 * 16 * 9 + 256 * 128
        assert lowered.kept["vector.weight"] == "the recipe keeps it in fp32"


class Repeated(Mixed):
    """A convolution that runs twice, once behind a factor that OpenVINO folds into its weight."""

    def outputs(self, config):
        return (Port("mixed", "float32", ("batch", 64, "height", "width")),)

    def inputs(self, config):
        return (Port("picture", "float32", ("batch", 64, "height", "width")),)

    def load(self, folder, dtype):
        return load_diffusers(RepeatedLayers, folder, dtype)

    def flat(self, module):
        return RepeatedFlat(module)

    def example(self, config, sizes, seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            port.name: torch.randn(port.shape(sizes.as_dict()), generator=generator) for port in self.inputs(config)
        }


class RepeatedLayers(ModelMixin, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self):
        super().__init__()
        self.take = nn.Conv2d(64, 64, 3, padding=1)


class RepeatedFlat(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, picture):
        return (self.module.take(10 * self.module.take(picture)),)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_used_twice_is_right_in_both_places(tmp_path, backend):
    torch.manual_seed(0)
    RepeatedLayers().save_pretrained(tmp_path / "source")
    made = Repeated()
    files, _ = lower(made, tmp_path / "source", tmp_path, backend, "fp32")
    inputs = made.example({}, Sizes(2, 6, 10, 5), seed=1)
    with torch.no_grad():
        (expected,) = made.flat(made.load(tmp_path / "source", torch.float32))(*inputs.values())
    with plugins.runtime(backend)(files, Placement(device="cpu", threads=1)) as runtime:
        assert relative_error(runtime.run(inputs)["mixed"], expected) < 1e-4


def lower(made, source, folder, backend, precision, activations=None, layers=None, mixture=None, options=None):
    (folder / "out").mkdir()
    shutil.copy(source / "config.json", folder / "out")
    subject = Subject(
        part=made.name,
        mixture=mixture or plugins.mixture(precision, layers),
        activations=activations or {},
        inputs=made.inputs({}),
        outputs=made.outputs({}),
        source=source,
        checkpoint=Checkpoint.open(source),
        capture=on_hollow(made.name, made, {}, source, folder / "hollow"),
        module=module_on_hollow(made, source, folder / "hollow"),
        weights="auto",
        options=options or {},
    )
    recapture = partial(on_hollow, made.name, made, {}, source, folder / "hollow")
    exporter = plugins.exporter(backend)
    lowered = lower_corrected(exporter, subject, recapture, folder / "biases.safetensors", folder / "out")
    opened = folder / "out" if backend == "torch" else source
    files = PartFiles(
        name=made.name,
        folder=folder / "out",
        precision=precision,
        inputs=made.inputs({}),
        outputs=made.outputs({}),
        build=lambda dtype: made.flat(made.load(opened, getattr(torch, dtype))),
    )
    return files, lowered


def test_a_recipe_that_changes_nothing_is_an_error(tiny, tmp_path):
    with pytest.raises(RecipeError, match="int4 changes no weight of vae_encoder: .* not convolutions"):
        export(str(tiny("flux")), tmp_path / "out", parse("null:fp32,vae_encoder=torch:int4")[0], prove=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=r"changes no weight of vae_encoder: .*; .* of vae_decoder: ") as caught:
        plan(str(tiny("flux")), parse("torch:nf4")[0])
    assert "--recipe …,vae_encoder=torch:bf16,vae_decoder=torch:bf16" in caught.value.fix
    assert plan(str(tiny("flux")), parse(f"torch:nf4,{caught.value.fix.partition('…,')[2]}")[0])


def test_the_manifest_says_what_was_kept_and_why(baked):
    folder = baked("torch:fp32,text_encoder=onnx:nf4")
    part = json.loads((folder / "bakeoff.json").read_text())["parts"]["text_encoder"]
    assert part["kept"]["text_model.embeddings.token_embedding.weight"] == "ONNX Runtime has no nf4 weights for Gather"
    assert part["weight_bytes"]["nf4"] > part["weight_bytes"]["bfloat16"]
    assert part["weight_shares"]["nf4"] == pytest.approx(0.92, abs=0.05)
    assert part["stated_share"] == part["weight_shares"]["nf4"]
    assert sum(part["weight_shares"].values()) == pytest.approx(1, abs=1e-3)
    wide = json.loads((baked("torch:fp32") / "bakeoff.json").read_text())["parts"]["text_encoder"]
    assert "stated_share" not in wide


def calibrated_text_encoder(folder, without="", nought=""):
    """Export the text encoder in torch's w8a8, all its layers seen but one, and one of them given noughts alone."""
    seen = Calibration({"model": "shapes"})
    for name, entry in Checkpoint.open(SHAPES / "text_encoder").entries.items():
        if len(entry.shape) == 2 and "embedding" not in name and name != without:
            scale = 0.0 if name == nought else 0.5
            seen.see("text_encoder", name.removesuffix(".weight"), rows(scale=scale), rows())
    seen.save(folder / "seen.safetensors")
    recipe = parse("null:fp32,text_encoder=torch:w8a8")[0]
    return export("shapes", folder / "out", recipe, prove=False, calibration=folder / "seen.safetensors")


def test_layers_that_no_drawing_reached_are_told(tmp_path, capsys):
    missed = "text_model.encoder.layers.0.mlp.fc1.weight"
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = calibrated_text_encoder(tmp_path / "whole").manifest.parts["text_encoder"]
    cut = calibrated_text_encoder(tmp_path / "cut", missed).manifest.parts["text_encoder"]
    assert whole.uncalibrated == []
    assert cut.uncalibrated == [missed]
    elements = [math.prod(entry.shape) for entry in Checkpoint.open(SHAPES / "text_encoder").entries.values()]
    assert whole.stated_share - cut.stated_share == pytest.approx(128 * 512 / sum(elements), abs=2e-4)
    assert main(["inspect", str(tmp_path / "cut" / "out")]) == 0
    assert "1 with weights alone rounded: no drawing reached them" in capsys.readouterr().out
    (tmp_path / "nought").mkdir()
    nought = calibrated_text_encoder(tmp_path / "nought", nought=missed).manifest.parts["text_encoder"]
    assert nought.uncalibrated == [missed], "noughts say nothing of how large a step has to be"


def test_parts_of_one_module_reach_its_layers_together(tmp_path):
    entries = Checkpoint.open(SHAPES / "vae").entries
    seen = Calibration({"model": "shapes"})
    for name, entry in entries.items():
        if len(entry.shape) > 1:
            part = "vae_encoder" if name.startswith(("encoder.", "quant_conv.")) else "vae_decoder"
            sizes = (1, entry.shape[1], 4, 4) if len(entry.shape) == 4 else (2, entry.shape[1])
            axis = 1 if len(entry.shape) == 4 else -1
            made = torch.rand(1, entry.shape[0], 4, 4) if axis == 1 else torch.rand(2, entry.shape[0])
            seen.see(part, name.removesuffix(".weight"), torch.rand(sizes), made, axis)
    seen.save(tmp_path / "seen.safetensors")
    recipe = parse("null:fp32,vae_decoder=torch:w8a8")[0]
    made = export("shapes", tmp_path / "out", recipe, prove=False, calibration=tmp_path / "seen.safetensors")
    assert made.manifest.parts["vae_decoder"].uncalibrated == []
    assert made.manifest.parts["vae_decoder"].stated_share > 0.9


def test_torchs_own_codes_open_in_bakeoff_and_nowhere_else(tmp_path):
    calibrated_text_encoder(tmp_path)
    opened = read_folder(tmp_path / "out")
    part, folder = opened.family.part("text_encoder"), opened.folders["text_encoder"]
    eager = part.component.flat(part.component.load(SHAPES / "text_encoder", torch.float32))
    mixture, scales = plugins.mixture("w8a8"), scales_of(folder)
    mixture.round_module(eager, names_in(eager, Checkpoint.open(SHAPES / "text_encoder")), scales)
    inputs = part.component.example(opened.config("text_encoder"), Sizes(2, 8, 8, 12), seed=0)
    with open_part(folder, part, opened.parts[part.name], Placement(device="cpu")) as runtime:
        got = runtime.run(inputs)["last_hidden_state"]
    with torch.no_grad():
        expected = eager(inputs["input_ids"])[0]
    assert relative_error(got, expected) < 3e-2
    assert opened.parts["text_encoder"].stated_share > 0.85
    with pytest.raises(InputError, match="its weights are codes"):
        opened.shapes("text_encoder")
    with pytest.raises((ValueError, RuntimeError)):
        CLIPTextModel.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize(
    ("family", "part", "precision"),
    [
        ("pixart-sigma", "text_encoder", "nf4"),
        ("pixart-sigma", "transformer", "int4"),
        ("stable-diffusion", "text_encoder", "int8"),
        ("stable-diffusion", "unet", "w8a8"),
        ("stable-diffusion", "unet", "int8+codes=bakeoff"),
    ],
)
def test_what_torch_will_write_is_known_before(tiny, tmp_path, family, part, precision):
    """Tables of tokens have no codes in torch, though formats take them; nor has what isn't a layer's."""
    source, recipe = Source.open(str(tiny(family))), parse(f"torch:{precision}")[0].default
    checkpoint, mixture = source.checkpoint(part), plugins.mixture(recipe.precision)
    made = next(each.component for each in source.parts if each.module == part)
    shutil.copy(source.path(part) / "config.json", tmp_path)
    layout = layout_of(mixture, recipe.options)(mixture)
    layout.write(checkpoint, made.load(source.path(part), torch.float32), tmp_path)
    written = layout.weight_bytes(Checkpoint.open(tmp_path))
    exporter = plugins.exporter("torch")
    predicted = exporter.cost(checkpoint, mixture, options=recipe.options, operations=0, shared=False).weight_bytes
    assert predicted[layout.label] > 0
    for label in ("bfloat16", layout.label):
        assert predicted[label] == written[label], label


def test_codes_take_no_loras(baked, tmp_path):
    save_file(
        {
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 128),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": torch.ones(512, 2),
        },
        tmp_path / "some.safetensors",
    )
    with pytest.raises(InputError, match="weights are codes"):
        load(baked("torch:fp32,text_encoder=onnx:nf4"), loras=[str(tmp_path / "some.safetensors")])


@pytest.mark.parametrize("name", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
class TestBitsandbytes:
    def test_the_file_is_what_bitsandbytes_saves(self, baked, shapes, name):
        layers = pytest.importorskip("bitsandbytes.nn")
        folder = baked(f"torch:fp32,text_encoder=torch:{name}") / "text_encoder"
        written, wide = (load_file(at / "model.safetensors") for at in (folder, shapes / "text_encoder"))
        path = "text_model.encoder.layers.0.mlp.fc1"
        weight = wide[f"{path}.weight"].float()
        if name == "int8":
            theirs = layers.Linear8bitLt(*weight.T.shape, bias=False, has_fp16_weights=False)
            theirs.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            theirs = layers.Linear4bit(*weight.T.shape, bias=False, quant_type="nf4", compress_statistics=False)
            theirs.weight = layers.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
        saved = theirs.to("cpu").state_dict()
        ours = {key.removeprefix(f"{path}."): value for key, value in written.items() if key.startswith(f"{path}.")}
        ours.pop("bias")
        assert set(ours) == set(saved)
        for key in set(saved) - {"weight.quant_state.bitsandbytes__nf4"}:
            assert ours[key].shape == saved[key].shape, key
            assert ours[key].dtype == saved[key].dtype, key
            torch.testing.assert_close(
                ours[key].float(), saved[key].float(), rtol=1e-3, atol=1.0 if name == "int8" else 0
            )

    def test_transformers_opens_it(self, baked, name):
        pytest.importorskip("bitsandbytes")
        folder = baked(f"torch:fp32,text_encoder=torch:{name}")
        theirs = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.bfloat16)
        opened = read_folder(folder)
        part = opened.family.part("text_encoder")
        inputs = part.component.example(opened.config("text_encoder"), Sizes(2, 8, 8, 12), seed=0)
        with open_part(opened.folders[part.name], part, opened.parts[part.name], Placement(device="cpu")) as runtime:
            got = runtime.run(inputs)["last_hidden_state"]
        with torch.no_grad():
            expected = theirs(inputs["input_ids"]).last_hidden_state
        assert relative_error(got, expected.float()) < 1e-2

    def test_diffusers_opens_it_where_it_asks_for_no_gpu(self, baked, name, monkeypatch):
        """Diffusers refuses bitsandbytes on a CPU, which bitsandbytes has long had: its check is put aside, nothing else."""
        pytest.importorskip("bitsandbytes")
        from diffusers.quantizers.bitsandbytes import bnb_quantizer

        for made in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            monkeypatch.setattr(made, "validate_environment", lambda *_, **__: None)
            monkeypatch.setattr(made, "update_device_map", lambda _, device_map: device_map)
        opened = read_folder(baked(f"torch:fp32,unet=torch:{name}"))
        part, folder = opened.family.part("unet"), opened.folders["unet"]
        theirs = UNet2DConditionModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.bfloat16)
        inputs = part.component.example(opened.config("unet"), Sizes(2, 8, 8, 12), seed=0)
        with open_part(folder, part, opened.parts["unet"], Placement(device="cpu")) as runtime:
            got = next(iter(runtime.run(inputs).values()))
        with torch.no_grad():
            expected = theirs(*(each.bfloat16() if each.is_floating_point() else each for each in inputs.values()))[0]
        assert relative_error(got, expected.float()) < 3e-2

    @pytest.mark.slow
    def test_a_denoiser_is_proved_and_takes_no_loras(self, baked, name):
        pytest.importorskip("bitsandbytes")
        folder = baked(f"torch:fp32,unet=torch:{name}", proved=True)
        manifest = json.loads((folder / "bakeoff.json").read_text())
        assert manifest["proof"]["status"] == "proved"
        assert manifest["parts"]["unet"]["weight_bytes"][name] > 0
        assert "convolutions" in " ".join(manifest["parts"]["unet"]["kept"].values()) or name == "int8"
        with pytest.raises(InputError, match="its weights are codes"):
            read_folder(folder).shapes("unet")


CONFIGS = {
    "int4": lambda made: made.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=made.PerGroup(64), scale_dtype=torch.float32
    ),
    "w8a8-dynamic": lambda made: made.Int8DynamicActivationInt8WeightConfig(),
}


@pytest.mark.parametrize("name", CONFIGS)
class TestTorchAO:
    def test_the_folder_is_what_diffusers_saves(self, source, tmp_path, name):
        made = pytest.importorskip("torchao.quantization")
        lower(Mixed(), source, tmp_path, "torch", name)
        layers = load_diffusers(Layers, source, torch.bfloat16)
        made.quantize_(layers, CONFIGS[name](made))
        theirs, said = flatten(layers.state_dict())
        file = Checkpoint.open(tmp_path / "out").files[0]
        ours = load_file(file)
        assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
            key: (value.shape, value.dtype) for key, value in theirs.items()
        }
        with safe_open(file, "pt") as stream:
            assert {key: unordered(text) for key, text in stream.metadata().items() if key != "format"} == {
                key: unordered(text) for key, text in said.items()
            }
        settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert settings == json.loads(json.dumps(TorchAoConfig(CONFIGS[name](made)).to_dict()))
        if name == "w8a8-dynamic":  # int4's scales are searched for
            for key in theirs:
                torch.testing.assert_close(ours[key].float(), theirs[key].float(), rtol=1e-2, atol=1.0)

    def test_diffusers_and_transformers_open_it(self, tmp_path, name):
        pytest.importorskip("torchao")
        recipe = parse(f"null:fp32,unet=torch:{name},text_encoder=torch:{name}")[0]
        export("shapes", tmp_path / "out", recipe, prove=False)
        opened = read_folder(tmp_path / "out")
        for part_name, made in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
            part = opened.family.part(part_name)
            theirs = made.from_pretrained(opened.folders[part_name], local_files_only=True, torch_dtype=torch.bfloat16)
            inputs = part.component.example(opened.config(part_name), Sizes(2, 8, 8, 12), seed=0)
            with open_part(
                opened.folders[part_name], part, opened.parts[part_name], Placement(device="cpu")
            ) as runtime:
                got = next(iter(runtime.run(inputs).values()))
            fed = [value if made is CLIPTextModel else value.to(torch.bfloat16) for value in inputs.values()]
            with torch.no_grad():
                expected = theirs(*fed)[0]
            assert relative_error(got, expected.float()) < 3e-2, part_name

    @pytest.mark.slow
    def test_a_denoiser_is_proved_and_takes_no_loras(self, baked, name):
        pytest.importorskip("torchao")
        folder = baked(f"torch:fp32,unet=torch:{name},text_encoder=torch:{name}", proved=True)
        manifest = json.loads((folder / "bakeoff.json").read_text())
        assert manifest["proof"]["status"] == "proved"
        assert "convolutions" in " ".join(manifest["parts"]["unet"]["kept"].values()) or name != "int4"
        with pytest.raises(InputError, match="its weights are codes"):
            read_folder(folder).shapes("unet")


def flatten(tensors):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return flatten_tensor_state_dict(tensors)


def unordered(text):
    found = json.loads(text)
    if isinstance(found, list):
        return sorted(found)
    if "_tensor_data_names" in found:
        found["_tensor_data_names"].sort()
    return found


@pytest.mark.slow
def test_torchao_says_nothing_of_its_own(tmp_path):
    pytest.importorskip("torchao")
    code = "import bakeoff, sys; import diffusers.quantizers; assert 'torchao' in sys.modules"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout + found.stderr == ""


@pytest.mark.parametrize(("library", "name"), [("bitsandbytes", "nf4"), ("torchao", "int4")])
def test_without_the_library_the_error_says_what_to_install(source, tmp_path, monkeypatch, library, name):
    files, _ = lower(Mixed(), source, tmp_path, "torch", name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnavailableError, match=f"{library}, which is not installed"):
        plugins.runtime("torch")(files, Placement(device="cpu"))


def test_every_cell_is_there_or_has_a_reason():
    found = cells()
    assert len(found) == len(PRECISIONS) * len({cell.backend for cell in found})
    for cell in found:
        reasons = plugins.exporter(cell.backend).reasons
        assert cell.exported != (cell.precision in reasons), cell
        assert cell.exported or cell.reason == reasons[cell.precision]


def test_the_page_has_the_table_of_precisions():
    page = (Path(__file__).parent.parent / "docs" / "quantization.md").read_text()
    assert "\n".join(markdown(cells())) in page


def test_what_cant_be_baked_says_why(tmp_path):
    with pytest.raises(RecipeError, match="onnx can't bake fp8: ONNX's MatMul takes no 8-bit floats"):
        export("shapes", tmp_path / "out", parse("onnx:fp8")[0])


def test_what_isnt_installed_isnt_here(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    here = {cell.precision: cell for cell in cells() if cell.backend == "torch"}
    assert here["int8"].runs
    assert here["int4"].exported
    assert (here["int4"].runs, here["int4"].fix) == (False, "pip install 'bakeoff[torchao]'")


@pytest.mark.parametrize(
    ("machine", "flags", "overflows"),
    [
        ("x86_64", "avx2 fma", True),
        ("x86_64", "avx512f", True),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx512f avx512_vnni", False),
        ("AMD64", "", True),
        ("aarch64", "", False),
    ],
)
def test_which_processors_products_of_bytes_overflow(monkeypatch, machine, flags, overflows):
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: {"flags": flags})
    assert hardware.overflows_bytes() is overflows
