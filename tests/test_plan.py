"""What an export is predicted to take, and what is refused before it starts."""

import json
import shutil
from pathlib import Path

import pytest

from bakeoff import cli
from bakeoff import plan as planning
from bakeoff.artifact import shares_of, stated_share
from bakeoff.bake import export
from bakeoff.errors import ResourceError, UnavailableError
from bakeoff.hardware import Availability
from bakeoff.models import fullsize
from bakeoff.plan import check_room, plan
from bakeoff.recipe import parse
from bakeoff.runtimes.openvino import OpenVINORuntime
from bakeoff.sources.source import Source


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """SDXL's headers over files of holes, 7 GB of which nobody has to hash here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bakeoff.sources.source.remembered_sha256", lambda file: file.name)
        yield fullsize.build("sdxl", tmp_path_factory.mktemp("fullsize") / "sdxl", hollow=True)


def recipe(text):
    return parse(text)[0]


@pytest.mark.parametrize(
    ("model", "module", "billions"),
    [
        ("sd-1.5", "unet", 0.86),
        ("sdxl", "unet", 2.57),
        ("sd-3.5-medium", "transformer", 2.47),
        ("sd-3.5-large", "transformer", 8.15),
        ("z-image", "transformer", 6.15),
        ("z-image", "text_encoder", 4.02),
        ("flux.1-dev", "transformer", 11.9),
        ("flux.1-dev", "text_encoder_2", 4.76),
    ],
)
def test_stand_ins_have_the_real_models_parameters(tmp_path, model, module, billions):
    fullsize.write_module(*fullsize.config(model, module), tmp_path / module, dtype="bfloat16", hollow=True)
    checkpoint = Source(model, None, tmp_path, None).checkpoint(module)
    assert checkpoint.nbytes / 2e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.slow
def test_weights_that_are_linked_take_no_disk(sdxl, tmp_path):
    linked = plan(str(sdxl), recipe("onnx:bf16")).forecast(sdxl)
    copied = plan(str(sdxl), recipe("onnx:bf16"), weights="copy").forecast(sdxl)
    assert linked.disk_bytes < 1e7
    assert copied.disk_bytes == pytest.approx(Source.open(str(sdxl)).checkpoint("unet").nbytes * 1.37, rel=0.05)
    assert linked.peak_anon_bytes < 1.1e9


@pytest.mark.parametrize("text", ["torch:bf16", "torch:fp32"])
def test_predicted_disk_is_what_is_written(tiny, tmp_path, text):
    folder = tiny("stable-diffusion")
    predicted = plan(str(folder), recipe(text), weights="copy").forecast(tmp_path)
    export(str(folder), tmp_path / "a", recipe(text), weights="copy", prove=False)
    written = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*.safetensors"))
    assert sum(cost.disk_bytes for cost in predicted.parts.values()) == pytest.approx(written, rel=0.15)


def test_the_command_shows_figures_and_writes_nothing(sdxl, tmp_path, capsys):
    assert cli.main(["plan", str(sdxl), "--recipe", "openvino:int8", "-o", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("text_encoder_2", "unet", "vae_decoder", "export: peak memory", "running:"))
    assert not any(tmp_path.iterdir())
    cli.main(["plan", str(sdxl), "--recipe", "openvino:int8", "-o", str(tmp_path / "a"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["disk_bytes"] == pytest.approx(3.5e9, rel=0.15)
    assert set(told["running_bytes"]) == set(told["parts"])


def test_what_cannot_fit_is_refused_with_what_would(sdxl, tmp_path, monkeypatch):
    small = shutil._ntuple_diskusage(10**9, 0, 10**9)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: small)
    with pytest.raises(ResourceError, match=r"takes up to 7\.\d GB of disk, 1\.0 GB are free") as caught:
        check_room(plan(str(sdxl), recipe("openvino:bf16")), sdxl / "a")
    assert "onnx:bf16" in caught.value.fix
    assert "torch:bf16" in caught.value.fix
    assert "openvino" not in caught.value.fix
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**8)
    with pytest.raises(ResourceError, match="of memory"):
        export(str(sdxl), tmp_path / "a", recipe("onnx:bf16"))
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_opened_to_be_proved_is_refused_before_it_is_written(tiny, tmp_path, monkeypatch):
    source = tiny("stable-diffusion")
    missing = Availability(ok=False, reason="torch is built without CUDA", fix="install another")
    monkeypatch.setattr(OpenVINORuntime, "probe", classmethod(lambda _: missing))
    with pytest.raises(UnavailableError, match="can't be proved here once it is written: torch is built") as raised:
        export(str(source), tmp_path / "out", recipe("openvino:fp32"))
    assert raised.value.fix == "install another; or --no-prove, without --repair"
    assert not (tmp_path / "out").exists()


RECORD = json.loads((Path(__file__).parent.parent / "docs" / "benchmarks" / "full_size.json").read_text())["rows"]


@pytest.mark.parametrize("row", RECORD, ids=lambda row: f"{row['model']}-{row['recipe']}")
def test_predictions_were_held_to_measurements(row):
    predicted, measured = row["predicted"], row["measured"]
    assert predicted["peak_anon_bytes"] == pytest.approx(measured["peak_anon_bytes"], rel=0.15)
    assert predicted["disk_bytes"] == pytest.approx(measured["disk_bytes"], rel=0.15, abs=5e6)
    assert 0.5 < predicted["seconds"] / measured["cpu_seconds"] < 2
    assert measured["peak_anon_bytes"] < 1e9


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted({row["model"] for row in RECORD}))
def test_the_record_says_what_is_predicted_today(tmp_path, model):
    source = fullsize.build(model, tmp_path / model, hollow=True)
    for row in RECORD:
        if row["model"] == model:
            today = plan(str(source), recipe(row["recipe"])).forecast(tmp_path)
            assert today.peak_anon_bytes == row["predicted"]["peak_anon_bytes"]
            assert today.disk_bytes == row["predicted"]["disk_bytes"]


@pytest.mark.parametrize("text", ["onnx:int8", "openvino:int8", "torch:int8+codes=bakeoff", "onnx:w8a8-dynamic"])
def test_nearly_all_of_a_denoiser_has_the_stated_type(tmp_path, text):
    """Convolutions, too; bitsandbytes' and torchao's layers are Linear alone, which docs/quantization.md says."""
    shares = shares_of(plan("shapes", recipe(text)).forecast(tmp_path).parts["unet"].weight_bytes)
    assert stated_share(shares, "int8") >= 0.95
