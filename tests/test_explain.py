"""Faults planted in real artifacts: where each is, and why, is found and named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeoff import causes, parity
from bakeoff.anatomy import Anatomy
from bakeoff.artifact import Artifact, describe_files
from bakeoff.bake import export
from bakeoff.causes import Evidence, find_cause
from bakeoff.errors import SourceError
from bakeoff.explain import NOWHERE, explain
from bakeoff.recipe import parse
from bakeoff.runtimes.runtime import Operation
from bakeoff.source import Source

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
CONVOLUTION = "decoder.up_blocks.1.resnets.0.conv1"


@pytest.fixture
def planted(baked, tmp_path):
    """Copy an artifact, let `edit` change a part's folder, and vouch for what it left."""

    def plant(folder, part, edit):
        copy = shutil.copytree(folder, tmp_path / "artifact")
        manifest = Artifact.open(copy).manifest
        edit(copy / part)
        artifact = Artifact(copy, replace(manifest, files=describe_files(copy)))
        artifact.write_manifest()
        return artifact

    return plant


@pytest.fixture(scope="module")
def decoders(shapes, tmp_path_factory):
    """The VAE's decoder alone, by a backend and a precision."""
    root = tmp_path_factory.mktemp("decoders")

    def bake(recipe, source=shapes):
        folder = root / recipe.replace(":", "-")
        if not folder.exists():
            export(str(source), folder, parse(f"null:fp32,vae_decoder={recipe}")[0])
        return folder

    return bake


def edit_onnx(change):
    """Return an edit of `model.onnx`; `change` gets the graph."""
    import onnx_ir

    def edit(folder):
        model = onnx_ir.load(folder / "model.onnx")
        change(model.graph)
        onnx_ir.save(model, folder / "model.onnx")

    return edit


def set_weight(name, change):
    """Return a change of the weight whose initializer's name ends so."""
    import onnx_ir

    def of_graph(graph):
        (value,) = [each for key, each in graph.initializers.items() if key.endswith(name)]
        value.const_value = onnx_ir.tensor(np.ascontiguousarray(change(value.const_value.numpy())), name=value.name)

    return of_graph


def edit_safetensors(name, change):
    def edit(folder):
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, file)

    return edit


def only(artifact, source="shapes"):
    (found,) = explain(artifact, Source.open(str(source)))
    assert found.departs
    assert found.fault
    return found


def node_of(graph, name):
    (node,) = [node for node in graph if node.name == name]
    return node


def conv_of(folder, layer):
    (name,) = json.loads((folder / "layers.json").read_text())[layer]
    return name


def test_a_wrong_scale_in_a_convolution(baked, planted):
    layer = "down_blocks.1.resnets.0.conv2"
    artifact = planted(baked("onnx:fp32"), "unet", edit_onnx(set_weight(f"{layer}.weight", lambda weight: weight * 2)))
    found = only(artifact)
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", layer, "Conv", causes.SCALE)
    assert found.figures["factor"] == pytest.approx(2, rel=1e-3)


def test_a_transposed_weight(baked, planted):
    layer = f"{ATTENTION}.to_q"
    artifact = planted(baked("onnx:fp32"), "unet", edit_onnx(set_weight(f"{layer}.weight", np.transpose)))
    found = only(artifact)
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", layer, "MatMul", causes.TRANSPOSED)


def test_saturated_attention(baked, planted):
    import onnx_ir

    def sharpen(graph):
        names = json.loads((baked("onnx:fp32") / "unet" / "layers.json").read_text())[ATTENTION]
        (softmax,) = [node for node in graph if node.name in names and node.op_type == "Softmax"]
        times = onnx_ir.Value(name="times", const_value=onnx_ir.tensor(np.float32(60), name="times"))
        graph.initializers["times"] = times
        more = onnx_ir.Node("", "Mul", [softmax.inputs[0], times], name="sharper")
        graph.insert_before(softmax, more)
        softmax.replace_input_with(0, more.outputs[0])

    found = only(planted(baked("onnx:fp32"), "unet", edit_onnx(sharpen)))
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", ATTENTION, "Softmax", causes.ATTENTION)
    assert found.figures["scores times"] == pytest.approx(60, rel=1e-3)
    assert found.figures["rows on one token"] > found.figures["rows on one token in eager"]


def test_an_overflow_in_float16(shapes, decoders, planted, tmp_path):
    """A norm takes a factor away again, so that eager never minds it."""
    import onnx_ir

    source = shutil.copytree(shapes, tmp_path / "model")
    for name in ("weight", "bias"):
        edit_safetensors(f"{CONVOLUTION}.{name}", lambda tensor: (tensor.float() * 3e6).to(tensor.dtype))(
            source / "vae"
        )

    def narrow(graph):
        node = node_of(graph, conv_of(folder / "vae_decoder", CONVOLUTION))
        for index, taken in enumerate(node.inputs):
            cast = onnx_ir.node("Cast", [taken], {"to": 10}, name=f"narrow{index}")
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        wide = onnx_ir.node("Cast", [node.outputs[0]], {"to": 1}, name="wide")
        graph.insert_after(node, wide)
        for user, index in list(node.outputs[0].uses()):
            if user is not wide:
                user.replace_input_with(index, wide.outputs[0])

    folder = tmp_path / "baked"
    export(str(source), folder, parse("null:fp32,vae_decoder=onnx:fp32")[0])
    found = only(planted(folder, "vae_decoder", edit_onnx(narrow)), source)
    assert (found.part, found.layer) == ("vae_decoder", CONVOLUTION)
    assert (found.operator, found.cause) == ("Conv", causes.OVERFLOW)
    assert found.figures["largest in eager"] > 65504


def test_a_wrong_scale_of_codes(decoders, planted):
    name = "decoder.up_blocks.1.resnets.0.conv2.weight.scales"
    found = only(planted(decoders("onnx:int8"), "vae_decoder", edit_safetensors(name, lambda scales: scales * 2)))
    assert (found.part, found.operator, found.cause) == ("vae_decoder", "Conv", causes.SCALE)
    assert found.layer == "decoder.up_blocks.1.resnets.0.conv2"
    assert found.figures["factor"] == pytest.approx(2, rel=0.05)


def test_a_wrong_scale_in_openvino(decoders, planted):
    def edit(folder):
        import openvino
        from openvino import opset13

        model = openvino.Core().read_model(folder / "openvino_model.xml")
        names = json.loads((folder / "layers.json").read_text())[CONVOLUTION]
        (node,) = [op for op in model.get_ordered_ops() if op.get_friendly_name() == names[0]]
        constant = node.input(1).get_source_output()
        node.input(1).replace_source_output(opset13.multiply(constant, np.float32(2)).output(0))
        openvino.save_model(model, folder / "twin.xml", compress_to_fp16=False)
        del model, node, constant
        for suffix in ("xml", "bin"):
            (folder / f"twin.{suffix}").replace(folder / f"openvino_model.{suffix}")

    found = only(planted(decoders("openvino:fp32"), "vae_decoder", edit))
    assert (found.part, found.layer) == ("vae_decoder", CONVOLUTION)
    assert (found.operator, found.cause) == ("Convolution", causes.SCALE)
    assert found.figures["factor"] == pytest.approx(2, rel=1e-3)


def test_a_changed_weight_in_torch(baked, planted):
    layer = "down_blocks.1.resnets.0.conv2"
    found = only(planted(baked("torch:fp32"), "unet", edit_safetensors(f"{layer}.weight", lambda weight: weight * 2)))
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", layer, "Conv2d", causes.SCALE)
