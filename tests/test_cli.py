"""The command line as a user meets it: output, exit codes, errors with the fix, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bakeoff.artifact import Artifact


def test_doctor(run_json):
    found = run_json("doctor")
    assert found["machine"]["usable_cores"] >= 1
    assert {"torch", "onnx", "openvino", "null"} <= set(found["backends"])
    assert all(each["ok"] or (name == "tensorrt" and each["fix"]) for name, each in found["backends"].items())


def test_precisions(run_json, run_cli):
    found = run_json("precisions")
    assert {cell["backend"] for cell in found} >= {"onnx", "openvino", "torch"}
    assert all(cell["reason"] for cell in found if not (cell["exported"] and cell["runs"]))
    printed = run_cli("precisions").stdout
    assert printed.splitlines()[0].split() == sorted({cell["backend"] for cell in found})
    assert "onnx:fp8: ONNX's MatMul takes no 8-bit floats" in printed


def test_generate_writes_a_png_and_says_how_it_came_about(run_json, baked, tmp_path):
    from PIL import Image

    output = tmp_path / "out.png"
    found = run_json(
        "generate", baked("torch:fp32", proved=True), "a red circle", "-o", output, "--seed", 5, "--steps", 2
    )
    assert found["files"] == [str(output)]
    assert found["seeds"] == [5]
    assert found["proved"]
    assert found["configuration"]["unet"]["threads"] >= 1
    with Image.open(output) as picture:
        assert picture.size == (64, 64)


def test_several_prompts_write_several_pictures(run_cli, baked, tmp_path):
    finished = run_cli("generate", baked("null:fp32", proved=True), "a", "b", "-o", tmp_path / "out.png", "--steps", 1)
    assert finished.returncode == 0, finished.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-0.png", "out-1.png"]
    assert "unproved: the null backend computes nothing" in finished.stderr


def test_inspect_verify_and_why_rebuild(run_json, baked):
    folder = baked("torch:fp32", proved=True)
    assert run_json("inspect", folder)["proof"]["status"] == "proved"
    assert run_json("verify", folder)["problems"] == []
    assert run_json("why-rebuild", folder, "shapes", "--recipe", "torch:fp32") == {"rebuild": False, "fields": []}
    fields = run_json("why-rebuild", folder, "shapes", "--recipe", "torch:fp32", "--weights", "copy")["fields"]
    assert all(".weights: shared where possible -> own" in field for field in fields)


@pytest.mark.slow
def test_verify_proves_again(run_json, baked):
    assert run_json("verify", baked("torch:fp32", proved=True), "--parity")["proof"]["status"] == "proved"


def test_verify_finds_damage(run_cli, copied):
    folder = copied("torch:fp32")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    finished = run_cli("verify", folder)
    assert finished.returncode == 4
    assert "unet/diffusion_pytorch_model.safetensors was changed" in finished.stderr


@pytest.fixture
def models(tmp_path):
    """Folders that are no models, by kind."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "model_index.json").write_text(json.dumps({"_class_name": "AudioPipeline"}))
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["export", "shapes", "-o", "{}/x", "--recipe", "onnx:fp31"], 2, "Did you mean 'fp32'?"),
        (["export", "shapes", "-o", "{}/x", "--recipe", "openvno:fp32"], 2, "Did you mean 'openvino'?"),
        (["export", "shapes", "-o", "{}/x", "--recipe", "onnx:fp8"], 2, "onnx can't bake fp8"),
        (["export", "shapes", "-o", "{}/x", "--recipe", "onnx:fp32+fast"], 2, "unknown option of onnx"),
        (["export", "shapes", "-o", "{}/x", "--recipe", "onnx:fp32", "--weights", "lnk"], 2, "Did you mean 'link'?"),
        (["export", "shapes", "-o", "{}/x", "--recipe", "{}/none.toml"], 2, "no recipe file"),
        (["export", "{}/missing", "-o", "{}/x", "--recipe", "onnx:fp32"], 3, "no folder"),
        (["export", "shape", "-o", "{}/x", "--recipe", "onnx:fp32"], 3, "shapes"),
        (["export", "{}/empty", "-o", "{}/x", "--recipe", "onnx:fp32"], 3, "no model_index.json"),
        (["export", "{}/alien", "-o", "{}/x", "--recipe", "onnx:fp32"], 3, "StableDiffusionPipeline"),
        (["export", "{}/model.ckpt", "-o", "{}/x", "--recipe", "onnx:fp32"], 3, "pickle"),
        (["export", "shapes", "-o", "{}/empty", "--recipe", "onnx:fp32"], 4, "--force"),
        (["inspect", "{}/empty"], 4, "not an artifact"),
        (["generate", "{}/missing", "a", "-o", "{}/x.png"], 4, "bakeoff export"),
        (["generate", "{}/empty", "a", "-o", "{}/no/x.png"], 2, "mkdir"),
        (["generate", "{}/empty", "a", "-o", "{}/x.txt"], 2, "picture format"),
        (["generate", "{}/empty", "a", "-o", "{}/x.png", "--width", "64"], 2, "--height"),
    ],
)
def test_errors_have_their_code_and_the_fix(run_cli, models, arguments, code, says):
    before = sorted(models.rglob("*"))
    finished = run_cli(*[argument.replace("{}", str(models)) for argument in arguments])
    assert finished.returncode == code, finished.stderr
    assert says in finished.stderr
    assert "Traceback" not in finished.stderr
    assert sorted(models.rglob("*")) == before


def test_a_pickle_only_pipeline_is_refused_with_the_way_out(run_cli, shapes, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(shapes, model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")
    finished = run_cli("export", model, "-o", tmp_path / "x", "--recipe", "onnx:fp32")
    assert finished.returncode == 3
    assert "convert once" in finished.stderr
    assert not (tmp_path / "x").exists()


def test_too_little_room_is_said_with_figures(tmp_path, monkeypatch):
    from bakeoff import bake
    from bakeoff import plan as planning
    from bakeoff.errors import ResourceError
    from bakeoff.recipe import parse

    monkeypatch.setattr(planning, "available_bytes", lambda: 10_000_000)
    with pytest.raises(ResourceError, match=r"GB of memory, 0.0 GB are free"):
        bake.export("shapes", tmp_path / "x", parse("onnx:fp32")[0])
    monkeypatch.undo()
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1})())
    with pytest.raises(ResourceError, match=r"GB of disk"):
        bake.export("shapes", tmp_path / "x", parse("onnx:fp32")[0])
    assert list(tmp_path.iterdir()) == []


def test_errors_are_json_too(run_cli, tmp_path):
    finished = run_cli("inspect", tmp_path, "--json")
    assert json.loads(finished.stdout)["error"] == "ArtifactError"


def kill_after(seconds, output, recipe="torch:fp32,unet=torch:bf16"):
    """Start an export and kill it; return whether an artifact is there, which then is whole."""
    command = [sys.executable, "-P", "-m", "bakeoff.cli", "export", "shapes", "-o", str(output), "--force"]
    process = subprocess.Popen(
        [*command, "--recipe", recipe],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not output.exists():
        return False
    assert Artifact.open(output).verify() == []
    return True


def test_a_reader_that_has_seen_enough_is_no_error(baked):
    command = [sys.executable, "-P", "-u", "-m", "bakeoff.cli", "inspect", baked("torch:fp32"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_killed_export_leaves_no_artifact(tmp_path):
    assert not kill_after(2.0, tmp_path / "out")


@pytest.mark.slow
def test_exports_killed_at_ten_random_moments(run_cli, tmp_path):
    """Fresh ones and ones that replace an artifact: none is there, or a whole one, and nothing lies about after."""
    import random

    rng = random.Random(0)
    recipe = "torch:fp32,text_encoder=onnx:fp32"
    started = time.monotonic()
    assert run_cli("export", "shapes", "-o", tmp_path / "replaced", "--recipe", recipe).returncode == 0
    whole = time.monotonic() - started
    for number in range(10):
        output = tmp_path / ("replaced" if number % 2 else f"fresh{number}")
        there = kill_after(rng.uniform(0, 1.1 * whole), output, recipe)
        assert there or number % 2 == 0
    for output in ("replaced", *(f"fresh{number}" for number in range(0, 10, 2))):
        assert run_cli("export", "shapes", "-o", tmp_path / output, "--recipe", recipe, "--no-prove").returncode == 0
    assert not list(tmp_path.glob(".*"))


def test_a_missing_extra_is_named_with_the_fix(tmp_path, monkeypatch):
    import importlib.metadata

    from bakeoff import bake
    from bakeoff import plan as planning
    from bakeoff.errors import UnavailableError
    from bakeoff.recipe import parse

    found = importlib.metadata.version

    def version(package):
        if package == "onnxscript":
            raise importlib.metadata.PackageNotFoundError
        return found(package)

    monkeypatch.setattr(planning.importlib.metadata, "version", version)
    with pytest.raises(UnavailableError, match=r"onnxscript.*\n?.*bakeoff\[onnx\]"):
        bake.export("shapes", tmp_path / "x", parse("onnx:fp32")[0])


def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch, capsys):
    import errno

    from bakeoff import bake, cli

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(bake, "export", full)
    assert cli.main(["export", "shapes", "-o", str(tmp_path / "x"), "--recipe", "torch:fp32"]) == 8
    assert "No space left on device" in capsys.readouterr().err


def test_a_toml_file_in_another_encoding_is_refused(run_cli, tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b"backend = '\xff'")
    finished = run_cli("export", "shapes", "-o", tmp_path / "x", "--recipe", tmp_path / "recipe.toml")
    assert finished.returncode == 2
    assert "UTF-8" in finished.stderr
