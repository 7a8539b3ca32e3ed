"""`onnx:fp16+compute=half`: a graph that computes in float16, and says so."""

import onnx
import pytest
from safetensors import safe_open

from bakeoff.bake import export
from bakeoff.errors import RecipeError
from bakeoff.parity.prover import prove_in_place
from bakeoff.recipe import parse
from bakeoff.runtimes import onnx_graph, onnxruntime, providers
from bakeoff.runtimes.engine import load
from bakeoff.sources.source import Source
from bakeoff.weights import Checkpoint

LARGE_BYTES = 4096
"""Smaller tensors are folded into what the graph computes with."""


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    recipe = parse("torch:fp32,unet=onnx:fp16+compute=half")[0]
    return export(str(tiny("stable-diffusion")), tmp_path_factory.mktemp("half") / "out", recipe, prove=False)


def test_products_are_of_float16_and_said_to_be_on_a_gpu(half):
    graph = onnx.load(half.folder / "unet" / "model.onnx", load_external_data=False).graph
    found = onnx_graph.halves(graph)
    products = [node for node in graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}]
    narrow = [node for node in products if node.output[0] in found]
    assert len(narrow) > 0.9 * len(products)
    told = {name: onnxruntime._precisions(graph, name) for name in ("CUDAExecutionProvider", providers.CPU)}
    assert told["CUDAExecutionProvider"]["float16"] == len(narrow)
    assert told[providers.CPU] == {"float32": len(products)}
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
def test_it_is_proved_on_a_cpu_which_widens_it(half, tiny):
    artifact = prove_in_place(half, Source.open(str(tiny("stable-diffusion"))))
    assert artifact.manifest.proved
    assert min(case["sqnr_db"] for case in artifact.manifest.proof["parts"]["unet"]["cases"]) > 50
    with load(half.folder, device="cpu") as engine:
        engine.generate("a cat", seeds=1, steps=1, size=(32, 32))
        assert engine.configuration["unet"]["precision"].keys() == {"float32"}


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_other_precisions_have_no_half(tiny, tmp_path, precision):
    recipe = parse(f"null:fp32,unet=onnx:{precision}+compute=half")[0]
    with pytest.raises(RecipeError, match="compute=half is for fp16") as raised:
        export(str(tiny("stable-diffusion")), tmp_path / "out", recipe, prove=False)
    assert "onnx:fp16+compute=half" in raised.value.fix
    assert not (tmp_path / "out").exists()
