"""Calibration: what activations take on, the scales that follow, and files that can't be trusted."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bakeoff import bake, plugins
from bakeoff.cli import main
from bakeoff.errors import CorruptError, InputError, UsageError
from bakeoff.models.prompts import Prompt, read_prompts
from bakeoff.models.tiny import build
from bakeoff.parity.distance import relative_error
from bakeoff.plan import plan
from bakeoff.quantize.calibration import METHODS, Calibration, Magnitudes
from bakeoff.quantize.grid import Grid
from bakeoff.quantize.inputs import with_inputs
from bakeoff.recipe import parse
from bakeoff.sources.source import Source
from bakeoff.tuning.calibrate import calibrate
from bakeoff.weights import Checkpoint


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A calibration of `shapes`: four prompts, two steps."""
    target = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    calibrate("shapes", read_prompts("shapes-64", 4), steps=2).save(target)
    return target


def seen(*batches):
    magnitudes = Magnitudes()
    for batch in batches:
        magnitudes.see(batch)
    return magnitudes


def test_tiny_magnitudes_are_counted():
    assert int(seen(torch.tensor([0.0, 1e-38])).counts.sum()) == 2
    assert seen(torch.tensor([0.0, 1e-38]), torch.tensor([1.0])).scale("max") == pytest.approx(1 / 127, rel=1e-2)


def test_counts_do_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1000, generator=generator) * 2.0**power for power in (0, 3, 1)]
    counts = [seen(*order) for order in (batches, batches[::-1])]
    assert all(int(each.counts.sum()) == 3000 for each in counts)
    assert counts[0].scale("max") == pytest.approx(counts[1].scale("max"), rel=2e-3)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_scale_is_near_the_best(method):
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[:3] = 40.0
    chosen = relative_error(Grid((seen(values).scale(method),)).round(values, 0), values)
    best = min(
        relative_error(Grid((end / 127,)).round(values, 0), values) for end in torch.arange(2.0, 41.0, 0.5).tolist()
    )
    assert best <= chosen < {"mse": 1.05 * best, "percentile": 30 * best, "max": 30 * best}[method]


def test_the_largest_is_kept_where_all_is_kept():
    assert seen(torch.tensor([0.0, -3.0, 1.0])).scale("max") == pytest.approx(3 / 127, rel=1e-3)
    assert seen(torch.zeros(10), torch.zeros(5)).scale() > 0


def test_every_layer_of_every_part_is_seen(file, shapes):
    found = Calibration.open(file)
    assert set(found.parts) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    weights = load_file(shapes / "unet" / "diffusion_pytorch_model.safetensors")
    wanted = {name.removesuffix(".weight") for name, tensor in weights.items() if tensor.ndim > 1}
    assert set(found.parts["unet"]) == wanted
    assert found.info["prompts"] == [f"shapes-64/{number:04}" for number in range(4)]
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in weights.items() if tensor.ndim > 1}
    grids = found.grids("unet", shapes)
    assert set(grids) == wanted
    assert all(step > 0 for both in grids.values() for grid in both for step in grid.steps)
    assert all(before.by_channel == (len(shapes[layer]) == 4) for layer, (before, _) in grids.items())


def test_a_recipe_that_needs_it_asks_for_it(file, tiny, tmp_path):
    recipe = parse("torch:fp32,unet=onnx:w8a8")[0]
    with pytest.raises(UsageError, match="onnx:w8a8 of unet takes scales of activations that were calibrated"):
        plan("shapes", recipe)
    with pytest.raises(UsageError, match="was calibrated on shapes"):
        plan(str(tiny("stable-diffusion")), recipe, calibration=file)
    with pytest.raises(InputError, match="no calibration"):
        plan("shapes", recipe, calibration=tmp_path / "none.safetensors")
    assert plan("shapes", parse("torch:fp32")[0]).key == plan("shapes", parse("torch:fp32")[0], calibration=file).key


def test_another_calibration_is_another_key(file, tmp_path):
    other = Calibration.open(file)
    next(iter(other.parts["unet"].values()))[0].magnitudes.top *= 2
    other.save(tmp_path / "other.safetensors")
    recipe = parse("torch:fp32,unet=onnx:w8a8")[0]
    assert (
        plan("shapes", recipe, calibration=file).key
        != plan("shapes", recipe, calibration=tmp_path / "other.safetensors").key
    )


@pytest.mark.parametrize("damage", ["cut", "noughts", "nan", "foreign", "negative", "topless", "half", "list"])
def test_a_damaged_file_is_refused(file, tmp_path, damage):
    target = tmp_path / "damaged.safetensors"
    if damage == "cut":
        target.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"a": torch.ones(1)}, target)
    else:
        tensors = load_file(file)
        first = next(name for name in tensors if name.endswith("/output"))
        values = tensors.pop(first)
        top, counts = values[:1], values[1:]
        changed = {
            "noughts": 0 * values,
            "nan": values * torch.nan,
            "negative": torch.cat([top, -counts]),
            "topless": torch.cat([0 * top, counts]),
            "list": values,
        }
        tensors |= {first: changed[damage]} if damage in changed else {}
        save_file(tensors, target, metadata={"bakeoff": "[1]" if damage == "list" else "{}"})
    with pytest.raises(CorruptError, match="is not a calibration"):
        Calibration.open(target)


def test_a_changed_number_is_noticed(file, tmp_path):
    """A histogram whose top is a thousand times higher is one, too: its layer would be rounded to nought."""
    with safe_open(file, "pt") as stream:
        about, tensors = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    first = next(name for name in tensors if name.endswith("/input"))
    tensors[first][0] *= 1024
    save_file(tensors, tmp_path / "changed.safetensors", metadata=about)
    with pytest.raises(CorruptError, match="aren't those that were written"):
        Calibration.open(tmp_path / "changed.safetensors")


def test_a_part_that_was_not_calibrated_is_refused_before_any_work(file, tmp_path):
    lacking = Calibration.open(file)
    del lacking.parts["vae_encoder"]
    lacking.save(tmp_path / "lacking.safetensors")
    with pytest.raises(UsageError, match="the calibration says nothing of vae_encoder"):
        plan("shapes", parse("onnx:w8a8")[0], calibration=tmp_path / "lacking.safetensors")


@pytest.fixture
def prompts():
    return tuple(Prompt(f"p/{number}", f"{number} hats") for number in range(4))


def test_a_model_for_inpainting_alone_is_calibrated(tmp_path, prompts):
    folder = build("stable-diffusion", tmp_path / "model", changes={"unet": {"in_channels": 9}})
    made = calibrate(str(folder), prompts, steps=2, size=(64, 64))
    assert set(made.parts) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


def test_a_controlnet_is_calibrated_with_its_unet(tiny, tmp_path, prompts):
    folder, module = tiny("stable-diffusion"), tiny("stable-diffusion", "controlnet") / "controlnet"
    file, plain = tmp_path / "c.safetensors", tmp_path / "plain.safetensors"
    calibrate(str(folder), prompts, steps=2, size=(64, 64), controlnet=str(module)).save(file)
    calibrate(str(folder), prompts, steps=2, size=(64, 64)).save(plain)
    assert "controlnet" in Calibration.open(file).parts
    recipe = parse("onnx:bf16,unet=onnx:w8a8,controlnet=onnx:w8a8")[0]
    plan(str(folder), recipe, controlnet=str(module), calibration=file)
    with pytest.raises(UsageError, match="without the controlnet that this is with") as raised:
        plan(str(folder), recipe, controlnet=str(module), calibration=plain)
    assert raised.value.fix.endswith(" --controlnet DIR")
    with pytest.raises(UsageError, match="with a controlnet, which this is without"):
        plan(str(folder), parse("onnx:bf16,unet=onnx:w8a8")[0], calibration=file)


def test_loras_are_drawn_with(tiny, tmp_path, prompts):
    folder, lines = tiny("stable-diffusion"), []
    entries = Checkpoint.open(folder / "unet").entries
    name = next(each for each in entries if each.endswith("attn1.to_q.weight"))
    out, into = entries[name].shape
    generator = torch.Generator().manual_seed(0)
    halves = {"lora_A": torch.randn(4, into, generator=generator), "lora_B": torch.randn(out, 4, generator=generator)}
    path = f"unet.{name.removesuffix('.weight')}"
    lora = tmp_path / "lora.safetensors"
    save_file({f"{path}.{half}.weight": tensor for half, tensor in halves.items()}, lora)
    made = {
        loras: calibrate(str(folder), prompts, steps=2, size=(64, 64), loras=loras) for loras in ((), (f"{lora}:0.5",))
    }
    tops = [each.parts["unet"][name.removesuffix(".weight")][1].magnitudes.top for each in made.values()]
    assert tops[1] > 2 * tops[0]
    recipe = parse("null:fp32,unet=onnx:w8a8")[0]
    for index, each in enumerate(made.values()):
        each.save(tmp_path / f"{index}.safetensors")
        bake.export(
            str(folder),
            tmp_path / f"out-{index}",
            recipe,
            loras=[f"{lora}:0.5"],
            calibration=tmp_path / f"{index}.safetensors",
            prove=False,
            progress=lines.append,
        )
    assert [line for line in lines if line.startswith("note: ")] == [
        "note: activations were calibrated with no LoRA: bakeoff calibrate MODEL --lora FILE:SCALE sees them"
    ]


def test_activations_that_are_not_finite_name_their_layer():
    with pytest.raises(InputError, match="conv_in of unet: activations are NaN"):
        Calibration().see("unet", "conv_in", torch.tensor([1.0, torch.nan]), torch.ones(1))


@pytest.mark.parametrize("command", ["calibrate", "sensitivity"])
def test_an_output_that_is_a_folder_is_refused_before_any_work(tmp_path, capsys, command):
    assert main([command, "shapes", "-o", str(tmp_path)]) == UsageError.exit_code
    assert "is a folder, expected a file" in capsys.readouterr().err


def test_what_is_no_calibration_is_not_written_over(tmp_path, capsys, shapes):
    for name, content in (
        ("a.txt", b"precious"),
        ("b.safetensors", (shapes / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()),
    ):
        (tmp_path / name).write_bytes(content)
        assert main(["calibrate", "shapes", "-o", str(tmp_path / name)]) == UsageError.exit_code
        assert "exists, and is no calibration" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content


def test_noughts_say_nothing_of_importance(tmp_path):
    """Codes are made as without a calibration then."""
    found = Calibration({"model": "shapes"})
    found.see("unet", "conv_in", torch.zeros(1, 8, 4, 4), torch.ones(1, 8, 4, 4), 1)
    assert found.reached("unet") == {}
    checkpoint = Checkpoint.open(Source.open("shapes").path("unet"))
    assert with_inputs(plugins.mixture("int4"), found, "unet", checkpoint).known == {}


def test_others_may_read_it(file):
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_prompts_that_are_not_text_are_refused(tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    arguments = ["calibrate", "shapes", "-o", str(tmp_path / "c.safetensors"), "--prompts", str(tmp_path / "p.txt")]
    assert main(arguments) == UsageError.exit_code
    assert "is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1"])
def test_counts_below_one_are_refused(tmp_path, capsys, count):
    assert main(["calibrate", "shapes", "-o", str(tmp_path / "c"), "--count", count]) == UsageError.exit_code
    assert f"got a count of {count} prompts" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_refused_before_any_work(tmp_path, capsys):
    for command in ("calibrate", "sensitivity"):
        assert main([command, "shapes", "-o", str(tmp_path / "none" / "file")]) == 2
        assert f"mkdir -p {tmp_path / 'none'}" in capsys.readouterr().err


def test_too_few_prompts_are_refused(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    arguments = ["calibrate", "shapes", "-o", str(tmp_path / "c.safetensors"), "--prompts", str(prompts)]
    assert main(arguments) == 2
    assert "got 2 prompts" in capsys.readouterr().err
    assert main([*arguments, "--count", "2"]) == 2
    assert "got 2 prompts to calibrate with, expected at least 4" in capsys.readouterr().err
    assert not (tmp_path / "c.safetensors").exists()
