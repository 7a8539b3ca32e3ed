"""What an artifact draws, against eager float32's: distances, floors, gates."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from bakeoff import pictures
from bakeoff.artifact import Artifact
from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.errors import ParityError, UnavailableError, UsageError
from bakeoff.parity import drawing, meaning, prover, trajectory
from bakeoff.parity.drawing import Drawn
from bakeoff.recipe import parse


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((3, 2, 4, 8, 8)).astype(np.float32)
    shown = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    more = np.random.default_rng(seed + 1)
    shown = np.clip(shown + more.normal(0, noise, shown.shape), 0, 255).round().astype(np.uint8) if noise else shown
    return Drawn(latents, shown)


def holds(kinds, found, floor=None):
    return {gate.name: gate.holds for gate in trajectory.judge(kinds, found, floor)}


def test_units_are_ratios_to_the_floor():
    found = {"drift": [2e-3], "psnr_db": [40.0, 200.0], "ssim": [0.98], "flip": [0.02]}
    floor = {"drift": [1e-3], "psnr_db": [46.02, 200.0], "ssim": [0.99], "flip": [0.0]}
    told = trajectory.units(found, floor)
    assert told["drift"] == [2.0]
    assert told["psnr_db"] == [pytest.approx(2, rel=1e-3), None]
    assert told["ssim"] == [pytest.approx(2)]
    assert told["flip"] == [None], "in units of nothing there is no figure"


def test_fp32_needs_45_db_of_every_picture():
    same = trajectory.figures([drawn()], [drawn()])
    assert same["drift"] == [0, 0, 0]
    assert holds({"fp32"}, same) == {"pictures": True, "fp32": True}
    off = trajectory.figures([drawn()], [drawn(noise=3)])
    assert 30 < min(off["psnr_db"]) < 45
    assert holds({"fp32"}, off)["fp32"] is False


def test_half_precision_is_measured_by_torchs_own():
    found = trajectory.figures([drawn(), drawn(1)], [drawn(noise=4), drawn(1, noise=4)])
    near = trajectory.figures([drawn(), drawn(1)], [drawn(noise=3.9), drawn(1, noise=3.9)])
    far = trajectory.figures([drawn(), drawn(1)], [drawn(noise=1), drawn(1, noise=1)])
    assert holds({"bf16", "fp32"}, found, near)["half precision"] is True
    assert holds({"bf16", "fp32"}, found, far)["half precision"] is False
    assert holds({"bf16"}, found, {"problem": "NaN"})["half precision"] is None


def test_low_bits_are_left_to_the_scorer_and_one_colour_fails():
    black = Drawn(drawn().latents, np.zeros_like(drawn().pictures))
    found = trajectory.figures([drawn()], [black])
    assert holds({"fp32", "bf16", "int8"}, found) == {"pictures": False, "meaning": None}
    assert trajectory.figures([black], [black])["flat"] == [False, False], "what it is to draw is of one colour, too"


def test_another_size_is_a_problem():
    small = Drawn(drawn().latents, drawn().pictures[:, :16])
    assert "expected (32, 32)" in trajectory.figures([drawn()], [small])["problem"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda _: None)
    assert "flip-evaluator isn't installed" in pictures.missing()["flip"]
    found = trajectory.figures([drawn()], [drawn()])
    assert "flip" not in found
    assert holds({"fp32"}, found)["fp32"] is True
    (gate,) = trajectory.judge({"bf16"}, found, found)
    assert gate.holds is None
    assert "flip-evaluator" in gate.detail


def test_an_artifact_draws_what_its_proof_keeps(baked, capsys):
    folder = baked("torch:fp32", proved=True)
    told = Artifact.open(folder).manifest.proof["trajectory"]
    assert told["problem"] is None
    assert told["unit"] == "F0"
    assert len(told["figures"]["psnr_db"]) == len(told["figures"]["flip"]) == len(told["figures"]["ssim"]) == 6
    assert len(told["figures"]["drift"]) == drawing.STEPS
    assert {gate["name"]: gate["holds"] for gate in told["gates"]} == {"pictures": True, "fp32": True}
    assert "f1" not in told["floors"]
    assert main(["verify", str(folder), "--parity"]) == 0
    out = capsys.readouterr().out
    assert "latents, farthest after each step: " in out
    assert "picture 5 (32×32): PSNR " in out
    assert "gate fp32: passes" in out
    assert "inputs recorded" in out


def test_a_part_that_draws_something_else_fails(copied):
    """The text encoder is another one: the parts' own cases would tell, and the pictures do."""
    from safetensors.torch import load_file, save_file

    folder = copied("torch:fp32", proved=True)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    norm = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    tensors[norm] *= 1.5
    size = file.stat().st_size
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    told = trajectory.prove(Artifact.open(folder))
    assert "worst PSNR" in told["problem"]
    assert told["figures"]["drift"][0] > 1e-3


def test_without_a_trajectory_the_reason_is_said(copied):
    folder = copied("torch:fp32", proved=True)
    artifact = Artifact.open(folder)
    shutil.rmtree(folder / "proof")
    assert "--source" in trajectory.prove(artifact)["skipped"]


def test_more_is_drawn_where_pictures_are_too_few_to_tell():
    def told(mine, holds):
        gates = [{"name": "half precision", "holds": holds, "detail": ""}]
        return {"gates": gates, "figures": {"flip": mine}, "floors": {"f1": {"flip": [0.002, 0.004]}}}

    assert trajectory.is_undecided(told([0.003, 0.006], holds=False))
    assert not trajectory.is_undecided(told([0.003, 0.0061], holds=False)), "the mean itself is beyond the limit"
    assert not trajectory.is_undecided(told([0.002, 0.004], holds=True))
    assert not trajectory.is_undecided({"problem": "the artifact can't draw"})


def test_further_pictures_join_those_of_the_proof(copied):
    from bakeoff.sources.source import Source

    artifact = Artifact.open(copied("openvino:bf16", proved=True))
    before = trajectory.read(artifact.folder / "proof" / trajectory.FILE)
    told = trajectory.prove_further(artifact, Source.open("shapes"))
    after = trajectory.read(artifact.folder / "proof" / trajectory.FILE)
    assert after.shots[: len(before.shots)] == before.shots
    texts = [text for shot in after.shots for text in shot.prompts]
    assert len(set(texts)) == len({seed for shot in after.shots for seed in shot.seeds}) == 24
    assert len(told["figures"]["flip"]) == len(told["floors"]["f1"]["flip"]) == 24
    assert told["figures"]["flip"][:6] == artifact.manifest.proof["trajectory"]["figures"]["flip"]
    assert told["problem"] is None


@pytest.mark.slow
def test_what_six_pictures_cannot_tell_is_told_by_more(tmp_path):
    """The embedded model in float16: its mean is within the limit, with six pictures the interval isn't on most processors."""
    artifact = export("shapes", tmp_path / "out", parse("onnx:fp16+compute=half")[0])
    drawn = artifact.manifest.proof["trajectory"]
    assert artifact.manifest.proved
    assert not trajectory.is_undecided(drawn)
    assert len(drawn["figures"]["flip"]) in {6, 24}


def test_without_a_source_the_fix_says_what_draws_more(copied, monkeypatch):
    artifact = Artifact.open(copied("torch:fp32", proved=True))
    undecided = {"problem": "gate", "gates": [{"name": "half precision", "holds": False, "detail": ""}]}
    undecided |= {"figures": {"flip": [0.1]}, "floors": {"f1": {"flip": [0.1]}}}
    monkeypatch.setattr(prover, "in_child", lambda *_, **__: ({"parts": {}, "trajectory": undecided}, None))
    with pytest.raises(ParityError) as raised:
        prover.prove(artifact, None)
    assert "--source MODEL draws more" in raised.value.fix


def test_the_scorers_gate():
    below = {"low": -2.6, "high": 1.0, "difference": -1.0}
    assert meaning._gate({"fp32", "bf16"}, below, 1024) == {"limit": None, "holds": None}
    assert meaning._gate({"w8a8"}, below, 1024) == {"limit": -2.5, "holds": False}
    assert meaning._gate({"w8a8", "nf4"}, below, 1024) == {"limit": -5.0, "holds": True}
    assert meaning._gate({"w8a8"}, below, 1023) == {"limit": -2.5, "holds": None}
    failed = {**below, "limit": -2.5, "holds": False}
    marked = prover._with_scores({"status": "proved"}, failed)
    assert (marked["status"], marked["scorer"]["low"]) == ("failing", -2.6)
    assert "at least -2.5" in marked["reason"]


def test_what_the_scorer_fails_is_marked_for_good(copied, monkeypatch):
    told = {"low": -2.6, "high": 1.0, "difference": -1.0, "limit": -2.5, "holds": False}
    monkeypatch.setattr(meaning, "judge", lambda *_: told)
    folder = copied("torch:fp32", proved=True)
    with pytest.raises(ParityError, match="at least -2.5 is asked for"):
        prover.prove_in_place(Artifact.open(folder), None, scorer_prompts=1024)
    kept = Artifact.open(folder).manifest.proof
    assert (kept["status"], kept["scorer"]) == ("failing", told)
    assert prover.prove_in_place(Artifact.open(folder), None).manifest.proof["status"] == "failing"


@pytest.mark.slow
def test_the_scorer_judges_paired_pictures(copied, capsys):
    folder = copied("torch:fp32", proved=True)
    assert main(["verify", str(folder), "--parity", "--scorer", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["proof"]["scorer"]
    assert (told["prompts"], told["difference"], told["low"], told["holds"]) == (3, 0, 0, None)
    assert 0 <= told["right"] <= 1
    assert not math.isnan(told["right_fp32"])
    assert Artifact.open(folder).manifest.proof["scorer"] == told, "it is kept"


def test_what_the_scorer_cannot_judge(baked, tmp_path, tiny):
    from bakeoff.bake import export
    from bakeoff.recipe import parse
    from bakeoff.sources.source import Source

    other = export(str(tiny("stable-diffusion")), tmp_path / "out", parse("null:fp32")[0], prove=False)
    with pytest.raises(UnavailableError, match="scorer for shapes alone"):
        meaning.judge(other, Source.open(str(tiny("stable-diffusion"))), 1024)
    with pytest.raises(UsageError, match="got 1 prompts"):
        meaning.judge(Artifact.open(baked("torch:fp32", proved=True)), Source.open("shapes"), 1)
    assert main(["verify", str(other.folder), "--scorer", "8"]) == 2


def test_the_floor_in_bfloat16_is_one_whatever_dtype_the_model_is_stored_in(tiny):
    """Layers that an artifact stores in float32 stay in it; all of a model that is stored so would."""
    from bakeoff.sources.source import Source

    source = Source.open(str(tiny("stable-diffusion")))
    session = drawing.sit(source, "tiny")
    last = drawing.Session(session.shots[-1:], session.drawn[-1:])
    assert trajectory._floor(source, last, "bf16")["drift"][0] > 1e-3
