"""Calibrated rounding: steps for single channels, weights rounded for what layers are given, corrected biases."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bakeoff import plugins
from bakeoff.bake import activations
from bakeoff.errors import CorruptError, InputError, RecipeError
from bakeoff.parity.distance import relative_error
from bakeoff.plan import plan
from bakeoff.quantize.calibration import METHODS, Calibration
from bakeoff.quantize.channels import Channels
from bakeoff.quantize.grid import LEAST, MOST, Grid, grids_from_json, grids_to_json
from bakeoff.quantize.inputs import corrected, read_inputs, with_inputs, write_inputs
from bakeoff.recipe import PartRecipe, parse
from bakeoff.weights import Checkpoint, read_tensor


def uneven(count=4, channels=16, seed=0):
    """Return activations of a SiLU whose channels differ by up to a hundred times."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, channels)[None, :, None, None]
    return nn.functional.silu(torch.randn(count, channels, 8, 8, generator=generator) * sizes)


def calibration(module, values):
    """Return a calibration of a module whose layers are all given these values, (B, C, …)."""
    found = Calibration({"model": "made up"})
    for path, layer in module.named_modules():
        if hasattr(layer, "weight"):
            axis = 1 if isinstance(layer, nn.Conv2d) else -1
            given = values if axis == 1 else values.movedim(1, -1)
            found.see("unet", path, given, layer(given), axis)
    return found


@pytest.fixture
def layers(tmp_path):
    """A folder with a convolution, a grouped one and a matrix, all with biases; and the module."""
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {"take": nn.Conv2d(64, 64, 3, padding=1), "few": nn.Conv2d(64, 64, 3, groups=2), "matrix": nn.Linear(64, 128)}
    )
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    return tmp_path, module


def shapes_of(module):
    return {path: layer.weight.shape for path, layer in module.named_modules() if hasattr(layer, "weight")}


class TestChannels:
    def test_what_was_seen_is_within_half_a_step(self):
        values, seen = uneven(), Channels()
        seen.see(values, 1)
        for grid, own in ((seen.given(), False), (seen.made(), True)):
            assert len(grid.steps) == 16
            assert len(grid.zeros) == (16 if own else 1)
            steps = torch.tensor(grid.steps)[None, :, None, None]
            assert ((grid.round(values, 1) - values).abs() <= steps * (1.01 if own else 0.51)).all()
        assert seen.given().round(torch.zeros(1, 16, 1, 1), 1).abs().sum() == 0  # so that padding is what it was

    @pytest.mark.parametrize("values", [torch.zeros(2, 3, 4, 4), torch.rand(2, 3, 4, 4), -torch.rand(2, 3, 4, 4) - 1])
    def test_channels_on_one_side_of_nought(self, values):
        seen = Channels()
        seen.see(values, 1)
        for grid in (seen.given(), seen.made()):
            assert all(step > 0 for step in grid.steps)
            assert all(LEAST <= zero <= MOST for zero in grid.zeros)
            assert (grid.round(values, 1) - values).abs().max() <= 1.01 * max(grid.steps)

    def test_batches_count_as_one(self):
        values, one, other = uneven(), Channels(), Channels()
        one.see(values, 1)
        for batch in values:
            other.see(batch[None], 1)
        assert torch.allclose(one.as_tensor(), other.as_tensor())
        assert torch.allclose(one.mean, values.double().mean((0, 2, 3)))
        assert torch.allclose(Channels.read(one.as_tensor()).mean_square, values.square().mean((0, 2, 3)).double())

    def test_they_lose_less_than_one_step_for_all(self):
        torch.manual_seed(0)
        layer, values = nn.Conv2d(16, 64, 3, padding=1), uneven()
        found = calibration(nn.ModuleDict({"take": layer}), values)
        errors = {}
        for method in METHODS:
            grids = found.grids("unet", {"take": layer.weight.shape}, method)
            module = nn.ModuleDict({"take": nn.Conv2d(16, 64, 3, padding=1)})
            module.load_state_dict({f"take.{name}": value for name, value in layer.state_dict().items()})
            with torch.no_grad():
                made = plugins.mixture("w8a8").round_module(module, {}, grids)["take"](values)
                errors[method] = relative_error(made, layer(values))
        assert errors["channels"] < 0.6 * min(errors[method] for method in METHODS if method != "channels")
        assert errors["channels"] < 1.5e-2


class TestGrid:
    def test_it_comes_back_from_a_file(self):
        grids = Grid((0.1, 0.2), (3,)), Grid((0.5,))
        assert grids_from_json(grids_to_json(grids)) == grids
        assert grids_from_json(grids_to_json((grids[0], None))) == (grids[0], None)
        assert grids_from_json([0.25, 0.5]) == (Grid((0.25,)), Grid((0.5,)))  # as artifacts of version 0.1 have it
        with pytest.raises(CorruptError, match="expected steps and zeros"):
            grids_from_json([{"steps": 3}, None])

    def test_a_grouped_convolution_has_one_step_for_its_input(self, layers):
        _, module = layers
        values = uneven(channels=64)
        grids = calibration(module, values).grids("unet", shapes_of(module))
        assert grids["take"][0].by_channel
        assert not grids["few"][0].by_channel
        assert grids["few"][1].by_channel
        assert not grids["matrix"][0].by_channel


class TestKnownInputs:
    def test_int4_errs_less_where_it_counts(self):
        torch.manual_seed(0)
        weights, importance = torch.randn(64, 256), torch.rand(256) ** 4
        weight_format = plugins.weight_format("int4")
        errors = [
            ((weight_format.unpack(*weight_format.pack(weights, known)) - weights).square() * importance).sum()
            for known in (None, importance)
        ]
        assert errors[1] < 0.9 * errors[0]

    @pytest.mark.parametrize("precision", ["int8", "int4", "nf4"])
    def test_biases_make_up_for_rounding(self, layers, precision):
        folder, module = layers
        values = uneven(channels=64).movedim(1, -1) + 1
        checkpoint = Checkpoint.open(folder)
        found = calibration(module, values.movedim(-1, 1))
        known = with_inputs(plugins.mixture(precision), found, "unet", checkpoint)
        assert set(known.known) == ({"take", "matrix"} if precision == "int8" else {"matrix"})
        assert with_inputs(plugins.mixture(precision), None, "unet", checkpoint).known == {}
        eager, expected = known.round_module(module, {}), module["matrix"](values).detach()
        state = load_file(folder / "model.safetensors")
        made = nn.functional.linear(values, state["matrix.weight"], state["matrix.bias"])
        lost = (nn.functional.linear(values, eager["matrix"].weight, state["matrix.bias"]) - made).mean((0, 1, 2))
        mended = (expected - made).mean((0, 1, 2))
        assert mended.norm() < 1e-3 * lost.norm()
        changed = corrected(checkpoint, known, folder / "biases.safetensors")
        assert torch.allclose(read_tensor(changed.entries["matrix.bias"]), eager["matrix"].bias, atol=1e-6)
        assert changed.entries["matrix.weight"] == checkpoint.entries["matrix.weight"]
        assert changed.entries["few.bias"] == checkpoint.entries["few.bias"]
        left = corrected(checkpoint, known, folder / "biases.safetensors", {"matrix.weight", "take.weight"})
        assert left is checkpoint

    def test_what_a_backend_keeps_is_neither_rounded_nor_corrected(self, layers):
        folder, module = layers
        found = calibration(module, uneven(channels=64))
        known = with_inputs(plugins.mixture("int8"), found, "unet", Checkpoint.open(folder))
        before = {name: value.clone() for name, value in module.state_dict().items()}
        replace(known, kept={"matrix.weight"}).round_module(module, {})
        changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"take.weight", "take.bias", "few.weight"}
        mixture, given = replace(plugins.mixture("w8a8-dynamic"), kept={"matrix.weight"}), torch.rand(4, 64)
        expected = module["matrix"](given)
        assert torch.equal(mixture.round_module(module, {})["matrix"](given), expected), "nor is what it is given"

    def test_a_tied_table_is_kept_under_either_name(self):
        module = nn.ModuleDict({"shared": nn.Embedding(64, 128), "tokens": nn.Embedding(64, 128)})
        module["tokens"].weight = module["shared"].weight
        before = module["shared"].weight.clone()
        for name in ("shared", "tokens"):
            replace(plugins.mixture("int8"), kept={f"{name}.weight"}).round_module(module, {})
            assert torch.equal(module["shared"].weight, before)

    def test_they_come_back_from_a_file(self, layers):
        folder, module = layers
        found = calibration(module, uneven(channels=64))
        known = with_inputs(plugins.mixture("int4"), found, "unet", Checkpoint.open(folder)).known
        write_inputs(known, folder / "inputs.st")
        assert torch.equal(read_inputs(folder / "inputs.st")["matrix"].as_tensor(), known["matrix"].as_tensor())
        assert read_inputs(folder / "none.st") == {}


@pytest.mark.parametrize("option", [{}, {"outputs": "wide"}, {"outputs": "rounded"}])
def test_outputs_of_convolutions_are_rounded_where_it_is_asked_for(layers, option):
    folder, module = layers
    found = calibration(module, uneven(channels=64))
    grids = activations(found, "unet", PartRecipe("onnx", "w8a8", option), Checkpoint.open(folder))
    assert grids["take"][0].by_channel
    assert (grids["take"][1] is not None) == (option == {"outputs": "rounded"})


class TestFiles:
    def test_a_file_without_channels_says_what_to_do(self, layers, tmp_path):
        folder, module = layers
        calibration(module, uneven(channels=64)).save(tmp_path / "new.safetensors")
        tensors = {n: t for n, t in load_file(tmp_path / "new.safetensors").items() if not n.endswith("channels")}
        save_file(tensors, tmp_path / "old.safetensors", metadata={"bakeoff": '{"model": "made up"}'})
        old = Calibration.open(tmp_path / "old.safetensors")
        with pytest.raises(InputError, match="single channels of take") as raised:
            old.grids("unet", shapes_of(module))
        assert "bakeoff calibrate made up -o FILE" in raised.value.fix
        assert not old.grids("unet", shapes_of(module), "mse")["take"][0].by_channel
        with pytest.raises(InputError, match="single channels of matrix"):
            with_inputs(plugins.mixture("int4"), old, "unet", Checkpoint.open(folder))

    @pytest.mark.parametrize("damage", ["nan", "ends", "rows"])
    def test_damaged_channels_are_refused(self, layers, tmp_path, damage):
        _, module = layers
        file = tmp_path / "calibration.safetensors"
        calibration(module, uneven(channels=64)).save(file)
        tensors = load_file(file)
        name = "unet/take/input/channels"
        tensors[name] = {"nan": tensors[name] * torch.nan, "ends": -tensors[name], "rows": tensors[name][:3]}[damage]
        save_file(tensors, file, metadata={"bakeoff": "{}"})
        with pytest.raises(CorruptError, match="no statistics of channels"):
            Calibration.open(file)


def test_the_method_is_part_of_the_key(tmp_path):
    found = Calibration({"model": "shapes"})
    found.see("unet", "conv_in", torch.randn(1, 4, 8, 8), torch.randn(1, 64, 8, 8), 1)
    found.save(tmp_path / "c.safetensors")

    def planned(recipe):
        return plan("shapes", parse(recipe)[0], calibration=tmp_path / "c.safetensors")

    options = ("", "+activations=mse", "+activations=max", "+outputs=rounded")
    assert len({planned(f"torch:fp32,unet=onnx:w8a8{option}").key for option in options}) == len(options)
    fields = planned("onnx:bf16,unet=onnx:w8a8+activations=max+outputs=rounded").part_fields
    assert fields["unet"]["recipe"]["activations"] == "max"
    plain = planned("onnx:bf16+activations=max+outputs=rounded").part_fields["text_encoder"]["recipe"]
    assert not {"activations", "outputs"} & set(plain)
    with pytest.raises(RecipeError, match="activations"):
        planned("onnx:w8a8+activations=most")
    int4, wide = (planned(f"torch:fp32,unet=onnx:{each}").part_fields["unet"] for each in ("int4", "bf16"))
    assert "calibration" in int4
    assert "calibration" not in wide
