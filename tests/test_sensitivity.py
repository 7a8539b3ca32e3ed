"""What layers add to the pictures' error, and the recipes that follow from it."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bakeoff import plugins
from bakeoff.bake import activations
from bakeoff.cli import main
from bakeoff.errors import CorruptError, RecipeError, ResourceError, UsageError
from bakeoff.models.prompts import read_prompts
from bakeoff.parity.drawing import open_source
from bakeoff.plan import plan
from bakeoff.quantize.calibration import Calibration
from bakeoff.quantize.choice import Option, choose
from bakeoff.quantize.mixture import rounded_layers
from bakeoff.quantize.sensitivity import Layer, Sensitivity
from bakeoff.recipe import PartRecipe, from_toml, parse, to_toml
from bakeoff.sources.source import Source
from bakeoff.tuning.calibrate import calibrate
from bakeoff.tuning.choose import checked_recipe, recipe_within
from bakeoff.tuning.sensitivity import sensitivity
from bakeoff.tuning.studio import Studio

COSTS = st.floats(1, 100)
ERRORS = st.floats(1e-6, 1.0)
INFO = {"model": "shapes", "prompts": [], "steps": 1, "size": None, "calibration": None}
"""Of a measurement."""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(COSTS, COSTS, ERRORS), min_size=1, max_size=6), st.floats(1e-6, 3.0))
def test_the_choice_is_near_the_best_there_is(layers, bound):
    options = {
        str(number): [Option("wide", dear + cheap, 0.0), Option("narrow", cheap, error)]
        for number, (dear, cheap, error) in enumerate(layers)
    }
    chosen = choose(options, bound)
    assert sum(option.error for option in chosen.values()) <= bound
    possible = [each for each in itertools.product(*options.values()) if sum(o.error for o in each) <= bound]
    best = min(sum(o.cost for o in each) for each in possible)
    most = max(dear for dear, _, _ in layers)
    assert (
        sum(option.cost for option in chosen.values()) <= best + most + 1e-6
    )  # one layer's worth, as relaxation has it


def test_nothing_fits_a_bound_below_all_errors():
    assert choose({"a": [Option("narrow", 1, 0.5)]}, 0.1) is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A decoder's layers, each in two precisions, on two steps."""
    file = tmp_path_factory.mktemp("sensitivity") / "layers.json"
    prompts = read_prompts("shapes-64", 4)
    return file, sensitivity("shapes", prompts, file, precisions=["int8", "int4"], parts=["text_encoder"], steps=1)


def test_each_layer_is_measured_alone_and_all_together(measured):
    file, found = measured
    layers = found.parts["text_encoder"]
    assert Sensitivity.open(file) == found
    assert {"text_model.embeddings.token_embedding", "text_model.encoder.layers.0.mlp.fc1"} < set(layers)
    assert all(layer.errors["int8"] > 0 for layer in layers.values())
    assert sum(layer.errors["int4"] for layer in layers.values()) > 10 * sum(
        layer.errors["int8"] for layer in layers.values()
    )
    alone = [layer.errors["int8"] for layer in layers.values()]
    assert max(alone) < found.together["text_encoder"]["int8"] < 3 * sum(alone)
    assert layers["text_model.encoder.layers.0.mlp.fc1"].macs == 2 * 32 * 128 * 512


def test_a_run_goes_on_where_it_stopped(measured, tmp_path):
    file, _ = measured
    left = json.loads(file.read_text())
    for layer in left["parts"]["text_encoder"].values():
        layer["errors"] = {"int8": 0.5, "int4": 0.25}
    begun = tmp_path / "layers.json"
    begun.write_text(json.dumps(left))
    arguments = {"precisions": ["int8", "int4"], "parts": ["text_encoder"], "steps": 1}
    again = sensitivity("shapes", read_prompts("shapes-64", 4), begun, **arguments)
    assert all(layer.errors == {"int8": 0.5, "int4": 0.25} for layer in again.parts["text_encoder"].values())
    with pytest.raises(UsageError, match="was measured with other steps"):
        sensitivity("shapes", read_prompts("shapes-64", 4), begun, **{**arguments, "steps": 2})


def test_a_recipe_keeps_what_it_is_asked(measured, tmp_path, capsys):
    file, found = measured
    target = tmp_path / "recipe.toml"
    sizes = []
    stored = -10 * math.log10(found.wide["stored"])
    for decibels in (30, 40, stored - 0.01):  # the last leaves nothing for layers
        arguments = ["recipe", str(file), "-o", str(target), "--backend", "onnx", "--within", f"{decibels:.3f}dB"]
        assert main([*arguments, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["psnr_db"] >= decibels - 1e-3
        recipe = from_toml(target.read_text())
        assert to_toml(recipe) == "".join(target.read_text().splitlines(keepends=True)[1:])
        planned = plan("shapes", recipe)
        sizes.append(sum(planned.forecast(tmp_path).parts["text_encoder"].weight_bytes.values()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 2


def made_up(errors, together=None):
    """A measurement of three layers, each with these errors."""
    layers = {f"layer{number}": Layer((64 * (number + 1), 64), 1000, dict(errors)) for number in range(3)}
    total = {name: 3 * error for name, error in errors.items()}
    return Sensitivity({"calibration": None}, {"unet": layers}, {"unet": together or total}, NOTHING)


NOTHING = {"computed": 0.0, "stored": 0.0}
"""What bfloat16 errs in a model that it holds exactly."""


def test_what_bfloat16_errs_counts():
    found = made_up({"int8": 1e-6})
    found.wide = {"computed": 1e-4, "stored": 1e-6}
    recipe, psnr = recipe_within(found, "onnx", 53)
    assert recipe.parts["unet"] == PartRecipe("onnx", "int8")
    assert psnr == pytest.approx(-10 * math.log10(4e-6))
    assert recipe_within(found, "onnx", 59)[0].parts["unet"] == PartRecipe("onnx", "bf16")
    with pytest.raises(RecipeError, match=r"onnx keeps 60.0 dB in bf16 alone, got --within 61dB") as raised:
        recipe_within(found, "onnx", 61)
    assert "or --backend" not in raised.value.fix
    with pytest.raises(RecipeError, match=r"openvino keeps 40.0 dB in bf16 alone, got --within 53dB") as raised:
        recipe_within(found, "openvino", 53)
    assert "--backend onnx, which computes in float32: it keeps 60.0 dB" in raised.value.fix
    assert recipe_within(found, "openvino", 39)[0].parts["unet"] == PartRecipe("openvino", "int8")


def test_bfloat16_is_measured_as_it_is_stored_and_as_it_is_computed(measured):
    _, found = measured
    assert 0 < found.wide["stored"] < found.wide["computed"] < 1e-3


def test_bfloat16_that_breaks_pictures_is_said():
    found = made_up({"fp8": 1e-6})
    found.wide = {"computed": math.inf, "stored": 1e-6}
    with pytest.raises(RecipeError, match="torch breaks the pictures in bf16 alone, got --within 30dB") as raised:
        recipe_within(found, "torch", 30)
    assert raised.value.fix == "ask for less with --within", "onnx has no fp8"


def test_what_breaks_pictures_all_at_once_is_not_chosen():
    """Nobody knows how many of its layers would break them."""
    recipe, psnr = recipe_within(made_up({"int8": 1e-5}, {"int8": math.inf}), "onnx", 35)
    assert recipe.parts["unet"] == PartRecipe("onnx", "bf16")
    assert math.isinf(psnr)
    found = made_up({"int8": 1e-5}, {"int8": math.inf})
    found.parts["unet"]["broken"] = Layer((64, 64), 1000, {"int8": math.inf})
    recipe, psnr = recipe_within(found, "onnx", 30)
    assert "broken" not in {name for name, each in recipe.parts["unet"].layers.items() if each == "int8"}
    assert psnr < 50


@pytest.mark.parametrize("text", ["nan", "-5000", "0dB", "loud", "9999dB"])
def test_bounds_that_cannot_be_meant(measured, tmp_path, text, capsys):
    file, _ = measured
    assert main(["recipe", str(file), "-o", str(tmp_path / "recipe.toml"), f"--within={text}"]) == 2
    assert "--within" in capsys.readouterr().err


def test_the_fastest_takes_what_is_quicker_than_bfloat16(monkeypatch):
    runtime = plugins.runtime("onnx")
    monkeypatch.setattr(runtime, "relative_time", lambda precision: {"w8a8": 0.3}.get(precision, 1.0))
    found = made_up({"w8a8": 1e-5, "int8": 1e-7})
    recipe, psnr = recipe_within(found, "onnx", 44, fastest=True)
    assert recipe.parts["unet"].precision == "w8a8"
    assert psnr >= 44
    recipe, _ = recipe_within(found, "onnx", 49.9, fastest=True)
    assert recipe.parts["unet"] == PartRecipe("onnx", "bf16", layers={"layer2": "w8a8"}) or list(
        recipe.parts["unet"].layers.values()
    ) == ["w8a8"], "one of three layers fits"
    monkeypatch.setattr(runtime, "relative_time", lambda _: 1.0)
    with pytest.raises(RecipeError, match="none of int8, w8a8 is known to be quicker than bf16 in onnx"):
        recipe_within(found, "onnx", 44, fastest=True)


@pytest.mark.parametrize(("backend", "precision"), [("torch", "int4"), ("torch", "int8"), ("openvino", "w8a8-dynamic")])
def test_a_recipe_whose_layers_mostly_stay_wide_can_be_exported(backend, precision):
    """These backends keep layers wide among rounded ones, and round none among wide ones."""
    recipe, _ = recipe_within(made_up({precision: 1e-4}), backend, 39)
    part = recipe.parts["unet"]
    assert part.precision == precision
    assert sorted(part.layers.values()) == ["bf16", "bf16"]
    assert {*part.layers.values()} <= {*plugins.exporter(backend).layer_precisions[part.precision]}


def test_of_precisions_that_do_not_mix_the_better_set_is_taken():
    recipe, _ = recipe_within(made_up({"int4": 1e-3, "int8": 1e-5}), "torch", 40)
    assert recipe.parts["unet"] == PartRecipe("torch", "int8"), "int4 would leave all layers wide"
    recipe, _ = recipe_within(made_up({"nf4": 1e-5, "int8": 1e-7}), "torch", 40)
    assert recipe.parts["unet"] == PartRecipe("torch", "nf4")


def test_bytes_are_those_that_the_backend_stores():
    found = made_up({"int4": 1e-5, "int8": 1e-7})
    assert recipe_within(found, "onnx", 40)[0].parts["unet"].precision == "int4"
    assert recipe_within(found, "torch", 40)[0].parts["unet"].precision == "int8", "torchao's int4 is in bytes, too"
    found.parts["unet"]["layer1"] = Layer((64, 64, 3, 3), 1000, {"int4": 1e-5, "int8": 1e-7})
    part = recipe_within(found, "torch", 40)[0].parts["unet"]
    assert part == PartRecipe("torch", "int8", layers={"layer1": "bf16"}), "bitsandbytes has no codes for convolutions"


def test_the_fastest_takes_layers_without_codes_for_wide_ones(monkeypatch):
    monkeypatch.setattr(
        plugins.runtime("torch"), "relative_time", lambda precision: {"w8a8-dynamic": 0.5}.get(precision, 1.0)
    )
    found = made_up({"w8a8-dynamic": 1e-5})
    found.parts["unet"]["layer1"] = Layer((64, 64, 3, 3), 1000, {"w8a8-dynamic": 1e-5})
    part = recipe_within(found, "torch", 40, fastest=True)[0].parts["unet"]
    assert part == PartRecipe("torch", "w8a8-dynamic", layers={"layer1": "bf16"})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("errors",), {"int8": -1.0}),
        (("errors",), {"int8": "x"}),
        (("shape",), "ab"),
        (("shape",), []),
        (("macs",), None),
    ],
)
def test_edited_layers_are_refused(tmp_path, place, value, capsys):
    layer = {"shape": [4, 4], "macs": 16, "errors": {"int8": 0.1}}
    layer[place[0]] = value
    check_damage(tmp_path, {"parts": {"unet": {"a": layer}}}, capsys)


@pytest.mark.parametrize("info", [None, {}, {"model": "shapes"}])
def test_a_measurement_of_nothing_known_is_refused(tmp_path, info, capsys):
    check_damage(tmp_path, {"info": info}, capsys)


def check_damage(folder, damage, capsys):
    sound = {"schema": 3, "info": INFO, "wide": {}, "parts": {}, "together": {}}
    (folder / "layers.json").write_text(json.dumps({**sound, **damage}))
    arguments = ["recipe", str(folder / "layers.json"), "--within", "40dB", "-o", str(folder / "r.toml")]
    assert main(arguments) == CorruptError.exit_code
    assert "doesn't say what layers add" in capsys.readouterr().err
    assert not (folder / "r.toml").exists()


def test_where_nothing_was_measured_there_is_nothing_to_choose(tmp_path, capsys):
    Sensitivity(INFO).save(tmp_path / "layers.json")
    arguments = ["recipe", str(tmp_path / "layers.json"), "--within", "40dB", "-o", str(tmp_path / "r.toml")]
    assert main(arguments) == RecipeError.exit_code
    assert "no layer was measured" in capsys.readouterr().err


def test_measurements_of_an_older_schema_are_refused(tmp_path):
    (tmp_path / "layers.json").write_text('{"schema": 1, "info": {}, "parts": {}, "together": {}}')
    with pytest.raises(CorruptError, match="schema 1, expected 3"):
        Sensitivity.open(tmp_path / "layers.json")


def test_a_choice_that_draws_nan_is_made_again_with_less(measured, monkeypatch):
    _, found = measured
    drawn = iter([math.inf, 1e-9])
    monkeypatch.setattr(Studio, "error", lambda *_: next(drawn))
    recipe, psnr = checked_recipe(found, "onnx", 30)
    assert psnr == pytest.approx(-10 * math.log10(found.wide["stored"] + 1e-9))
    assert recipe.parts["text_encoder"].precision != "bf16", "something is still rounded"


def test_other_weights_than_those_measured_are_refused(measured):
    _, found = measured
    other = Sensitivity({**found.info, "modules": {"unet": "others"}}, found.parts, found.together, found.wide)
    with pytest.raises(UsageError, match="other weights than when its layers were measured"):
        checked_recipe(other, "onnx", 30)


def test_all_parts_have_to_fit_at_once(monkeypatch, tmp_path):
    """Where parts take turns, a layer is swapped in a module that is closed before it is drawn with."""
    from bakeoff.parity import drawing

    monkeypatch.setattr(drawing, "usable_bytes", lambda: 1_000_000)
    with pytest.raises(ResourceError, match="all parts in fp32 take about"):
        sensitivity("shapes", read_prompts("shapes-64", 4), tmp_path / "l.json", precisions=["int8"], steps=1)


def test_a_checked_recipe_is_drawn(measured, tmp_path, capsys):
    file, found = measured
    together = 10 * -math.log10(found.together["text_encoder"]["int4"])
    target = tmp_path / "recipe.toml"
    asked = together + 2
    arguments = ["recipe", str(file), "-o", str(target), "--within", f"{asked:.1f}", "--smallest", "--check"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["psnr_db"] >= asked - 0.1
    assert told["backend"] == "onnx", "the first that has int8 and int4 layers"
    assert "# drawn: " in target.read_text()
    assert from_toml(target.read_text()).parts["text_encoder"].layers


def test_a_backend_that_mixes_nothing_measured_says_so(measured):
    found = Sensitivity(INFO, {"unet": {"a": Layer((64, 64), 1, {"fp8": 1.0})}}, {"unet": {"fp8": 1.0}}, NOTHING)
    with pytest.raises(RecipeError, match="onnx bakes none of fp8 for single layers"):
        recipe_within(found, "onnx", 30)


def test_an_interrupted_measurement_makes_no_recipe(measured):
    _, found = measured
    whole = found.together["text_encoder"]
    cut = Sensitivity(found.info, found.parts, {"text_encoder": {"int8": whole["int8"]}})
    with pytest.raises(UsageError, match="interrupted: it lacks layers of text_encoder in int4"):
        recipe_within(cut, "onnx", 30)
    with pytest.raises(UsageError, match="interrupted: it lacks everything in bf16"):
        checked_recipe(Sensitivity(found.info, found.parts, found.together), "onnx", 30)


def test_layers_that_break_the_pictures_are_json(tmp_path):
    found = Sensitivity(INFO, {"unet": {"a": Layer((64, 64), 1, {"int4": math.inf})}}, {"unet": {"int4": math.inf}})
    found.save(tmp_path / "layers.json")

    def refuse(name):
        raise AssertionError(name)

    json.loads((tmp_path / "layers.json").read_text(), parse_constant=refuse)
    assert Sensitivity.open(tmp_path / "layers.json") == found


def test_calibrated_activations_are_measured_as_recipes_round_them(tmp_path):
    prompts, source = read_prompts("shapes-64", 4), Source.open("shapes")
    calibrate("shapes", prompts, steps=1).save(tmp_path / "calibration.safetensors")
    calibration = Calibration.open(tmp_path / "calibration.safetensors")
    grids = activations(calibration, "vae_decoder", PartRecipe("onnx", "w8a8"), source.checkpoint("vae"))
    with open_source(source) as engine:
        studio = Studio(engine, source, [prompt.text for prompt in prompts], {"steps": 1})
        own = {
            path: name
            for path, name in studio.layers("vae_decoder").items()
            if name == "decoder.mid_block.resnets.0.conv1"
        }
        assert len(own) == 1
        assert grids["decoder.mid_block.resnets.0.conv1"][1] is None, "what a convolution gives stays wide"
        with rounded_layers(studio.modules["vae_decoder"], own, plugins.mixture("w8a8"), grids):
            expected = float(np.square(studio._draw() - studio.reference).mean())
        errors = {
            name: studio.error({"vae_decoder": (own, plugins.mixture(name))}, calibration) for name in ("w8a8", "fp8")
        }
    assert errors["w8a8"] == pytest.approx(expected)
    assert 0 < errors["fp8"] < 1e-2, "its steps are of another kind"


def test_what_cannot_be_meant(tmp_path, capsys):
    broken = tmp_path / "layers.json"
    broken.write_text("{}")
    with pytest.raises(CorruptError, match="doesn't say what layers add"):
        Sensitivity.open(broken)
    arguments = ["recipe", str(broken), "-o", str(tmp_path / "r.toml"), "--backend", "onnx", "--within"]
    assert main([*arguments, "much"]) == 4
    Sensitivity(INFO).save(broken)
    assert main([*arguments, "much"]) == 2
    assert "got --within 'much'" in capsys.readouterr().err
    assert main(["recipe", str(broken), "-o", "recipe", "--backend", "onnx", "--within", "30"]) == 2
    assert "ends in .toml" in capsys.readouterr().err
    assert main(["sensitivity", "shapes", "-o", str(tmp_path / "l.json"), "--precisions", "int3"]) == 2
    assert "int3" in capsys.readouterr().err
    assert main(["sensitivity", "shapes", "-o", str(tmp_path / "l.json"), "--precisions", "w8a8"]) == 2
    assert "bakeoff calibrate" in capsys.readouterr().err


def test_layers_of_a_recipe():
    recipe = from_toml(
        '[parts.unet]\nprecision = "w8a8"\n[parts.unet.layers]\n"conv_*" = "bf16"\n'.replace(
            "[parts.unet]\n", 'backend = "onnx"\nprecision = "bf16"\n[parts.unet]\n', 1
        )
    )
    planned = plan("shapes", parse("onnx:bf16")[0])
    layers = recipe.parts["unet"].for_layers("unet", {"conv_in", "conv_out", "mid_block"}).layers
    assert layers == {"conv_in": "bf16", "conv_out": "bf16"}
    assert planned.parts["unet"].layers == {}
    with pytest.raises(RecipeError, match="layer of unet"):
        recipe.parts["unet"].for_layers("unet", {"up"})
    assert from_toml(to_toml(recipe)) == recipe
    other = from_toml('backend = "torch"\nprecision = "bf16"\n[parts.unet.layers]\n"conv_in" = "nf4"\n')
    with pytest.raises(RecipeError, match="conv_in of unet can't be nf4 among layers of torch:bf16") as error:
        plan("shapes", other)
    assert "fp32" in error.value.fix
    assert math.isfinite(planned.forecast(planned.source.folder).seconds)
