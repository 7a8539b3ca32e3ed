"""Experiments as users run them, with arms that need no model: what fails stays in its own row, nothing is lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bakeoff.bench import runner
from bakeoff.bench.experiment import Arm, Experiment, from_toml, parse_arms
from bakeoff.bench.work import prompts, seed_of
from bakeoff.errors import UsageError
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
        drawing("plain", sleep=0.004),
        drawing("slow", sleep=0.02),
        drawing("caching", sleep=0.02, caches=True),
        drawing("threads", sleep=0.004, more_threads=3),
        drawing("unloadable", at_load="raise"),
        drawing("memory", at_call=3, kind="raise"),
        drawing("crash", at_call=3, kind="crash"),
        drawing("killed", at_call=3, kind="kill"),
        drawing("hang", at_call=3, kind="hang"),
        Arm("lost", adapter=ADAPTER, python="/no/such/python"),
    )
    declared = replace(experiment(*arms), timeout_s=10.0)
    lines = []
    record = runner.run(declared, folder, lines.append)
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
    assert any("threads" in remark for remark in rows(measured)["threads"].remarks)
    assert not any("threads" in remark for remark in rows(measured)["slow"].remarks)


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
    again = runner.run(declared, folder, lambda _: None)
    assert again["blocks"] == json.loads(before)["blocks"] == record["blocks"]


def test_an_interrupted_experiment_goes_on_at_the_next_block(tmp_path):
    declared = experiment(drawing("one"), drawing("two"))

    def interrupt(line):
        if line.startswith("block 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(declared, tmp_path, interrupt)
    kept = read_record(tmp_path)["blocks"]
    assert len(kept) == 1
    lines = []
    record = runner.run(declared, tmp_path, lines.append)
    assert record["blocks"][0] == kept[0]
    assert len(record["blocks"]) == 2
    assert not any(line.startswith(("block 1", "quality")) for line in lines)


def test_another_experiment_in_the_same_folder_is_refused(measured):
    folder, declared, _, _ = measured
    with pytest.raises(UsageError, match="steps differ"):
        runner.run(replace(declared, steps=2), folder, lambda _: None)


def test_a_sweep_measures_every_point(tmp_path):
    declared = experiment(drawing("one"), drawing("two"), sweep={"steps": [1, 2], "batch": [1, 2]}, repetitions=2)
    record = runner.run(declared, tmp_path, lambda _: None)
    found = summarize(record).rows
    assert {row.point for row in found} == {f"batch {b}, steps {s}" for b in (1, 2) for s in (1, 2)}
    assert {row.batch for row in found} == {1, 2}
    assert all(len(row.blocks) == 2 and (row.verdict or row.arm == "one") for row in found)


def test_records_of_the_same_work_are_compared_unpaired(measured, tmp_path):
    _, _, record, _ = measured
    compared = {each.name: each for each in compare(record, record)}
    assert compared["plain"].low <= 1 <= compared["plain"].high
    other = json.loads(json.dumps(record))
    other["experiment"]["steps"] = 9
    with pytest.raises(UsageError, match="steps: 1 and 9"):
        compare(record, other)


def test_arms_of_the_command_line():
    assert [arm.name for arm in parse_arms("torch:fp32, openvino:bf16,vae_decoder=torch:fp32,onnx:fp32@cpu")] == [
        "torch:fp32",
        "openvino:bf16,vae_decoder=torch:fp32",
        "onnx:fp32@cpu",
    ]
    with pytest.raises(UsageError):
        parse_arms("torch")


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


def test_an_experiment_file_says_what_the_options_say():
    text = 'model = "shapes"\narms = ["torch:fp32", {name = "mine", folder = "x"}]\n[sweep]\nsteps = [1, 2]'
    declared = from_toml(text)
    assert declared.baseline == "torch:fp32"
    assert declared.arm("mine").folder == "x"
    assert list(declared.points()) == ["steps 1", "steps 2"]


def test_seeds_come_from_ids():
    assert seed_of("shapes-256/0000") == seed_of("shapes-256/0000") != seed_of("shapes-256/0001")
    with pytest.raises(UsageError, match="at least 300"):
        prompts("default", 300)


def test_a_budget_is_held_by_the_fixture(bakeoff):
    arms = [
        {"name": name, "adapter": ADAPTER, "options": {"sleep": sleep}} for name, sleep in (("a", 0.02), ("b", 0.004))
    ]
    fields = {"timed_prompts": 2, "quality_prompts": 2, "steps": 1, "blocks": 2, "repetitions": 3}
    measured = bakeoff(model="shapes", arms=arms, reference="a", **fields)
    measured.require("b", ratio=1.0)
    with pytest.raises(AssertionError, match="of a's time, at most 0.01"):
        measured.require("b", ratio=0.01)
    with pytest.raises(AssertionError, match="anonymous memory"):
        measured.require("b", peak_anon_bytes=1000)
