"""Faults planted in real artifacts: where each is, and why, is found and named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from bakeoff.artifact import INPUTS, Artifact, describe_files
from bakeoff.bake import export
from bakeoff.components.component import Sizes
from bakeoff.errors import ParityError
from bakeoff.parity import causes
from bakeoff.parity.anatomy import Anatomy
from bakeoff.parity.causes import find_cause
from bakeoff.parity.evidence import Evidence, Rounding
from bakeoff.parity.explain import NOWHERE, explain
from bakeoff.parity.proof import as_baked, scales_of
from bakeoff.parity.search import Search
from bakeoff.parity.traces import Eager
from bakeoff.quantize.calibration import Calibration
from bakeoff.recipe import Placement, parse
from bakeoff.runtimes.opening import open_part
from bakeoff.runtimes.runtime import Operation
from bakeoff.sources.source import Source
from bakeoff.tuning.calibrate import watch
from bakeoff.weights import Checkpoint, as_bytes, read_tensor

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
CONVOLUTION = "decoder.up_blocks.1.resnets.0.conv1"
SIZES = Sizes(2, 8, 16, 12)


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
    """Return an edit of a tensor in the file that holds it, where it lies."""

    def edit(folder):
        checkpoint = Checkpoint.open(folder)
        entry = checkpoint.entries[name]
        with entry.file.open("r+b") as stream:
            stream.seek(entry.offset)
            stream.write(as_bytes(change(read_tensor(entry)).contiguous()))

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
    artifact = planted(
        baked("onnx:fp32", proved=True), "unet", edit_onnx(set_weight(f"{layer}.weight", lambda weight: weight * 2))
    )
    found = only(artifact)
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", layer, "Conv", causes.SCALE)
    assert found.figures["factor"] == pytest.approx(2, rel=1e-3)


def test_a_shape_that_is_baked_into_the_graph(baked, planted):
    import onnx_ir

    def fix(graph):
        graph.inputs[0].shape = onnx_ir.Shape([2, 4, 8, 16])

    found = only(planted(baked("onnx:fp32", proved=True), "vae_decoder", edit_onnx(fix)))
    assert (found.part, found.layer, found.cause) == ("vae_decoder", None, causes.CANNOT_RUN)
    sizes = list(found.cases[found.case].sizes.values())
    assert sizes != [2, 4, 8, 16]
    assert found.figures["backend"].startswith(f"vae_decoder can't run at the shapes {{'latent_sample': {sizes}}}")


def test_a_transposed_weight(baked, planted):
    layer = f"{ATTENTION}.to_q"
    artifact = planted(baked("onnx:fp32", proved=True), "unet", edit_onnx(set_weight(f"{layer}.weight", np.transpose)))
    found = only(artifact)
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", layer, "MatMul", causes.TRANSPOSED)


def test_saturated_attention(baked, planted):
    import onnx_ir

    def sharpen(graph):
        names = json.loads((baked("onnx:fp32", proved=True) / "unet" / "layers.json").read_text())[ATTENTION]
        (softmax,) = [node for node in graph if node.name in names and node.op_type == "Softmax"]
        times = onnx_ir.Value(name="times", const_value=onnx_ir.tensor(np.float32(60), name="times"))
        graph.initializers["times"] = times
        more = onnx_ir.Node("", "Mul", [softmax.inputs[0], times], name="sharper")
        graph.insert_before(softmax, more)
        softmax.replace_input_with(0, more.outputs[0])

    found = only(planted(baked("onnx:fp32", proved=True), "unet", edit_onnx(sharpen)))
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", ATTENTION, "Softmax", causes.ATTENTION)
    assert found.figures["scores times"] == pytest.approx(60, rel=1e-3)
    assert found.figures["rows on one token"] > found.figures["rows on one token in eager"]


def times(node, index, factor, graph):
    """Multiply an input of a node."""
    import onnx_ir

    constant = onnx_ir.Value(name="times", const_value=onnx_ir.tensor(np.float32(factor), name="times"))
    graph.initializers["times"] = constant
    more = onnx_ir.Node("", "Mul", [node.inputs[index], constant], name="more")
    graph.insert_before(node, more)
    node.replace_input_with(index, more.outputs[0])


def test_a_wrong_product_of_attention(baked, planted):
    """Its shares are right: what multiplies values by them isn't."""
    second = []

    def widen(graph):
        names = json.loads((baked("onnx:fp32", proved=True) / "unet" / "layers.json").read_text())[ATTENTION]
        products = [node for node in graph if node.name in names and node.op_type == "MatMul"]
        assert len(products) == 2
        times(products[1], 1, 1.5, graph)
        second.append(products[1].name)

    found = only(planted(baked("onnx:fp32", proved=True), "unet", edit_onnx(widen)))
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", ATTENTION, "MatMul", causes.SCALE)
    assert found.operation == second[0]


def test_a_wrong_sum_between_layers(baked, planted):
    block = "mid_block.resnets.1"

    def double(graph):
        names = json.loads((baked("onnx:fp32", proved=True) / "unet" / "layers.json").read_text())[block]
        adds = [node for node in graph if node.name in names and node.op_type == "Add"]
        times(adds[-1], 0, 1.5, graph)

    found = only(planted(baked("onnx:fp32", proved=True), "unet", edit_onnx(double)))
    assert (found.part, found.layer, found.operator) == ("unet", block, "Add")


@pytest.mark.slow
def test_an_overflow_in_float16(shapes, decoders, planted, tmp_path):
    """A norm takes a factor away again, so that eager never minds it. ONNX Runtime drops casts that follow each other."""
    import onnx_ir

    source = shutil.copytree(shapes, tmp_path / "model")
    for name in ("weight", "bias"):
        edit_safetensors(f"{CONVOLUTION}.{name}", lambda tensor: (tensor.float() * 1e5).to(tensor.dtype))(
            source / "vae"
        )

    def narrow(graph):
        node = node_of(graph, conv_of(folder / "vae_decoder", CONVOLUTION))
        for index, taken in enumerate(node.inputs):
            cast = onnx_ir.node("Cast", [taken], {"to": 10}, name=f"narrow{index}")
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        node.outputs[0].dtype = onnx_ir.DataType.FLOAT16
        (reshape,) = [user for user, _ in node.outputs[0].uses() if user.op_type == "Reshape"]
        reshape.outputs[0].dtype = onnx_ir.DataType.FLOAT16
        wide = onnx_ir.node("Cast", [reshape.outputs[0]], {"to": 1}, name="wide")
        graph.insert_after(reshape, wide)
        for user, index in list(reshape.outputs[0].uses()):
            if user is not wide:
                user.replace_input_with(index, wide.outputs[0])

    folder = tmp_path / "baked"
    export(str(source), folder, parse("null:fp32,vae_decoder=onnx:fp32")[0])
    found = only(planted(folder, "vae_decoder", edit_onnx(narrow)), source)
    assert (found.part, found.layer) == ("vae_decoder", CONVOLUTION)
    assert (found.operator, found.cause) == ("Conv", causes.OVERFLOW)
    assert found.figures["largest in eager"] > 65504


@pytest.mark.slow
def test_an_overflow_between_layers_in_torch(shapes, tmp_path):
    """Two sides of a residual fit into float16, and their sum doesn't."""
    source = shutil.copytree(shapes, tmp_path / "model")
    block = "decoder.mid_block.resnets.0"
    for name in ("decoder.conv_in", f"{block}.conv2"):
        edit_safetensors(f"{name}.bias", lambda tensor: tensor.index_fill(0, torch.tensor([0]), 4e4))(source / "vae")
    folder = tmp_path / "baked"
    export(str(source), folder, parse("null:fp32,vae_decoder=torch:fp16")[0], prove=False)
    found = only(Artifact.open(folder), source)
    assert (found.part, found.layer) == ("vae_decoder", block)
    assert (found.operator, found.cause) == ("Add", causes.OVERFLOW)
    assert found.figures["largest in eager"] > 65504


@pytest.mark.slow
def test_a_wrong_scale_of_codes(decoders, planted):
    name = "decoder.up_blocks.1.resnets.0.conv2.weight.scales"
    found = only(planted(decoders("onnx:int8"), "vae_decoder", edit_safetensors(name, lambda scales: scales * 2)))
    assert (found.part, found.operator, found.cause) == ("vae_decoder", "Conv", causes.SCALE)
    assert found.layer == "decoder.up_blocks.1.resnets.0.conv2"
    assert found.figures["factor"] == pytest.approx(2, rel=0.05)


@pytest.mark.slow
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
    found = only(
        planted(
            baked("torch:fp32", proved=True), "unet", edit_safetensors(f"{layer}.weight", lambda weight: weight * 2)
        )
    )
    assert (found.part, found.layer, found.operator, found.cause) == ("unet", layer, "Conv2d", causes.SCALE)


@pytest.mark.slow
def test_what_the_recipe_asks_for_is_no_fault(decoders):
    (found,) = explain(Artifact.open(decoders("onnx:int8")), Source.open("shapes"))
    assert not found.departs
    assert not found.fault
    assert found.cause == causes.ROUNDED


@pytest.mark.slow
def test_an_exact_artifact_has_no_fault(decoders):
    (found,) = explain(Artifact.open(decoders("onnx:fp32")), Source.open("shapes"))
    assert (found.departs, found.fault, found.cause) == (False, False, NOWHERE)


def failing(artifact, **changes):
    """Let an artifact's manifest say that its proof failed."""
    told = json.loads(json.dumps(artifact.manifest.proof))
    for path, problem in changes.items():
        (told["trajectory"] if path == "trajectory" else told["parts"][path])["problem"] = problem
    return artifact.with_proof({**told, "status": "failing", "reason": "; ".join(changes.values())})


def test_a_part_whose_interval_alone_fails_is_the_one_that_is_looked_into(copied):
    """Each of its cases is within tolerance, and another part is nearer to its own."""
    artifact, source = Artifact.open(copied("torch:fp32", proved=True)), Source.open("shapes")
    (nearest,) = explain(artifact, source)
    part = next(name for name in artifact.manifest.parts if name != nearest.part)
    (found,) = explain(failing(artifact, **{part: "its rows' interval is beyond its tolerance"}), source)
    assert (found.part, found.refused, found.departs) == (part, True, True)
    assert found.error <= found.tolerance


def test_where_pictures_alone_fail_that_is_said(copied, run_cli):
    artifact = failing(Artifact.open(copied("torch:fp32", proved=True)), trajectory="gate fp32: worst PSNR 40 dB")
    finished = run_cli("verify", artifact.folder, "--explain", "--source", "shapes")
    assert finished.returncode == ParityError.exit_code
    assert "pictures: gate fp32: worst PSNR 40 dB" in finished.stdout


def test_another_model_and_none_are_refused(baked, run_cli, tiny):
    folder = baked("torch:fp32", proved=True)
    finished = run_cli("verify", folder, "--explain")
    assert finished.returncode == 2
    assert "add --source" in finished.stderr
    finished = run_cli("verify", folder, "--explain", "--source", tiny("stable-diffusion"))
    assert finished.returncode == 3
    assert "is not what" in finished.stderr


def test_the_command_names_it(baked, planted, run_cli):
    layer = "encoder.conv_in"
    artifact = planted(
        baked("torch:fp32", proved=True), "vae_encoder", edit_safetensors(f"{layer}.bias", lambda bias: bias + 3)
    )
    finished = run_cli("verify", artifact.folder, "--explain", "--source", "shapes", "--json")
    assert finished.returncode == 7, finished.stderr
    (found,) = json.loads(finished.stdout)["parts"]
    assert (found["part"], found["layer"], found["cause"]) == ("vae_encoder", layer, causes.OFFSET)
    assert found["figures"]["largest difference"] == pytest.approx(3, rel=1e-3)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """One part alone, calibrated on made-up inputs: `calibrated("vae_decoder", "onnx:w8a8")` is the artifact's folder."""
    source, root = Source.open("shapes"), tmp_path_factory.mktemp("calibrated")

    def bake(name, recipe):
        folder = root / recipe.replace(":", "-")
        if folder.exists():
            return folder
        part, seen = source.family.part(name), Calibration({"model": "shapes"})
        flat = part.component.flat(part.component.load(source.path(part.module), torch.float32))
        watch(seen, name, flat)
        for seed in range(3):
            with torch.no_grad():
                flat(*part.component.example(source.config(part.module), SIZES, seed).values())
        seen.save(root / "calibration.safetensors")
        recipes = parse(f"null:fp32,{name}={recipe}")[0]
        export("shapes", folder, recipes, prove=False, calibration=root / "calibration.safetensors")
        return folder

    return bake


def search(folder, name, check):
    """Return what `check` finds in a search of one part that may err by a fiftieth."""
    artifact, source = Artifact.open(folder), Source.open("shapes")
    part, entry = source.family.part(name), artifact.manifest.parts[name]
    inputs = part.component.example(source.config(part.module), SIZES, 2)
    mixture, scales = as_baked(entry, folder / name), scales_of(folder / name)
    with open_part(folder / name, part, entry, Placement(device="cpu"), vouched=artifact.vouched(name)) as runtime:
        return check(Search(runtime, Eager(part, source), inputs, 0.02, mixture, scales))


def own_errors(found):
    """Return layer -> the error that it makes by itself, of those that became codes."""
    errors = {view.name: found._own_error(view) for view in found._views(found._order)}
    return {name: error for name, (error, _, rounded) in errors.items() if rounded is not None}


@pytest.mark.slow
def test_layers_are_compared_with_ones_that_are_rounded_as_they_are(calibrated):
    """By what they are given, their biases corrected: rounded by their weights alone they'd differ by some percent."""
    folder = calibrated("text_encoder", "onnx:int4")
    assert (folder / "text_encoder" / INPUTS).is_file()
    errors = search(folder, "text_encoder", own_errors)
    assert len(errors) == 20
    assert max(errors.values()) < 1e-3


@pytest.mark.slow
class TestRoundedActivations:
    """The decoder in w8a8, whose activations come of SiLU: many lie at its least value, the end of the grid."""

    LAYER = "decoder.up_blocks.1.resnets.0.conv2"

    def test_sound_ones_are_no_fault(self, calibrated):
        folder = calibrated("vae_decoder", "onnx:w8a8")
        assert max(search(folder, "vae_decoder", own_errors).values()) < 1e-3

        def check(found):
            return found.first(), found.largest.cause.name

        assert search(folder, "vae_decoder", check) == (None, causes.ROUNDED)

    def test_a_wrong_scale_among_them(self, calibrated, planted):
        edit = edit_safetensors(f"{self.LAYER}.weight.scales", lambda scales: scales * 2)
        artifact = planted(calibrated("vae_decoder", "onnx:w8a8"), "vae_decoder", edit)
        found = search(artifact.folder, "vae_decoder", lambda found: found.first())
        assert (found.layer, found.cause.name) == (self.LAYER, causes.SCALE)
        assert found.cause.figures["factor"] == pytest.approx(2, rel=0.05)

    def test_a_grid_that_is_too_narrow(self, calibrated, planted):
        folder = calibrated("vae_decoder", "onnx:w8a8")

        def narrow(graph):
            node = node_of(graph, conv_of(folder / "vae_decoder", self.LAYER))
            steps = node.inputs[0].producer().inputs[1]
            steps.const_value = onnx_ir.tensor(steps.const_value.numpy() / 8, name=steps.name)

        def edit(part):
            edit_onnx(narrow)(part)
            edit_safetensors(f"{self.LAYER}.weight.scales", lambda scales: scales / 8)(part)

        import onnx_ir

        artifact = planted(folder, "vae_decoder", edit)
        found = search(artifact.folder, "vae_decoder", lambda found: found.first())
        assert (found.layer, found.cause.name) == (self.LAYER, causes.SATURATED)
        assert found.cause.figures["beyond the range"] > 0.01


class TestCauses:
    """Causes that the embedded model, whose recipes are sound, gives no occasion for."""

    def evidence(self, module, given, made, kind="Conv"):
        with torch.no_grad():
            expected = module(given)
        operation = Operation("node", kind, ("x",), ("y",), "layer")
        return Evidence(made, expected, [(operation, made)], module=module, given=given)

    def test_a_norm_of_a_small_deviation_in_half_precision(self):
        cause = self.in_bfloat16(torch.nn.LayerNorm(64), mean=300)
        assert cause.name == causes.NORM
        assert cause.figures["mean over deviation"] > 100

    @pytest.mark.parametrize("norm", [torch.nn.LayerNorm(64), torch.nn.RMSNorm(64), torch.nn.GroupNorm(8, 64)])
    def test_a_norm_that_errs_as_bfloat16_does_is_no_fault(self, norm):
        assert self.in_bfloat16(norm, mean=0).name == causes.LOW_PRECISION

    def test_rounding_between_layers_is_no_fault_in_half_precision(self):
        expected = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        inner = [(Operation(name, "Mul", ("x",), ("y",), "block"), expected.bfloat16()) for name in "abcd"]
        assert find_cause(Evidence(expected.bfloat16().float(), expected, inner)).name == causes.LOW_PRECISION
        noise = 0.05 * torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
        assert find_cause(Evidence(expected + noise, expected, inner)).name == causes.UNKNOWN
        wide = [(operation, tensor.float()) for operation, tensor in inner]
        assert find_cause(Evidence(expected.bfloat16().float(), expected, wide)).name == causes.UNKNOWN

    def in_bfloat16(self, norm, mean):
        given = mean + torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = norm.bfloat16()(given.bfloat16()).float()
        return find_cause(self.evidence(norm.float(), given, made, "LayerNormalization"))

    def rounded(self, kind, step, times=1.0):
        """Return the evidence of a convolution behind SiLU, whose input is rounded to unsigned bytes of a step a channel."""
        layer = torch.nn.Conv2d(8, 8, 3, padding=1)
        given = torch.nn.functional.silu(torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
        given[:, :, :4] = given.min()  # at the end of the grid, not beyond
        steps = (given.amax((0, 2, 3)) - given.amin()) / 255 * step
        zeros = (-given.min() / steps).round().clamp(0, 255)
        codes = ((given / steps[:, None, None]).round() + zeros[:, None, None]).clamp(0, 255)
        low, high = (-zeros * steps)[:, None, None], ((255 - zeros) * steps)[:, None, None]
        with torch.no_grad():
            rounded = layer((codes - zeros[:, None, None]) * steps[:, None, None])
        operation = Operation("node.taken", kind, ("x", "scale", "zero"), ("codes",), "layer")
        taken = (given, low, high) if kind == "FakeQuantize" else (given, steps, zeros.to(torch.uint8))
        found = Rounding.of(operation, taken, codes.to(torch.uint8))
        torch.testing.assert_close((found.low + 0 * given, found.high + 0 * given), (low + 0 * given, high + 0 * given))
        return replace(self.evidence(layer, given, rounded * times), roundings=[found], rounded=rounded)

    @pytest.mark.parametrize("kind", ["FakeQuantize", "QuantizeLinear"])
    def test_activations_that_a_scale_clips(self, kind):
        cause = find_cause(self.rounded(kind, 1 / 8))
        assert (cause.name, cause.operation.kind) == (causes.SATURATED, kind)
        assert cause.figures["beyond the range"] > 0.1

    @pytest.mark.parametrize("kind", ["FakeQuantize", "QuantizeLinear"])
    def test_activations_at_the_end_of_their_range_are_not_clipped(self, kind):
        assert find_cause(self.rounded(kind, 1.05)).name == causes.ROUNDED
        assert find_cause(self.rounded(kind, 1.05, times=2)).name == causes.SCALE

    def test_clipping_that_explains_nothing_is_not_blamed(self):
        assert find_cause(self.rounded("QuantizeLinear", 1 / 1.5, times=2)).name != causes.SATURATED

    def test_outputs_that_are_clipped(self):
        layer = torch.nn.Linear(64, 64)
        given = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = layer(given)
        operation = Operation("node.rounded", "QuantizeLinear", ("y", "scale", "zero"), ("codes",), "layer")
        found = Rounding(operation, expected, torch.tensor(-0.3), torch.tensor(0.3))
        evidence = replace(self.evidence(layer, given, expected.clamp(-0.3, 0.3)), roundings=[found])
        assert find_cause(evidence).name == causes.SATURATED

    def test_a_scale_of_some_channels(self):
        layer = torch.nn.Conv2d(4, 8, 3)
        given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = layer(given)
            made[:, 3] = (made[:, 3] - layer.bias[3]) * 4 + layer.bias[3]
        cause = find_cause(self.evidence(layer, given, made))
        assert cause.name == causes.SCALE
        assert cause.figures["channels"] == "1 of 8"
        assert cause.figures["factor, most"] == pytest.approx(4, rel=1e-4)

    def test_a_scale_in_a_convolution_of_films(self):
        layer = torch.nn.Conv3d(4, 8, 3)
        given = torch.randn(1, 4, 4, 8, 9, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = (layer(given) - layer.bias[:, None, None, None]) * 2 + layer.bias[:, None, None, None]
        cause = find_cause(self.evidence(layer, given, made))
        assert cause.name == causes.SCALE
        assert cause.figures["factor"] == pytest.approx(2, rel=1e-4)

    def test_noise_is_not_recognised(self):
        layer = torch.nn.Linear(64, 64)
        given = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made = layer(given) + torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        assert find_cause(self.evidence(layer, given, made)).name == causes.UNKNOWN

    def test_infinity_in_float32_is_no_overflow_of_float16(self):
        layer = torch.nn.Linear(64, 64)
        made = torch.full((32, 64), torch.inf)
        assert find_cause(self.evidence(layer, torch.ones(32, 64), made)).name == causes.NOT_FINITE


def test_an_anatomy_goes_back_to_what_is_known():
    operations = [
        Operation("a", "Conv", ("x", "w"), ("a",), "first"),
        Operation("c", "Cast", ("w",), ("wide",), None),
        Operation("b", "Mul", ("a", "wide"), ("b",), None),
        Operation("q", "QuantizeLinear", ("b", "s"), ("codes",), None),
        Operation("d", "MatMulIntegerToFloat", ("codes", "v"), ("d",), "second"),
    ]
    anatomy = Anatomy(operations, ["x"])
    assert anatomy.given("first") == ["x"]
    assert anatomy.given("second") == ["b"]
    assert [op.name for op in anatomy.roundings("second")] == ["q"]
    between, begins = anatomy.between("b", {"a"})
    assert [op.name for op in between] == ["b"]
    assert begins == {"a"}
