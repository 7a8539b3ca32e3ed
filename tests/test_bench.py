"""Experiments as users run them, with arms that need no model: what fails stays in its own row, nothing is lost."""

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bakeoff.bench import runner, work
from bakeoff.bench.experiment import Arm, Experiment, from_toml, parse_arms
from bakeoff.bench.lineup import precisions
from bakeoff.bench.opening import Opener
from bakeoff.bench.work import prompts, seed_of
from bakeoff.errors import UsageError
from bakeoff.models.prompts import prompt_set
from bakeoff.reports.compare import compare
from bakeoff.reports.record import read_record
from bakeoff.reports.summary import summarize

ADAPTER = str(Path(__file__).parent / "adapters" / "drawing.py")


def drawing(name, **options):
    return Arm(name, adapter=ADAPTER, options=options)


def experiment(*arms, **fields):
    given = {
        "model": "shapes",
        "arms": arms,
        "baseline": arms[0].name,
        "reference": arms[0].name,
        "timed_prompts": 3,
        "quality_prompts": 3,
        "steps": 1,
        "blocks": 2,
        "repetitions": 3,
        "timeout_s": 20.0,
    }
    return Experiment(**{**given, **fields})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One experiment whose arms fail in every way that there is, and one that is twice as slow."""
    folder = tmp_path_factory.mktemp("run")
    arms = (
        drawing("plain", sleep=0.02),
        drawing("slow", sleep=0.1),
        drawing("caching", sleep=0.02, caches=True),
        drawing("threads", sleep=0.004, more_threads=3),
        drawing("drifting", drifts=0.1),
        drawing("unloadable", at_load="raise"),
        drawing("memory", at_call=3, kind="raise"),
        drawing("crash", at_call=3, kind="crash"),
        drawing("killed", at_call=3, kind="kill"),
        drawing("hang", at_call=3, kind="hang"),
        Arm("lost", adapter=ADAPTER, python="/no/such/python"),
    )
    budgets = {"slow": {"median_s": 10, "peak_anon_bytes": 1000}}
    declared = replace(experiment(*arms, steps=3, budgets=budgets), timeout_s=10.0)
    lines = []
    record = runner.run(declared, folder, lambda text, *_: lines.append(text))
    return folder, declared, record, lines


def rows(measured):
    return {row.name: row for row in summarize(measured[2]).rows}


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        ("unloadable", "no such device"),
        ("memory", "out of memory"),
        ("crash", "SIGSEGV"),
        ("killed", "memory ran out"),
        ("hang", "no answer"),
        ("lost", "No such file"),
    ],
)
def test_a_failing_arm_is_a_row_that_says_why(measured, arm, reason):
    row = rows(measured)[arm]
    assert reason in row.failure
    assert not row.passes


def test_a_failing_arm_takes_no_other_down(measured):
    found = rows(measured)
    assert all(len(found[name].blocks) == 2 for name in ("plain", "slow", "caching", "threads"))
    assert all(len(block) == 3 for block in found["plain"].blocks)


def test_the_stderr_of_a_failing_arm_is_kept(measured):
    entry = measured[2]["arms"]["unloadable"]["entries"]["unloadable"]
    assert "Traceback" in entry["failure"]["stderr"]


def test_the_slow_arm_is_called_slower(measured):
    assert rows(measured)["slow"].verdict.ratio.ratio > 2


def test_an_arm_that_caches_prompts_fails_its_gate(measured):
    gates = {gate.name: gate for gate in rows(measured)["caching"].gates}
    assert gates["no prompt cache"].holds is False
    assert {gate.name: gate for gate in rows(measured)["plain"].gates}["no prompt cache"].holds


def test_an_arm_with_other_threads_is_remarked(measured):
    assert any("threads" in remark for remark in rows(measured)["threads"].unfair)
    assert not rows(measured)["slow"].unfair


def test_every_block_runs_every_arm_once_in_an_order_of_its_own(measured):
    blocks = measured[2]["blocks"]
    assert [sorted(block["order"]) for block in blocks] == [sorted(blocks[0]["order"])] * 2
    declared = experiment(*(drawing(str(n)) for n in range(6)))
    assert declared.hash == experiment(*(drawing(str(n)) for n in range(6))).hash


def test_the_parent_sleeps_while_a_worker_is_timed(measured):
    shares = [run["guard"]["parent_cores"] for block in measured[2]["blocks"] for run in block["runs"].values()]
    assert sorted(shares)[len(shares) // 2] < 0.2  # of repetitions that take milliseconds


def test_a_finished_experiment_run_again_changes_nothing(measured):
    folder, declared, record, _ = measured
    before = (folder / "record.json").read_bytes()
    again = runner.run(declared, folder)
    assert again["blocks"] == json.loads(before)["blocks"] == record["blocks"]


def test_pictures_are_judged_alike_by_one_process_and_by_several(measured, tmp_path, monkeypatch):
    folder, declared, _, _ = measured
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    stripped = json.loads((copy / "record.json").read_text())
    for sharing in ("baseline again", "reference"):
        stripped["arms"][sharing]["entries"] = {}
    entries = [entry for arm in stripped["arms"].values() for entry in arm["entries"].values()]
    judged = [entry["quality"] for entry in entries if entry.get("quality", {}).pop("figures", None)]
    assert len(judged) > 2
    (copy / "record.json").write_text(json.dumps(stripped))
    monkeypatch.setattr(runner, "_PICTURES_A_CHILD", 1)
    monkeypatch.setattr(runner, "usable_cores", lambda: 2)
    asked = []
    in_child = runner.in_child
    monkeypatch.setattr(runner, "in_child", lambda *given: asked.append(given) or in_child(*given))
    runner.run(declared, copy)
    assert read_record(copy)["arms"] == read_record(folder)["arms"]
    dealt = [len(given["pairs"]) for function, given in asked if function.endswith("figures_of_all")]
    assert len(dealt) == 2
    assert max(dealt) - min(dealt) <= 1


def test_arms_may_draw_at_once_and_are_judged_before_anything_is_timed(tmp_path):
    arms = (drawing("one"), drawing("two"), drawing("crash", at_call=1, kind="crash"))
    lines = []
    declared = experiment(*arms, repetitions=1)
    record = runner.run(declared, tmp_path, lambda text, *_: lines.append(text), jobs=3)
    assert lines.index("judging the pictures of 3 arms") < lines.index("memory, stages: one")
    assert record["arms"]["crash"]["entries"]["crash"]["failure"]["during"] == "pictures"
    for name in ("one", "two"):
        about = record["arms"][name]["entries"][name]
        assert about["memory"]["cold_load_s"] > 0
        assert len(about["quality"]["figures"]["psnr_db"]) == 3
    assert len(record["blocks"]) == 2
    again = []
    runner.run(declared, tmp_path, lambda text, *_: again.append(text), jobs=3)
    assert not any(line.startswith(("memory", "judging", "pictures: ")) for line in again)
    with pytest.raises(UsageError, match="got 0 jobs"):
        runner.run(declared, tmp_path, jobs=0)


def test_an_interrupted_experiment_goes_on_at_the_next_block(tmp_path):
    declared = experiment(drawing("one"), drawing("two"))

    def interrupt(line, *_):
        if line.startswith("block 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(declared, tmp_path, interrupt)
    kept = read_record(tmp_path)["blocks"]
    assert len(kept) == 1
    lines = []
    record = runner.run(declared, tmp_path, lambda text, *_: lines.append(text))
    assert record["blocks"][0] == kept[0]
    assert len(record["blocks"]) == 2
    assert not any(line.startswith(("block 1", "memory", "pictures")) for line in lines)


def test_another_experiment_in_the_same_folder_is_refused(measured):
    folder, declared, _, _ = measured
    with pytest.raises(UsageError, match="steps differ"):
        runner.run(replace(declared, steps=2), folder)


@pytest.mark.slow
def test_a_sweep_measures_every_point(tmp_path):
    declared = experiment(drawing("one"), drawing("two"), sweep={"steps": [1, 2], "batch": [1, 2]}, repetitions=2)
    record = runner.run(declared, tmp_path)
    found = summarize(record).rows
    assert {row.point for row in found} == {f"batch {b}, steps {s}" for b in (1, 2) for s in (1, 2)}
    assert {row.batch for row in found} == {1, 2}
    assert all(len(row.blocks) == 2 and (row.verdict or row.arm == "one") for row in found)


def test_records_of_the_same_work_are_compared_unpaired(measured):
    folder, _, record, _ = measured
    compared = {each.name: each for each in compare(record, record, (folder, folder))}
    assert compared["plain"].first_psnr_db == compared["plain"].second_psnr_db == 200
    assert compared["unloadable"].first_psnr_db is None
    assert compared["plain"].low <= 1 <= compared["plain"].high
    other = json.loads(json.dumps(record))
    other["experiment"]["steps"] = 9
    with pytest.raises(UsageError, match="steps: 3 and 9"):
        compare(record, other)


def test_arms_of_the_command_line():
    assert [arm.name for arm in parse_arms("torch:fp32, openvino:bf16,vae_decoder=torch:fp32,onnx:fp32@cpu")] == [
        "torch:fp32",
        "openvino:bf16,vae_decoder=torch:fp32",
        "onnx:fp32@cpu",
    ]
    assert parse_arms("owner/name")[0].folder == "owner/name"
    with pytest.raises(UsageError):
        parse_arms("torch")


def test_an_arm_may_be_a_recipe_file(tmp_path):
    file = tmp_path / "mixed.toml"
    file.write_text(
        'backend = "openvino"\nprecision = "bf16"\n[parts.vae_decoder]\nbackend = "torch"\nprecision = "fp32"'
    )
    arm = parse_arms(str(file))[0]
    assert arm.recipe == str(file)
    assert precisions(arm) == {"bf16", "fp32"}
    with pytest.raises(UsageError, match="no recipe file"):
        parse_arms("none/such.toml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model = ", "not TOML"),
        ('model = "shapes"', "no model or no arms"),
        ('model = "shapes"\narms = ["torch:fp32"]\nstep = 3', "did you mean|step"),
        ('model = "shapes"\narms = ["torch:fp32"]\nblocks = 0', "blocks"),
        ('model = "shapes"\narms = ["torch:fp32"]\nbaseline = "onnx:fp32"', "baseline"),
        ('model = "shapes"\narms = ["torch:fp32", "torch:fp32"]', "each named once"),
        ('model = "shapes"\narms = ["torch:fp32"]\n[sweep]\ncolour = [1]', "axis"),
    ],
)
def test_a_bad_experiment_is_refused(text, match):
    with pytest.raises(UsageError, match=match):
        from_toml(text)


def test_work_that_changed_since_the_record_was_begun_is_refused(tmp_path):
    texts, folder = tmp_path / "p.txt", tmp_path / "record"
    *same, other = [prompt.text for prompt in prompt_set("shapes-64")[:4]]
    texts.write_text("\n".join(same))
    declared = experiment(drawing("one"), prompts=str(texts), blocks=1, repetitions=1)
    runner.run(declared, folder)
    texts.write_text("\n".join([*same[:2], other]))
    with pytest.raises(UsageError, match="begun with another prompts than what is here now"):
        runner.run(declared, folder)
    texts.write_text("\n".join(same))
    record = json.loads((folder / "record.json").read_text())
    record["machine"]["cpu"] = "another"
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="begun with another machine"):
        runner.run(declared, folder)


def test_a_folder_that_was_exported_again_is_refused(baked, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(baked("null:fp32", proved=True), folder)
    declared = experiment(Arm("it", folder=str(folder)), blocks=1, repetitions=1)
    record = {"arms": {"it": {"entries": {}, "artifact": {"folder": str(folder), "key": "another"}}}}
    with Opener(declared, tmp_path, record) as opener, pytest.raises(UsageError, match="is another artifact"):
        runner._Run(opener, record, lambda *_: None)._bake(declared.arms[0])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"height": 64}, "got height 64 and width None, expected both or neither"),
        ({"batch": 16, "timed_prompts": 8, "quality_prompts": 4}, "got a batch of 16 and 8 prompts"),
        ({"sweep": {"batch": [1, 16]}, "timed_prompts": 8, "quality_prompts": 4}, "got a batch of 16 and 8 prompts"),
        ({"name": "reference"}, "got an arm named 'reference', which is the name of one that every experiment adds"),
    ],
)
def test_work_that_cannot_be_done_as_declared_is_refused(fields, match):
    arm = Arm(fields.pop("name", "it"), recipe="torch:fp32")
    with pytest.raises(UsageError, match=match):
        Experiment("shapes", (arm,), arm.name, **fields)


def test_layers_of_fewer_bits_decide_which_gate_an_arm_has(tmp_path):
    recipe = tmp_path / "mixed.toml"
    recipe.write_text('backend = "onnx"\nprecision = "bf16"\n[parts.unet.layers]\nconv_in = "int4"\n')
    assert precisions(Arm("it", recipe=str(recipe))) == {"bf16", "int4"}


def test_an_experiment_file_says_what_the_options_say():
    text = 'model = "shapes"\narms = ["torch:fp32", {name = "mine", folder = "x"}]\n[sweep]\nsteps = [1, 2]'
    declared = from_toml(text)
    assert declared.baseline == "torch:fp32"
    assert declared.arm("mine").folder == "x"
    assert list(declared.points()) == ["steps 1", "steps 2"]


def test_recipes_are_exported_with_the_experiments_calibration(tmp_path, monkeypatch):
    text = 'model = "shapes"\narms = ["torch:fp32", "onnx:w8a8"]\n'
    declared, seen = from_toml(text + 'calibration = "scales.safetensors"'), []

    def child(function, arguments):
        assert function == "bakeoff.bench.work:bake"
        return work.bake(**arguments), None

    def planned(model, recipe, **options):
        seen.append((model, str(recipe.default.precision), options["calibration"]))
        raise UsageError(model)

    monkeypatch.setattr(runner, "in_child", child)
    monkeypatch.setattr("bakeoff.plan.plan", planned)
    run = runner._Run(Opener(declared, tmp_path, {}), {"arms": {}}, lambda *_: None)
    run._bake(declared.arms[1])
    assert seen == [("shapes", "w8a8", "scales.safetensors")]
    assert not {"calibration", "prove"} & set(from_toml(text).as_dict()), "older experiments keep their hash"
    assert from_toml(text).hash != declared.hash


def test_arms_are_proved_unless_the_experiment_says_no(monkeypatch, tmp_path):
    text, seen = 'model = "shapes"\narms = ["null:fp32"]\n', []
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path))
    monkeypatch.setattr(
        "bakeoff.bake.export",
        lambda *_, **options: seen.append(options["prove"]) or (_ for _ in ()).throw(UsageError("x")),
    )
    for declared in (from_toml(text), from_toml(f"{text}prove = false\n")):
        with pytest.raises(UsageError):
            work.bake("shapes", "null:fp32", prove=declared.prove)
    assert seen == [True, False]
    assert from_toml(text).hash != declared.hash


def test_sizes_are_swept_together():
    declared = from_toml('model = "shapes"\narms = ["torch:fp32"]\n[sweep]\nsize = ["64x64", "64x128"]')
    assert [(point.height, point.width) for point in declared.points().values()] == [(64, 64), (64, 128)]
    with pytest.raises(UsageError, match="HEIGHTxWIDTH"):
        from_toml('model = "shapes"\narms = ["torch:fp32"]\n[sweep]\nsize = [64]')


def test_seeds_come_from_ids():
    assert seed_of("shapes-256/0000") == seed_of("shapes-256/0000") != seed_of("shapes-256/0001")
    with pytest.raises(UsageError, match="at least 300"):
        prompts("default", 300)


@pytest.mark.slow
def test_a_budget_is_held_by_the_fixture(bakeoff):
    arms = [{"name": name, "adapter": ADAPTER, "options": {"sleep": 0.004}} for name in ("a", "b")]
    fields = {"timed_prompts": 2, "quality_prompts": 2, "steps": 1, "blocks": 2, "repetitions": 3}
    measured = bakeoff(model="shapes", arms=arms, reference="a", **fields)
    measured.require("b", ratio=1e6, psnr_db=100, gates=False)
    with pytest.raises(AssertionError, match="of a's time, at most 0.001"):
        measured.require("b", ratio=0.001)
    with pytest.raises(AssertionError, match="anonymous memory"):
        measured.require("b", peak_anon_bytes=1000)


@pytest.mark.slow
def test_what_an_adapter_imports_is_part_of_its_load(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(f"import time\ntime.sleep(1.5)\n{Path(ADAPTER).read_text()}")
    arms = (drawing("plain"), Arm("slow to import", adapter=str(slow)))
    record = runner.run(experiment(*arms, repetitions=1), tmp_path / "run")
    told = {name: about["entries"][name]["memory"]["cold_load_s"] for name, about in list(record["arms"].items())[:2]}
    assert told["slow to import"] > 1.5 > told["plain"]


def test_resident_arms_are_opened_once(tmp_path):
    declared = experiment(drawing("one"), drawing("two", at_call=9, kind="crash"), resident=True, blocks=3)
    record = runner.run(declared, tmp_path)
    runs = [block["runs"] for block in record["blocks"]]
    assert [bool(each["one"]["load_s"]) for each in runs] == [True, False, False]
    found = {row.name: row for row in summarize(record).rows}
    assert len(found["one"].blocks) == 3
    assert found["one"].load_s
    assert "SIGSEGV" in found["two"].failure


def test_arms_that_draw_at_once_end_where_the_run_does(tmp_path):
    def interrupt(line, *_):
        if line == "pictures: quick":
            raise KeyboardInterrupt

    declared = experiment(
        drawing("quick"), *(drawing(f"slow {each}", sleep=60.0) for each in range(3)), timeout_s=600.0
    )
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run(declared, tmp_path, interrupt, jobs=2)
    assert time.monotonic() - began < 60
    assert not any("failure" in arm["entries"].get(name, {}) for name, arm in read_record(tmp_path)["arms"].items())


def test_resident_arms_that_drew_at_once_stay_to_be_timed(tmp_path, monkeypatch):
    started = []
    own = Opener.started
    monkeypatch.setattr(Opener, "started", lambda *given: started.append((given[1].name, given[2])) or own(*given))
    declared = experiment(drawing("one", sleep=0.05), drawing("two"), resident=True)
    record = runner.run(declared, tmp_path, jobs=2)
    assert started.count(("one", "pictures")) == started.count(("one", "profile")) == 1
    assert ("one", "timed") not in started
    assert ("baseline again", "timed") in started  # which draws nothing of its own
    assert [block["runs"]["one"]["load_s"] for block in record["blocks"]] == [None, None]
    row = {row.name: row for row in summarize(record).rows}["two"]
    assert row.load_s is None
    assert row.break_even is not None  # by the memory run's load


def test_floors_are_measured_beside_the_arms(measured):
    quality = measured[2]["arms"]["fp32 floor"]["entries"]["fp32 floor"]["quality"]
    timed = measured[2]["blocks"][0]["runs"]["plain"]
    threads = [each["configuration"]["adapter"]["all"]["threads"] for each in (quality, timed)]
    assert threads[0] != threads[1]
    assert min(quality["figures"]["psnr_db"]) == 200
    assert any("other threads" in line for line in summarize(measured[2]).noise())


def test_the_same_arm_under_another_name_makes_its_pictures_once(measured):
    folder, _, record, _ = measured
    logs = {file.name.rpartition("-")[2] for file in (folder / "logs").glob("baseline-again-*")}
    assert logs == {"timed.txt"}
    assert not list((folder / "logs").glob("reference-*"))
    again = record["arms"]["baseline again"]["entries"]["baseline again"]["quality"]
    assert again == record["arms"]["plain"]["entries"]["plain"]["quality"]


def test_latents_are_followed_along_the_steps(measured):
    found = {row.name: row.figures["trajectory"] for row in rows(measured).values() if row.figures}
    assert found["slow"] == [0, 0, 0]
    assert found["drifting"] == pytest.approx([0.1, 0.2, 0.3])


def test_metrics_without_weights_say_so(measured):
    assert "LPIPS" in summarize(measured[2]).unmeasured()


def test_weights_that_are_not_there_are_said_before_anything_runs(tmp_path):
    lines = []
    declared = experiment(drawing("one"), metrics={"lpips": str(tmp_path / "none")})
    with pytest.raises(UsageError, match="none"):
        runner.run(declared, tmp_path / "run", lambda text, *_: lines.append(text))
    assert lines == ["opening the weights of lpips"]


def test_a_budget_is_part_of_the_experiment(measured):
    row = rows(measured)["slow"]
    assert [gate.holds for gate in row.gates if gate.name == "budget"] == [True, False]
    assert not row.passes


def test_the_bar_shows_jobs_and_keeps_failures(capsys):
    from bakeoff.bench.display import Display

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Display(stream) as display:
        display("block 1 of 2: one", 3, 10)
        display("two failed: no memory", 4, 10)
    assert "3/10" in stream.getvalue()
    assert "two failed: no memory\n" in stream.getvalue()


def test_energy_is_the_difference_of_counters(tmp_path):
    from bakeoff.bench import energy

    for name, label in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core")):
        (tmp_path / name).mkdir()
        for file, content in (("name", label), ("energy_uj", "9000000"), ("max_energy_range_uj", "10000000")):
            (tmp_path / name / file).write_text(content)
    before = energy.read(rapl=tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("2000000")  # it began again from 0
    assert energy.between(before, energy.read(rapl=tmp_path)) == {"package-0 (intel-rapl:0)": 3.0}
    assert energy.between(energy.read(tmp_path / "none"), energy.read(tmp_path / "none")) is None


@pytest.mark.slow
def test_host_memory_agrees_with_a_known_allocation(tmp_path):
    """With a parent of 2 GB: a child's figure must not inherit it."""
    held = np.ones(2 * 10**9, np.uint8)
    arms = (drawing("none"), drawing("gigabyte", allocates=10**9))
    record = runner.run(experiment(*arms, blocks=1), tmp_path)
    none, gigabyte = (row.memory for row in summarize(record).rows)
    assert held.sum() == 2 * 10**9
    assert none["peak_anon_bytes"] < 0.2e9
    for phase in ("load", "steady"):
        assert gigabyte["peak_bytes"][phase] - none["peak_bytes"][phase] == pytest.approx(10**9, rel=0.05)
    assert gigabyte["peak_anon_bytes"] - none["peak_anon_bytes"] == pytest.approx(10**9, rel=0.05)


@pytest.mark.slow
def test_ten_kills_lose_at_most_the_running_block(tmp_path):
    declared = {
        "model": "shapes",
        "arms": [{"name": name, "adapter": ADAPTER, "options": {"sleep": 0.01}} for name in ("one", "two")],
        "reference": "one",
        "baseline": "one",
        "timed_prompts": 3,
        "quality_prompts": 3,
        "steps": 1,
        "blocks": 12,
    }
    script = f"""
import json, sys
from pathlib import Path
from bakeoff.bench.experiment import from_dict
from bakeoff.bench.runner import run
run(from_dict(json.loads({json.dumps(json.dumps(declared))})), Path(sys.argv[1]))
"""
    rng, kept = random.Random(0), []
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-P", "-c", script, str(tmp_path)])
        try:
            process.wait(rng.uniform(2, 9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (tmp_path / "record.json").exists():
            blocks = read_record(tmp_path)["blocks"]
            assert blocks[: len(kept)] == kept
            kept = blocks
    subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], check=True)
    record = read_record(tmp_path)
    assert record["blocks"][: len(kept)] == kept
    assert [block["index"] for block in record["blocks"]] == list(range(12))
    assert all(len(row.blocks) == 12 and not row.failure for row in summarize(record).rows)
