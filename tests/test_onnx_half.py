"""`onnx:fp16+compute=half`: a graph that computes in float16, and says so."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnxruntime import InferenceSession
from safetensors import safe_open

from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.errors import RecipeError
from bakeoff.parity.prover import prove_in_place
from bakeoff.recipe import parse
from bakeoff.runtimes import onnx_half, onnxruntime, providers
from bakeoff.runtimes.engine import load
from bakeoff.sources.source import Source
from bakeoff.weights import Checkpoint, read_header

LARGE_BYTES = 4096
"""Smaller tensors are folded into what the graph computes with."""


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    recipe = parse("torch:fp32,unet=onnx:fp16+compute=half")[0]
    return export(str(tiny("stable-diffusion")), tmp_path_factory.mktemp("half") / "out", recipe, prove=False)


def test_products_are_of_float16_and_said_to_be_on_a_gpu(half):
    graph = onnx.load(half.folder / "unet" / "model.onnx", load_external_data=False).graph
    found = onnx_half.rounds(graph, {"Conv"})
    products = [node for node in graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}]
    narrow = [node for node in products if node.output[0] in found]
    assert len(narrow) > 0.9 * len(products)
    assert onnxruntime._precisions(graph, found)["float16"] == len(narrow)
    assert onnxruntime._precisions(graph, set()) == {"float32": len(products)}
    assert all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in graph.output)


def test_weights_are_the_checkpoints_under_its_names(half, tiny):
    checkpoint = Checkpoint.open(tiny("stable-diffusion") / "unet").entries
    with safe_open(half.folder / "unet" / "model.safetensors", "pt") as stream:
        own = {name: stream.get_tensor(name) for name in stream.keys() if name in checkpoint}  # noqa: SIM118
    assert own.keys() >= {name for name, entry in checkpoint.items() if entry.length >= LARGE_BYTES}
    assert {str(tensor.dtype) for tensor in own.values()} == {"torch.float16"}
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == {name: checkpoint[name].shape for name in own}
    assert half.manifest.parts["unet"].weight_bytes == {"float16": sum(2 * tensor.numel() for tensor in own.values())}


@pytest.mark.slow
def test_it_is_proved_on_a_cpu_which_imitates_it(half, tiny):
    artifact = prove_in_place(half, Source.open(str(tiny("stable-diffusion"))))
    assert artifact.manifest.proved
    assert min(case["sqnr_db"] for case in artifact.manifest.proof["parts"]["unet"]["cases"]) > 50
    with load(half.folder, device="cpu") as engine:
        engine.generate("a cat", seeds=1, steps=1, size=(32, 32))
        told = engine.configuration["unet"]
        assert told["precision"].keys() == {"float32"}
        assert told["fallback"] == "float16 is imitated in float32 on cpu"


def graph(nodes, constants):
    """A model that takes `x (1, n)` in float32, and computes in float16."""
    node, half, single = onnx.helper.make_node, TensorProto.FLOAT16, TensorProto.FLOAT
    nodes = [node("Cast", ["x"], ["h"], to=half), *nodes, node("Cast", ["y"], ["out"], to=single)]
    ends = [onnx.helper.make_tensor_value_info(name, single, ["rows", "columns"]) for name in ("x", "out")]
    made = onnx.helper.make_graph(
        nodes,
        "half",
        ends[:1],
        ends[1:],
        [onnx.numpy_helper.from_array(np.float16(value), name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def imitate(model):
    onnx_half.imitate(model, onnx_half.rounds(model.graph, {"Mul", "Softmax"}))


def ran(model, values):
    session = InferenceSession(model.SerializeToString(), providers=[providers.CPU])
    return session.run(None, {"x": np.asarray([values], dtype=np.float32)})[0][0]


def test_a_cpu_rounds_and_overflows_as_float16_does():
    """By itself ONNX Runtime's CPU provider does neither: it keeps float32 between operations."""
    node = onnx.helper.make_node
    model = graph(
        [node("Mul", ["h", "much"], ["big"]), node("Mul", ["big", "little"], ["y"])], {"much": 3.0, "little": 0.1}
    )
    values = np.random.default_rng(0).uniform(-60000, 60000, 4096).astype(np.float32)
    values[:5] = [0, 21840, 21839, -30000, np.inf]
    with np.errstate(over="ignore"):
        expected = (values.astype(np.float16) * np.float16(3) * np.float16(0.1)).astype(np.float32)
    assert np.isinf(expected).sum() > 1000
    assert not np.array_equal(ran(model, values), expected)
    imitate(model)
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(ran(model, values), expected)


def test_a_sigmoid_times_its_own_is_rounded_once():
    node = onnx.helper.make_node
    values = np.random.default_rng(0).uniform(-8, 8, 4096).astype(np.float16).astype(np.float32)
    exact = values.astype(np.float64) / (1 + np.exp(-values.astype(np.float64)))
    once, twice = ([node("Sigmoid", ["h"], ["s"]), node("Mul", [by, "s"], ["y"])] for by in ("h", "again"))
    again = [node("Identity", ["h"], ["again"])]
    shares = []
    for nodes in (once, [*again, *twice]):
        model = graph(nodes, {})
        imitate(model)
        shares.append(np.mean(ran(model, values) != exact.astype(np.float16)))
    assert shares[0] < 0.01  # but for ties that float32 decides
    assert shares[1] > 0.1


def test_other_graphs_stay_as_they_are():
    """Those whose weights alone are of float16, and those of other tools, which take and give it."""
    node = onnx.helper.make_node
    model = graph([node("Mul", ["h", "one"], ["y"])], {"one": 1.0})
    assert onnx_half.rounds(model.graph, {"Mul"}) == {"h", "y"}
    assert not onnx_half.rounds(model.graph, {"MatMul"})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert not onnx_half.rounds(model.graph, {"Mul"})


def test_masks_stay_infinite():
    node = onnx.helper.make_node
    model = graph(
        [node("Add", ["h", "mask"], ["masked"]), node("Softmax", ["masked"], ["y"])], {"mask": [0.0, -np.inf, 0.0]}
    )
    imitate(model)
    assert np.allclose(ran(model, [1.0, 2.0, 1.0]), [0.5, 0, 0.5])


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_other_precisions_have_no_half(tiny, tmp_path, precision):
    recipe = parse(f"null:fp32,unet=onnx:{precision}+compute=half")[0]
    with pytest.raises(RecipeError, match="compute=half is for fp16") as raised:
        export(str(tiny("stable-diffusion")), tmp_path / "out", recipe, prove=False)
    assert "onnx:fp16+compute=half" in raised.value.fix
    assert not (tmp_path / "out").exists()


def test_a_wide_layers_weight_is_stored_wide(tmp_path):
    """Its weight is transposed first, which alone would be done in float16."""
    recipe = parse("null:fp32,unet=onnx:fp16+compute=half")[0]
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    unet = replace(recipe.parts["unet"], layers={layer: "fp32"})
    made = export("shapes", tmp_path / "out", replace(recipe, parts={**recipe.parts, "unet": unet}), prove=False)
    dtypes = {
        entry.name: entry.dtype for file in (made.folder / "unet").glob("*.safetensors") for entry in read_header(file)
    }
    shape = Source.open("shapes").checkpoint("unet").entries[f"{layer}.weight"].shape
    assert made.manifest.parts["unet"].weight_bytes["float32"] >= 4 * shape[0] * shape[1]
    assert {name for name, dtype in dtypes.items() if dtype == "F32" and name.endswith(f"{layer}.weight")}


def test_a_wide_norm_computes_wide(tmp_path):
    recipe, layer = parse("null:fp32,unet=onnx:fp16+compute=half")[0], "mid_block.resnets.0.norm2"
    unet = replace(recipe.parts["unet"], layers={layer: "fp32"})
    made = export("shapes", tmp_path / "out", replace(recipe, parts={**recipe.parts, "unet": unet}), prove=False)
    graph = onnx.load(made.folder / "unet" / "model.onnx", load_external_data=False).graph
    dtypes = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    named = json.loads((made.folder / "unet" / "layers.json").read_text())[layer]
    computed = [
        node for node in graph.node if node.name in named and node.op_type in {"InstanceNormalization", "Mul", "Add"}
    ]
    assert {dtypes[node.output[0]] for node in computed} == {TensorProto.FLOAT}
    others = [node for node in graph.node if node.op_type == "InstanceNormalization" and node.name not in named]
    assert {dtypes[node.output[0]] for node in others} == {TensorProto.FLOAT16}


def test_a_wide_table_that_goes_by_another_name_is_wide(tiny, tmp_path):
    """T5's encoder takes the table that its checkpoint calls `shared`."""
    recipe = parse("null:fp32,text_encoder_2=onnx:fp16+compute=half")[0]
    part = replace(recipe.parts["text_encoder_2"], layers={"shared": "fp32"})
    parts = {**recipe.parts, "text_encoder_2": part}
    made = export(str(tiny("flux")), tmp_path / "out", replace(recipe, parts=parts), prove=False)
    dtypes = {entry.name: entry.dtype for entry in read_header(made.folder / "text_encoder_2" / "model.safetensors")}
    assert dtypes["shared.weight"] == "F32"


def test_layers_of_other_precisions_are_refused(tmp_path):
    """They would be baked as float16, whatever the recipe says."""
    recipe = parse("null:fp32,unet=onnx:fp16+compute=half")[0]
    unet = replace(recipe.parts["unet"], layers={"down_blocks.1.resnets.0.conv2": "int8"})
    with pytest.raises(RecipeError, match="in fp16 or fp32, the recipe has int8"):
        export("shapes", tmp_path / "out", replace(recipe, parts={**recipe.parts, "unet": unet}), prove=False)


def test_inspect_says_what_it_computes_in(half, capsys):
    assert main(["inspect", str(half.folder)]) == 0
    assert "onnx:fp16+compute=half" in capsys.readouterr().out
