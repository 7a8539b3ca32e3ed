"""Reports of a planted record: what they say is what was planted; the page opens offline."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bakeoff.errors import UsageError
from bakeoff.reports import tables
from bakeoff.reports.budgets import Budget
from bakeoff.reports.figures import _COLORS
from bakeoff.reports.page import page
from bakeoff.reports.pairs import worst_pairs
from bakeoff.reports.record import read_record
from bakeoff.reports.summary import summarize

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RATIOS = {"base": 1.0, "faster": 0.5, "same": 1.0, "broken": 0.4}
PROMPTS = [f"prompt {n}" for n in range(4)]


def run(rng, ratio):
    samples = (0.1 * ratio * np.exp(rng.normal(0, 0.01, 5))).tolist()
    return {
        "load_s": 1.0,
        "first_s": 0.2,
        "warmup_s": samples[:1],
        "samples_s": samples,
        "same_prompt_s": samples[:3],
        "sample_rows": [0],
        "sample_db": 200.0,
        "guard": {"tainted": [], "others_cores": 0.0},
        "energy_j": {"package-0": 50.0, "gpu0": 100.0},
        "configuration": {
            "adapter": {"unet": {"threads": 2, "device": "cpu", "precision": {"f32": 5}}},
            "python": "3.11",
            "affinity": [0],
            "versions": {"torch": "2.13"},
        },
    }


def entry(name, psnr_db=200.0, *, flat=False):
    figures = {"psnr_db": [psnr_db] * 4, "ssim": [1.0] * 4, "flip": [0.0] * 4, "flat": [flat] * 4, "right": [True] * 4}
    figures |= {"trajectory": [1e-5, 2e-5], "metrics": {"lpips": [0.25] * 4}}
    return {
        "quality": {"figures": figures, "configuration": {}, "pictures": f"pictures/{name}.npy"},
        "memory": {
            "cold_load_s": 2.0,
            "first_image_s": 0.3,
            "peak_bytes": {"load": 1e8, "first": 2e8, "steady": 2e8},
            "peak_anon_bytes": 9e7,
            "load_peak_anon_bytes": 8e7,
        },
        "stages": {"seconds": {"unet": 0.08, "vae_decoder": 0.02}, "overhead": 0.01},
    }


@pytest.fixture
def record(tmp_path):
    """Five blocks of four arms, one twice as fast, one that draws black; and one that failed."""
    rng = np.random.default_rng(0)
    arms = {name: {"entries": {name: entry(name)}, "artifact": {"key": name, "bytes": 10**7}} for name in RATIOS}
    arms["broken"]["entries"]["broken"] = entry("broken", 5.0, flat=True)
    arms |= {name: {"entries": {name: entry(name)}} for name in ("baseline again", "reference")}
    failure = {"during": "quality", "reason": "<b>out of memory</b>", "stderr": "Traceback"}
    arms["lost"] = {"entries": {"lost": {"failure": failure}}}
    blocks = [
        {"index": i, "order": [], "runs": {n: run(rng, RATIOS.get(n, 1.0)) for n in [*RATIOS, "baseline again"]}}
        for i in range(5)
    ]
    (tmp_path / "pictures").mkdir()
    for name in [*RATIOS, "reference"]:
        np.save(tmp_path / f"pictures/{name}.npy", rng.integers(0, 255, (4, 64, 64, 3)).astype(np.uint8))
    declared = {
        "model": "shapes",
        "baseline": "base",
        "steps": 20,
        "guidance_scale": None,
        "batch": 1,
        "blocks": 5,
        "repetitions": 5,
    }
    whole = {
        "schema_version": 1,
        "hash": "0" * 64,
        "started": "2026-01-01T00:00:00+00:00",
        "experiment": declared | {"quality_prompts": 4, "sweep": {}},
        "machine": {"cpu": "a processor", "usable_cores": 2, "memory_bytes": 1e10, "python": "3.11"},
        "prompts": [{"id": text, "text": text} for text in PROMPTS],
        "metrics": {
            "lpips": {"title": "LPIPS", "kind": "paired", "weights": "somewhere", "fewest": 1, "points": 1.0},
            "fid": {"title": "FID", "kind": "distribution", "weights": None, "fewest": 5000, "points": 1.0},
        },
        "command": ["bakeoff", "bench", "experiment.toml"],
        "arms": arms,
        "blocks": blocks,
    }
    (tmp_path / "record.json").write_text(json.dumps(whole))
    return tmp_path


def test_the_verdict_says_what_was_planted(record):
    found = {row.name: row for row in summarize(read_record(record)).rows}
    assert found["faster"].verdict.word == "faster"
    assert found["faster"].verdict.ratio.ratio == pytest.approx(0.5, rel=0.02)
    assert found["same"].verdict.word == "no difference shown"


def test_a_fast_arm_that_fails_its_gate_is_no_headline(record):
    summary = summarize(read_record(record))
    row = next(row for row in summary.rows if row.name == "broken")
    assert row.verdict.word == "faster"
    assert not row.passes
    sentence = next(text for text in summary.headline() if text.startswith("broken"))
    assert "no candidate" in sentence
    assert "times as fast" not in sentence


def test_all_tables_have_every_arm(record):
    summary = summarize(read_record(record))
    names = {"base", "faster", "same", "broken", "lost"}
    assert {line["arm"] for line in csv.DictReader(io.StringIO(tables.as_csv(summary)))} == names
    assert {row["name"] for row in json.loads(tables.as_json(summary))["rows"]} == names
    assert all(f"| {name} |" in tables.markdown(summary) for name in names)


def test_pytest_benchmark_gets_the_raw_samples(record):
    summary = summarize(read_record(record))
    told = {each["name"]: each["stats"] for each in json.loads(tables.pytest_benchmark(summary))["benchmarks"]}
    assert set(told) == set(RATIOS)
    assert told["faster"]["rounds"] == 25
    assert told["faster"]["median"] == pytest.approx(0.05, rel=0.05)


def test_pytest_benchmark_reads_it(record):
    file = record / "0001_bakeoff.json"
    file.write_text(tables.pytest_benchmark(summarize(read_record(record))))
    command = [sys.executable, "-P", "-m", "pytest_benchmark", "compare", str(file), "--columns=median,rounds"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in told for name in RATIOS)
    assert "25" in told


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_opens_offline_and_says_its_figures_in_words(record):
    summary = summarize(read_record(record))
    text = page(summary, worst_pairs(summary, record))
    found = Page(text)
    links = [value for _, attributes in found.tags for key, value in attributes.items() if key in {"src", "href"}]
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"url\((?!#)|@import", text)
    figures = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(figures) == 6
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    assert all(attributes["alt"] for tag, attributes in found.tags if tag == "img")
    assert "prefers-color-scheme" in text
    assert "<b>out of memory</b>" not in text


def change(record, edit):
    content = json.loads((record / "record.json").read_text())
    edit(content)
    (record / "record.json").write_text(json.dumps(content))
    return summarize(read_record(record))


def test_what_is_unfair_stands_next_to_the_ratio(record):
    def hide(content):
        for block in content["blocks"]:
            told = block["runs"]["faster"]["configuration"]
            told["adapter"]["unet"] |= {"precision": {"f32": 5, "i8": 9}, "threads": 4, "offload": "sequential"}
            block["runs"]["base"]["configuration"]["adapter"]["unet"]["offload"] = "none"
            told["affinity"] = [0, 1]

        content["arms"]["faster"]["precisions"] = ["fp32"]

    summary = change(record, hide)
    row = next(row for row in tables.table(summary) if row["arm"] == "faster")
    assert row["ratio [95 %]"].endswith("†")
    sentence = next(text for text in summary.headline() if text.startswith("faster"))
    assert "Not a fair comparison" in sentence
    for text in ("i8", "threads: 4", "offload: sequential", "2 cores"):
        assert text in sentence
    assert not any("†" in row["ratio [95 %]"] for row in tables.table(summary) if row["arm"] != "faster")


def test_a_recipes_own_precision_is_not_hidden(record):
    def say(content):
        for block in content["blocks"]:
            block["runs"]["faster"]["configuration"]["adapter"]["unet"]["precision"] = {"f32": 5, "i8": 9}
        content["arms"]["faster"]["precisions"] = ["fp32", "int8"]

    assert not next(row for row in change(record, say).rows if row.name == "faster").unfair


def test_budgets_are_gates(record):
    def limit(content):
        content["experiment"]["budgets"] = {"faster": {"ratio": 0.9, "psnr_db": 60}, "same": {"ratio": 0.9, "flip": 1}}

    found = {row.name: row for row in change(record, limit).rows}
    assert found["faster"].passes
    assert [gate.holds for gate in found["same"].gates if gate.name == "budget"] == [False, True]


def test_an_unknown_limit_is_refused():
    with pytest.raises(UsageError, match="did you mean|ratio"):
        Budget.read({"rato": 1})
    with pytest.raises(UsageError, match="expected a number"):
        Budget.read({"ratio": "fast"})


def test_metrics_stand_in_the_table_or_are_named_as_missing(record):
    summary = summarize(read_record(record))
    row = tables.table(summary)[0]
    assert row["LPIPS"] == "0.25"
    assert "FID" not in row
    assert "not measured, no weights named: FID" in tables.markdown(summary)
    assert (row["CPU J/image"], row["GPU J/image"]) == ("10", "20")


def test_a_model_card_has_the_figures_and_how_they_came(record):
    text = tables.model_card(summarize(read_record(record)))
    assert text.startswith("## Measured with bakeoff")
    assert all(f"| {name} |" in text for name in RATIOS)
    assert "95 % intervals" in text


def test_a_picture_outside_the_records_folder_is_not_read(record):
    def escape(content):
        content["arms"]["broken"]["entries"]["broken"]["quality"]["pictures"] = "../outside.npy"

    np.save(record.parent / "outside.npy", np.zeros((4, 64, 64, 3), np.uint8))
    summary = change(record, escape)
    assert "broken" not in {pair.arm for pair in worst_pairs(summary, record)}


def test_the_worst_pairs_come_first(record):
    pairs = worst_pairs(summarize(read_record(record)), record, count=5)
    assert [pair.arm for pair in pairs][:4] == ["broken"] * 4
    assert pairs[0].picture.size == (192, 64)


def test_the_command_writes_all_of_it(record, run_cli):
    finished = run_cli("report", record, "--png")
    assert finished.returncode == 0, finished.stderr
    written = {path.name for path in record.iterdir()}
    assert {"report.html", "report.md", "report.csv", "report.json", "pareto.png"} <= written


@pytest.mark.parametrize(
    ("content", "match"), [("{", "can't be read"), ('{"schema_version": 99}', "schema 99"), ("[]", "schema")]
)
def test_what_is_no_record_is_refused(tmp_path, run_cli, content, match):
    (tmp_path / "record.json").write_text(content)
    finished = run_cli("report", tmp_path)
    assert finished.returncode == 4
    assert match in finished.stderr


@pytest.fixture
def shot(record):
    """Render the page of a planted record; return its pixels, what the browser logged, and the URLs it asked for."""
    if BROWSER is None:
        pytest.skip("no Chromium here")
    (record / "report.html").write_text(
        page(summarize(read_record(record)), worst_pairs(summarize(read_record(record)), record))
    )

    def render(*options, width=1000):
        command = [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            f"--user-data-dir={record / 'profile'}",
            f"--log-net-log={record / 'net.json'}",
            f"--screenshot={record / 'page.png'}",
            f"--window-size={width},2400",
            *options,
            f"file://{record / 'report.html'}",
        ]
        finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        events = json.loads((record / "net.json").read_text())
        kind = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        asked = [event.get("params", {}) for event in events["events"] if event["type"] == kind]
        urls = [
            each["url"] for each in asked if each.get("initiator", "not an origin") != "not an origin"
        ]  # not the browser's own
        return np.asarray(Image.open(record / "page.png").convert("RGB")), finished.stderr, urls

    return render


def shows(pixels, color):
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels.astype(int) - wanted).max(axis=2) < 12).sum() > 50


def test_the_page_renders_alone(shot):
    pixels, logged, urls = shot()
    assert pixels[5, 5].min() > 240
    assert all(shows(pixels, color) for color in _COLORS[:3])
    assert "CONSOLE" not in logged
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def test_the_page_is_dark_where_that_is_wished(shot):
    pixels, _, _ = shot("--blink-settings=preferredColorScheme=0")
    assert pixels[5, 5].max() < 40
    assert (pixels.min(axis=2) > 200).sum() > 1000  # light text, in figures, too


def test_the_page_fits_a_phone(shot):
    pixels, _, _ = shot(width=500)
    assert shows(pixels, _COLORS[0])
