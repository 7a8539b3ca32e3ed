"""`make gpu`, tried on the CPU with tiny models: the same script, the same processes, the same record."""

import json
import runpy
import subprocess
import sys
import time
import tomllib
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bakeoff import hardware
from bakeoff.errors import BakeoffError, UnavailableError, UsageError
from bakeoff.models import drawn as models_drawn
from bakeoff.models import fullsize, tiny
from bakeoff.models.drawn import PRECISIONS, drawn
from bakeoff.recipe import Placement
from bakeoff.runtimes.engine import Engine
from bakeoff.runtimes.opening import read_folder

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
SCRIPT = FOLDER / "gpu.py"


_MISCOMPILED = {"sdxl, w8a8-dynamic, compiled blocks"}
"""torch 2.13 writes C++ for it that declares a name twice, on processors that compute in bfloat16."""


def tried(record, *only, minutes="9"):
    command = [sys.executable, "-P", str(SCRIPT), str(record), "--device", "cpu", "--tiny", "--minutes", minutes]
    done = subprocess.run([*command, "--only", *only], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(record.read_text())


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpu") / "record.json"
    return file, tried(file, "sdxl, eager", "sdxl, CUDA graphs", "sdxl, Diffusers alone, eager")


def test_an_item_has_seconds_and_says_on_what(record):
    file, found = record
    told = found["items"]["sdxl, eager bf16"]
    assert len(told["picture_s"]) >= 1
    assert 0 < told["step_s"] * 2 <= told["median_picture_s"]
    assert told["first_picture_s"] > 0
    assert told["pixels_std"] > 0
    assert told["configuration"]["precision"] == "bfloat16"
    assert told["configuration"]["device"] == "cpu"
    assert "tainted" in told["guard"]
    assert found["tiny"]
    assert found["device"] == "cpu"
    page = file.with_suffix(".md").read_text()
    assert "no figure here means anything" in page
    assert "5.58" in page
    assert "not measured here" in page


def test_diffusers_alone_does_the_same_work(record):
    _, found = record
    ours, theirs = (found["items"][f"sdxl, {name}"] for name in ("eager bf16", "Diffusers alone, eager"))
    assert theirs["configuration"] == {"class": "StableDiffusionXLPipeline", "device": "cpu", "compile": False}
    assert theirs["pixels_std"] == pytest.approx(ours["pixels_std"], rel=0.05)  # the same weights, latents and steps
    assert theirs["step_s"] is None
    assert theirs["median_picture_s"] > 0


def test_what_cannot_run_is_skipped_with_the_reason(record):
    _, found = record
    told = found["items"]["sdxl, CUDA graphs"]
    assert "CUDA graphs" in told["skipped"]
    assert told["fix"]


def test_it_goes_on_where_it_stopped(record):
    file, found = record
    again = tried(file, "sdxl, eager", "sdxl, nf4", minutes="0")
    assert again["items"]["sdxl, eager bf16"] == found["items"]["sdxl, eager bf16"]
    assert "run it again" in again["items"]["sdxl, nf4"]["not_run"]


def test_with_nothing_missing_it_shows_what_is_there(record):
    file, found = record
    name = "sdxl, eager bf16"
    assert tried(file, "sdxl, eager")["items"][name] == found["items"][name]


def test_another_machines_record_is_left_alone(record, script):
    file, found = record
    assert script["open_record"](file, "cpu", tiny=True)["items"]
    for change in ({"device": "cuda"}, {"tiny": False}):
        with pytest.raises(BakeoffError, match="was recorded with"):
            script["open_record"](file, **{"device": "cpu", "tiny": True, **change})
    assert json.loads(file.read_text())["items"].keys() >= found["items"].keys()


def test_without_a_gpu_it_says_what_is_missing(tmp_path):
    if hardware.devices()["cuda"].ok:
        pytest.skip("there is a GPU: make gpu runs")
    command = [sys.executable, "-P", str(SCRIPT), str(tmp_path / "record.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "sees no CUDA device" in done.stderr
    assert "hint:" in done.stderr
    assert not (tmp_path / "record.json").exists()


def test_it_says_at_once_that_the_bench_would_not_find_the_package(script, tmp_path, monkeypatch, capsys):
    assert script["is_installed"]()
    lacking = tmp_path / "python"
    lacking.write_text("#!/bin/sh\nexit 1\n")
    lacking.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(lacking))
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "record.json"), "--device", "cpu", "--tiny"])
    assert script["main"]() == 2
    assert "pip install -e ." in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_an_item_that_takes_too_long_is_ended_with_its_children(script, tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    run, item = script["run"], script["Item"]("slow", "picture", 1.0)
    monkeypatch.setitem(run.__globals__, "ITEMS_SCRIPT", slow)
    monkeypatch.setitem(run.__globals__, "_GRACE_S", 1.0)
    outcome = run(item, script["start"](item, tmp_path), 1.0, tmp_path)
    assert "took longer than 2 s" in outcome["failed"]
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    ends = time.monotonic() + 20
    while status.exists() and "Z (zombie)" not in status.read_text():
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_a_crash_is_the_items_own(script, tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such kernel')\n")
    monkeypatch.setitem(script["run"].__globals__, "ITEMS_SCRIPT", broken)
    item = script["Item"]("broken", "picture", 5.0)
    outcome = script["run"](item, script["start"](item, tmp_path), 5.0, tmp_path)
    assert "no such kernel" in outcome["failed"]
    assert not script["is_done"](outcome, {})


def test_the_next_items_process_gets_ready_meanwhile_and_ends_where_it_is_not_wanted(script, tmp_path, monkeypatch):
    noting = tmp_path / "noting.py"
    noting.write_text(
        "import json, os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
        "arguments = json.load(sys.stdin)\n"
        f"while len([*pathlib.Path({str(tmp_path)!r}).glob('[0-9]*')]) < arguments['least']:\n"
        "    time.sleep(0.02)\n"
        "print(json.dumps(arguments))\n"
    )
    monkeypatch.setitem(script["run"].__globals__, "ITEMS_SCRIPT", noting)
    due = [script["Item"](f"item {least}", "picture", 30.0, {"least": least}) for least in (2, 3, 3)]
    outcomes = script["_outcomes"](due, time.monotonic() + 600, tmp_path)
    assert [next(outcomes)[1]["least"] for _ in range(2)] == [2, 3]
    outcomes.close()
    pids = [file.name for file in tmp_path.glob("[0-9]*")]
    assert len(pids) == 3
    assert not [pid for pid in pids if Path("/proc", pid).exists()]
    (first, *_), told = zip(*script["_outcomes"](due, time.monotonic(), tmp_path), strict=True)
    assert first is due[0]
    assert all("run it again" in outcome["not_run"] for outcome in told)


CHORE = (
    "import json, os, sys, time\n"
    "arguments, started = json.load(sys.stdin), time.monotonic()\n"
    "time.sleep(arguments['sleeps'])\n"
    "print(json.dumps({'cores': sys.argv[2], 'from': started, 'to': time.monotonic()}))\n"
)


@pytest.fixture
def chores(script, tmp_path, monkeypatch):
    """Return `prepare`, whose jobs sleep on one of two cores each."""
    (tmp_path / "chore.py").write_text(CHORE)
    inside = script["run"].__globals__
    monkeypatch.setitem(inside, "ITEMS_SCRIPT", tmp_path / "chore.py")
    monkeypatch.setitem(inside, "_jobs_at_once", lambda _: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    return script["prepare"]


def test_chores_are_done_at_once_each_on_cores_of_its_own(script, chores, tmp_path):
    item = script["Item"]
    first, second, short = (
        item(name, "bake", budget, {"sleeps": sleeps})
        for name, budget, sleeps in (("first", 90.0, 2), ("second", 90.0, 2), ("short", 50.0, 0))
    )
    due = [item("a", "picture", 60.0, {}, (short, first)), item("b", "picture", 60.0, {}, (second, first))]
    done = chores(due, 120.0, tmp_path, "cpu")
    assert [*done] == ["first", "second", "short"], "what takes longest comes first"
    assert {done["first"]["cores"], done["second"]["cores"]} == {"0", "1"}
    assert done["first"]["from"] < done["second"]["to"]
    assert done["second"]["from"] < done["first"]["to"]
    assert all("up" in outcome["not_run"] for outcome in chores(due, 1.0, tmp_path, "cpu").values())


def test_chores_end_with_the_script(script, chores, tmp_path, monkeypatch):
    waiting, inside = [], script["run"].__globals__

    def interrupted(item, process, *_):
        waiting.append(process)
        if len(waiting) == 2:
            raise KeyboardInterrupt
        return {"failed": process.communicate()}

    monkeypatch.setitem(inside, "run", interrupted)
    jobs = tuple(script["Item"](name, "bake", 90.0, {"sleeps": 60}) for name in "abc")
    with pytest.raises(KeyboardInterrupt):
        chores([script["Item"]("due", "picture", 60.0, {}, jobs)], 120.0, tmp_path, "cpu")
    assert len(waiting) >= 2
    for process in waiting:
        assert process.wait(10)
        process.stdin.close()
        process.stdout.close()


def test_what_an_item_had_found_outlives_its_process(script, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "done.json").write_text(json.dumps({"channels_last": {"outcome": "passed", "seconds": 1.0}}))
    item = script["Item"]("features", "features", 60.0, {"work": str(tmp_path), "device": "nowhere", "only": [1]})
    told = script["run"](item, script["start"](item, tmp_path), 30.0, tmp_path)
    assert told["failed"]
    assert told["features"]["channels_last"]["outcome"] == "passed"
    assert "channels_last" in "\n".join(script["PAGE"]["_features"](told))


def test_a_result_is_found_whatever_is_printed_after_it(script):
    assert script["_result"]('loading\n{"seconds": 1}\n3\nnccl says goodbye\n') == {"seconds": 1}
    assert script["_result"]("killed") is None


def test_compiled_rows_say_what_was_compiled_before(script):
    outcome = {"median_picture_s": 3.0, "prepared": {"sdxl, compiling bf16": {"compiled_s": 61.2}}}
    assert "compiled before, in 61 s" in script["PAGE"]["_row"]("sdxl, compiled blocks", outcome)
    items = script["items"]("cuda", Path("work"), tiny=False)
    compiled = [item for item in items if item.arguments.get("placement", {}).get("compile") == "regional"]
    assert compiled
    for item in compiled:
        (chore,) = item.chores
        assert chore.arguments["precision"] == item.arguments["precision"]


def test_arms_are_dealt_to_bakers_as_their_artifacts_are_keyed(shapes):
    arms = [
        "torch:fp32@cpu", "torch:bf16@cpu", "torch:bf16+compile=regional@cpu", "onnx:int8@cpu", "torch:w8a8@cpu",
        "tensorrt:fp16@cpu", "onnx:fp32@cpu",
    ]  # fmt: skip
    assert shapes["jobs"](arms, 2) == [
        ["torch:w8a8@cpu", "onnx:int8@cpu"],  # whose codes a calibration changes
        ["torch:fp32@cpu", "onnx:fp32@cpu"],
        ["torch:bf16@cpu"],
    ]
    assert shapes["jobs"](["onnx:int8@cpu", "torch:fp32@cpu"], 1) == [["onnx:int8@cpu", "torch:fp32@cpu"]]


def test_the_arms_that_are_baked_beforehand_are_found_again(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path / "home"))
    arms = ["null:fp32@cpu", "torch:fp16@cpu", "tflite:fp16@cpu"]
    told = shapes["bake"](str(tmp_path), "cpu", arms, 60.0)
    assert [*told["export_s"]] == arms[:2]
    assert "tflite" in told["left_out"][arms[2]]
    again = shapes["bake"](str(tmp_path), "cpu", arms, 60.0)
    assert again["export_s"] == dict.fromkeys(arms[:2])


def test_a_model_of_few_layers_has_the_widths_of_the_whole():
    _, _, whole = fullsize.config("sdxl", "unet")
    _, _, few = fullsize.config("sdxl", "unet", depth=2)
    assert few["transformer_layers_per_block"] == [1, 2, 2]
    assert {name for name in whole if few[name] != whole[name]} == {"transformer_layers_per_block"}
    assert fullsize.config("flux.1-dev", "transformer", depth=2)[2]["num_single_layers"] == 2
    assert fullsize.config("sd-3.5-medium", "transformer", depth=3)[2]["dual_attention_layers"] == [0]


def test_what_was_lacking_is_tried_again_once_something_is_installed(script):
    lacked, now = {"torch": "2.13"}, {"torch": "2.13", "onnxruntime-gpu": "1.31"}
    for outcome in ({"skipped": "no provider"}, {"left_out": {"tensorrt:fp16@cuda": "no TensorRT"}, "arms": []}):
        assert script["is_done"]({**outcome, "tried_with": lacked}, lacked)
        assert not script["is_done"]({**outcome, "tried_with": lacked}, now)
    assert script["is_done"]({"step_s": 1.0, "tried_with": lacked}, now)
    assert script["is_done"]({"left_out": {}, "arms": [], "tried_with": lacked}, now)
    assert not script["is_done"]({"unfinished": "run it again", "tried_with": now}, now)


def test_figures_are_kept_where_another_try_came_to_nothing(script):
    kept, figures = script["kept"], {"arms": [], "left_out": {"x": "y"}}
    assert kept(figures, {"not_run": "0 s were left"}) is figures
    assert kept(figures, {"failed": "out of memory"}) is figures
    assert kept(figures, {"arms": [1]}) == {"arms": [1]}
    assert kept({"failed": "hung"}, {"skipped": "no room"}) == {"skipped": "no room"}
    salvaged = {"failed": "killed", "arms": [1]}
    assert kept(salvaged, {"not_run": "0 s were left"}) is salvaged
    assert kept({"features": [1], "unfinished": "too few"}, {"features": [1, 2], "failed": "killed"})["features"] == [
        1,
        2,
    ]
    assert kept({"features": [1, 2]}, {"features": [1], "failed": "killed"})["features"] == [1, 2]
    assert kept(None, {"failed": "hung"}) == {"failed": "hung"}


def test_a_driver_or_nvml_that_came_later_is_no_other_machine(script, tmp_path, monkeypatch):
    file, gpu = tmp_path / "record.json", {"name": "H100", "driver": "580.1"}
    open_record = script["open_record"]
    told = {"cpu": "x", "gpus": []}
    monkeypatch.setattr(open_record.__globals__["hardware"], "describe", lambda: told)
    file.write_text(json.dumps(open_record(file, "cpu", tiny=True)))
    told["gpus"] = [gpu]
    file.write_text(json.dumps({**open_record(file, "cpu", tiny=True), "machine": {**told}}))
    told["gpus"] = [{**gpu, "driver": "590"}]
    open_record(file, "cpu", tiny=True)
    told["gpus"] = [{"name": "A100"}]
    with pytest.raises(BakeoffError, match="gpus"):
        open_record(file, "cpu", tiny=True)


def test_tensorrts_extra_brings_no_onnxruntime_over_that_of_a_gpu():
    extras = tomllib.loads((FOLDER.parent.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [each for each in extras["tensorrt"] if "onnxruntime" in each or "bakeoff[" in each]
    assert set(extras["tensorrt"]) >= {each for each in extras["onnx"] if "onnxruntime" not in each}


def test_what_there_is_to_run(script, tmp_path):
    items = script["items"]("cuda", tmp_path, tiny=False)
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    models = set(fullsize.models()) - {"sd-1.5"}
    assert {item.arguments["model"] for item in items if item.kind == "picture"} == models
    assert {item.arguments["precision"] for item in items if item.kind == "picture"} == {
        "bf16", "nf4", "int8", "fp8", "w8a8-dynamic"
    }  # fmt: skip
    for item in items:
        if item.kind == "picture":
            Placement("cuda", **item.arguments["placement"])
    (flux,) = [item for item in items if item.name == "flux.1-dev, eager bf16"]
    assert (flux.arguments["steps"], flux.arguments["size"]) == (28, 1024)  # as the anchors


ARMS = ["null:fp32@cpu", "null:fp32+cuda_graphs@cpu", "torch:bf16+cuda_graphs@cpu", "tflite:fp16@cpu"]


@pytest.fixture(scope="module")
def shapes():
    return runpy.run_path(str(FOLDER / "gpu_shapes.py"))


def test_arms_that_cannot_run_are_left_out_with_the_reason(shapes):
    found, left_out = shapes["_possible"](ARMS, "cpu")
    assert found == ["null:fp32@cpu"]
    assert left_out["null:fp32+cuda_graphs@cpu"] == "null has no cuda_graphs"
    assert "it would run on cpu" in left_out["torch:bf16+cuda_graphs@cpu"]
    assert left_out["tflite:fp16@cpu"] == "no backend tflite is installed"


def test_the_embedded_models_item_does_as_much_as_fits(shapes):
    fitting = shapes["fitting"]
    assert fitting(1024, 32, arms=12, jobs=8, pace_s=0.14, seconds=90) == 1024
    assert fitting(1024, 32, arms=12, jobs=4, pace_s=0.14, seconds=90) == 256
    assert fitting(1024, 32, arms=12, jobs=8, pace_s=5.0, seconds=90) == 64
    assert fitting(1024, 32, arms=18, jobs=1, pace_s=5.0, seconds=90) == 8
    assert fitting(2, 1, arms=1, jobs=1, pace_s=9.0, seconds=1) == 2


def test_what_is_there_when_the_time_is_up_is_summed_up(shapes, tmp_path, monkeypatch):
    def endless(declared, folder, say, jobs):
        folder.mkdir()
        about = {"entries": {}, "failure": {"during": "export", "reason": "no room", "stderr": ""}}
        machine = {"cpu": "x", "usable_cores": 1, "memory_bytes": 1e9}
        record = {"experiment": declared.as_dict(), "machine": machine, "started": "now", "blocks": []}
        (folder / "record.json").write_text(json.dumps({**record, "arms": {ARMS[0]: about}}))
        go_on(say)

    def go_on(say):
        while True:
            say("drawing", 1, 9)
            time.sleep(0.01)

    monkeypatch.setattr("bakeoff.bench.runner.run", endless)
    monkeypatch.setitem(shapes["shapes"].__globals__, "_pace", lambda *_: 0.01)
    for _ in range(2):  # the second goes on with the first one's record
        told = shapes["shapes"](str(tmp_path), "cpu", ARMS, blocks=2, prompts=2, batch=1, steps=2, jobs=1, budget_s=3.0)
        assert "run it again" in told["unfinished"]
        assert "no room" in told["markdown"]
        assert told["left_out"]
        monkeypatch.setattr("bakeoff.bench.runner.run", lambda *given: go_on(given[2]))


def test_the_model_is_calibrated_once_for_the_recipes_that_take_it(shapes, tmp_path, monkeypatch):
    calls = []

    def calibrate(model, prompts, **_):
        calls.append((model, len(prompts)))
        return SimpleNamespace(save=lambda file: file.touch())

    monkeypatch.setattr("bakeoff.tuning.calibrate.calibrate", calibrate)
    calibration = shapes["_calibration"]
    assert calibration(tmp_path, ["torch:fp32@cpu", "torch:w8a8-dynamic@cpu"]) is None
    files = {calibration(tmp_path, ["torch:fp32@cpu", "tensorrt:w8a8@cpu"]) for _ in range(2)}
    assert files == {str(tmp_path / "shapes-calibration.safetensors")}
    assert calls == [("shapes", 16)]


@pytest.mark.slow
def test_the_embedded_models_item_judges(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path / "home"))
    told = shapes["shapes"](str(tmp_path), "cpu", ARMS, blocks=2, prompts=4, batch=2, steps=2, jobs=2, budget_s=600.0)
    assert "unfinished" not in told
    assert [row["arm"] for row in told["arms"]["rows"] if "null" in row["arm"]]
    assert "null:fp32@cpu" in told["markdown"]
    assert Path(told["bench_record"]).is_file()


@pytest.fixture
def trying():
    return runpy.run_path(str(FOLDER / "gpu_features.py"))


def test_features_pass_or_are_skipped_with_the_reason(trying, tmp_path):
    names = ["attention=math", "offload=parts", "mixed devices", "offload=blocks", "CUDA graphs in torch", "TensorRT"]
    told = trying["features"](str(tmp_path), "cpu", 600.0, names)
    outcomes = {name: each["outcome"] for name, each in told["features"].items()}
    assert outcomes == dict.fromkeys(names[:3], "passed") | dict.fromkeys(names[3:], "skipped")
    assert told["features"]["attention=math"]["read back"] > 0
    assert told["features"]["offload=parts"]["db"] > 60
    assert set(told["left_out"]) == set(names[3:])
    assert "where weights are already" in told["left_out"]["offload=blocks"]
    assert "NVIDIA" in told["left_out"]["TensorRT"]
    assert not (tmp_path / "features" / "done.json").exists()


def test_a_feature_that_takes_no_effect_or_draws_something_else_fails(trying, tmp_path, monkeypatch):
    trial = trying["Trial"](tmp_path, "cpu")
    idle = trying["Feature"]("torch:fp32", lambda told: told["unet"]["cuda_graphs"])
    assert "it took no effect" in trying["tried"](trial, idle)["reason"]
    monkeypatch.setitem(trying["near"].__globals__, "LEAST_DB", 300.0)
    told = trying["tried"](trial, trying["Feature"]("torch:fp32", bool))
    assert told["outcome"] == "failed"
    assert "dB from that without it" in told["reason"]


def test_a_feature_that_ends_the_process_fails_and_the_others_go_on(trying, tmp_path, monkeypatch, script):
    def dies(*_):
        raise SystemExit

    features, inside = trying["features"], trying["features"].__globals__
    monkeypatch.setitem(inside, "FEATURES", {"one": "dies", "two": "fine"})
    monkeypatch.setitem(inside, "dies", dies)
    monkeypatch.setitem(inside, "fine", lambda _: {"db": 60.0})
    with pytest.raises(SystemExit):
        features(str(tmp_path), "cpu", 600.0)
    assert "run it again" in features(str(tmp_path), "cpu", 0.0)["unfinished"]
    told = features(str(tmp_path), "cpu", 600.0)
    assert told["features"]["one"] == {
        "outcome": "failed",
        "reason": "the process ended while it ran, or the time was up",
    }
    assert told["features"]["two"]["outcome"] == "passed"
    lines = script["PAGE"]["_features"](told)
    assert "| one | failed | – | the process ended while it ran, or the time was up |" in lines
    assert any(line.startswith("| two | passed |") and "db 60.0" in line for line in lines)


def test_copies_are_counted_in_a_trace(trying):
    """As torch's profiler writes it."""

    def event(name, size, cat="gpu_memcpy"):
        return {"ph": "X", "cat": cat, "name": name, "args": {"bytes": size, "stream": 7}}

    events = [
        event("Memcpy HtoD (Pinned -> Device)", 4096),
        event("Memcpy DtoH (Device -> Pageable)", 12288),
        event("Memcpy DtoH (Device -> Pinned)", 8),
        event("Memcpy DtoD (Device -> Device)", 4096),
        {"ph": "X", "cat": "kernel", "name": "gemm", "args": {}},
        {"ph": "M", "name": "process_name"},
    ]
    assert trying["large_copies"](events) == 2


def test_a_feature_that_fails_beside_other_work_is_tried_again_alone(trying, tmp_path, monkeypatch):
    features, inside = trying["features"], trying["features"].__globals__
    found = [RuntimeError("no memory was left")]

    def shy(_):
        if found:
            raise found.pop()
        return {"db": 60.0}

    monkeypatch.setitem(inside, "FEATURES", {"one": "shy", "two": "fine", "TensorRT": "fine"})
    monkeypatch.setitem(inside, "shy", shy)
    monkeypatch.setitem(inside, "fine", lambda _: {"db": 60.0})
    told = features(str(tmp_path), "cpu", 600.0, beside=True)
    assert [*told["features"]] == ["two"]
    assert told["unfinished"]
    told = features(str(tmp_path), "cpu", 600.0)
    assert {name: each["outcome"] for name, each in told["features"].items()} == dict.fromkeys(
        ("one", "two", "TensorRT"), "passed"
    )
    assert "unfinished" not in told


def test_diffusers_computes_from_quantized_folders_what_we_do(trying, tmp_path, monkeypatch):
    told = trying["tried"](trying["Trial"](tmp_path, "cpu"), "torchao_folders")
    assert told["outcome"] == "passed", told
    assert all(told[precision][part] > 25 for precision in ("w8a8-dynamic", "fp8") for part in ("unet", "text_encoder"))
    told = trying["tried"](trying["Trial"](tmp_path, "cpu"), "bitsandbytes_folders")
    assert (told["outcome"], "on a GPU alone" in told["reason"]) == ("skipped", True)
    monkeypatch.setitem(trying["in_diffusers"].__globals__, "LEAST_DB", 300.0)
    with pytest.raises(RuntimeError, match="computes something else"):
        trying["in_diffusers"](trying["Trial"](tmp_path, "cpu"), "w8a8-dynamic")


@pytest.mark.slow
def test_exchanged_loras_are_held_against_torchs(trying, tmp_path, monkeypatch):
    """The steps that TensorRT's engines get, on engines of torch."""
    inside, trial = trying["refitted"].__globals__, trying["Trial"](tmp_path, "cpu")
    monkeypatch.setitem(inside, "_ENGINE", trying["_PLAIN_FP16"])
    opened = type(trial).open
    monkeypatch.setattr(type(trial), "open", lambda self, recipe, how: opened(self, recipe.removesuffix("+refit"), how))
    told = trying["refitted"](trial)
    assert told["LoRA against torch, db"] == told["db"] == 200.0
    monkeypatch.setitem(inside, "_lora", lambda file, _: trying["_lora"](file, 1))  # both the same
    with pytest.raises(RuntimeError, match="A, B, A"):
        trying["refitted"](trial)


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    return fullsize.build("flux.1-dev", tmp_path_factory.mktemp("drawn") / "flux", hollow=True, small=True)


def test_a_folder_is_there_once_it_is_whole(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fullsize, "write_module", killed)
        with pytest.raises(KeyboardInterrupt):
            fullsize.build("sdxl", tmp_path / "full", hollow=True, small=True)
        patch.setattr(tiny, "_write_index", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.build("stable-diffusion", tmp_path / "tiny")
    assert not [*tmp_path.iterdir()]
    assert (fullsize.build("sdxl", tmp_path / "full", hollow=True, small=True) / "unet" / "config.json").is_file()


@pytest.mark.parametrize("precision", [each for each in PRECISIONS if each != "fp8"])
def test_weights_are_drawn_where_they_run(hollow, precision):
    made = []
    for _ in range(2):
        with Engine(drawn(read_folder(hollow), precision, "cpu"), Placement("cpu", threads=1)) as engine:
            made.append(engine.generate("a cat", seeds=1, steps=1, size=(64, 64)).images)
            kinds = {type(layer).__name__ for layer in engine._stations["transformer"].runtime.module().modules()}
    assert (made[0] == made[1]).all()
    assert made[0].std() > 1
    wanted = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}.get(precision, "Linear")
    assert wanted in kinds


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_layer_is_quantized_before_the_next_one_is_drawn(hollow, precision, monkeypatch):
    pytest.importorskip("bitsandbytes")
    seen, alive = [], []
    whole = models_drawn._bitsandbytes

    def quantized(layer, precision):
        alive.append(sum(each() is not None for each in seen))
        seen.append(weakref.ref(layer.weight))
        return whole(layer, precision)

    monkeypatch.setattr(models_drawn, "_bitsandbytes", quantized)
    made = drawn(read_folder(hollow), precision, "cpu")
    component = made.family.part("transformer").component
    component.load(made.folders["transformer"], torch.bfloat16)
    assert len(seen) > 10
    assert not any(alive)


def test_each_kind_of_memory_has_a_column_of_its_own(script):
    memory = {"allocator_peak_bytes": 3e9, "reserved_peak_bytes": 4e9, "process_bytes": 5e9}
    assert "| 3.00 | 4.00 | 5.00 |" in script["PAGE"]["_row"]("x", {"memory": memory})
    assert "| – | – | 5.00 |" in script["PAGE"]["_row"]("x", {"memory": {"process_bytes": 5e9}})


def test_8_bit_floats_are_refused_without_a_gpu_that_has_them(hollow):
    with Engine(drawn(read_folder(hollow), "fp8", "cpu"), Placement("cpu", threads=1)) as engine:
        with pytest.raises(UnavailableError, match="compute capability 8.9"):
            engine.generate("a cat", seeds=1, steps=1, size=(64, 64))
    with pytest.raises(UsageError, match="'fp8'"):
        drawn(read_folder(hollow), "fp9", "cpu")


@pytest.mark.slow
def test_the_whole_script_runs_at_tiny_size(tmp_path):
    """Everything that a GPU would run, compilers and ONNX export included."""
    file = tmp_path / "record.json"
    for _ in range(4):
        found = tried(file, "")
        if all("not_run" not in told and "failed" not in told for told in found["items"].values()):
            break
    failed = {name for name, told in found["items"].items() if "failed" in told or "not_run" in told}
    assert failed <= (_MISCOMPILED if hardware.has_instructions("avx512_bf16") else set()), found["items"]
    assert found["items"]["shapes"]["left_out"]
    assert found["items"]["sdxl, UNet in ONNX Runtime, float16"]["median_picture_s"] > 0
