import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bakeoff import hardware, plugins
from bakeoff.artifact import Artifact
from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.components.component import PROOF_SIZES
from bakeoff.errors import LoweringError, ParityError, SourceError
from bakeoff.parity import distance, proof, prover
from bakeoff.parity.budget import FP32_LEAST, tolerance, upper_bound
from bakeoff.recipe import PartRecipe, Recipe
from bakeoff.runtimes.engine import load
from bakeoff.sources.source import Source


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert distance.relative_error(torch.tensor([3.0, 4.05]), expected) == pytest.approx(0.01, rel=1e-4)
    assert distance.relative_error(expected, expected) == 0
    assert math.isinf(distance.relative_error(torch.tensor([3.0, math.nan]), expected))
    assert math.isinf(distance.relative_error(torch.zeros(3), expected))
    assert math.isinf(distance.relative_error(expected, torch.tensor([3.0, math.nan])))


def test_sqnr_is_minus_twenty_log10():
    got, expected = {"x": torch.tensor([1.1])}, {"x": torch.tensor([1.0])}
    assert distance.measure(got, expected, {}).sqnr_db == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(
    "recipe",
    [
        "onnx:fp32",
        *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("torch:bf16", "openvino:fp32", "openvino:bf16")),
    ],
)
def test_each_part_is_proved_at_three_shapes(baked, recipe):
    proved = Artifact.open(baked(recipe, proved=True)).manifest.proof
    assert proved["status"] == "proved"
    assert proved["peak_anon_bytes"] > 0
    assert proved["processor"] == hardware.processor()
    for part in proved["parts"].values():
        assert part["inputs"] == "recorded"
        assert len({str(case["sizes"]) for case in part["cases"]}) == 3
        assert all(0 < case["error"] <= part["tolerance"] for case in part["cases"])
        assert part["tolerance"] < 0.05


@pytest.mark.parametrize(
    ("recipe", "there", "noted"),
    [
        ("torch:bf16", ["avx2", "amx_bf16"], True),
        ("torch:bf16", None, False),
        ("torch:fp32", ["avx2", "amx_bf16"], False),
    ],
)
def test_a_proof_of_another_kind_of_processor_is_said_to_be(copied, monkeypatch, capsys, recipe, there, noted):
    """Kernels of narrow dtypes are chosen by instruction sets; those of float32 are alike."""
    monkeypatch.setattr(hardware, "instruction_sets", lambda: ["avx2", "fma"])
    artifact = Artifact.open(copied(recipe))
    processor = {"cpu": "another one", "instruction_sets": there} if there else hardware.processor()
    artifact = artifact.with_proof({"status": "proved", "seconds": 1, "peak_anon_bytes": 1, "processor": processor})
    with load(artifact.folder) as engine:
        notes = engine.generate("a red circle", seeds=0, steps=1).notes
    assert main(["verify", str(artifact.folder)]) == 0
    said = "another one (that one alone has amx_bf16; this one alone has fma)"
    assert any(said in note for note in notes) == noted == (said in capsys.readouterr().err)


@pytest.mark.parametrize("recipe", ["onnx:fp32", pytest.param("openvino:fp32", marks=pytest.mark.slow)])
def test_a_damaged_weight_is_named(copied, recipe):
    """Scale some of the UNet's weights by a tenth, and the proof names the UNet."""
    folder = copied(recipe, proved=True)
    artifact = Artifact.open(folder)
    file = next(
        f
        for f in sorted((folder / "unet").iterdir())
        if f.suffix in {".safetensors", ".bin"} and f.stat().st_size > 1e6
    )
    data = bytearray(file.read_bytes())
    middle = len(data) // 2 // 4 * 4
    values = torch.frombuffer(data, dtype=torch.float32, offset=middle, count=50_000)
    values.mul_(1.1)
    file.write_bytes(data)
    with pytest.raises(ParityError, match="unet differs from eager fp32"):
        prover.prove(artifact, None)


def test_a_baked_shape_fails_the_export_and_names_the_part(tmp_path, monkeypatch):
    """Captured with fixed sizes, the decoder can't run at the proof's other shapes."""
    from bakeoff import bake
    from bakeoff.components.modules.autoencoder_kl import VaeDecoder
    from bakeoff.exporters import capture as capturing
    from bakeoff.recipe import parse

    ports = VaeDecoder.inputs

    def fixed(self, config):
        (port,) = ports(self, config)
        return (type(port)(port.name, port.dtype, (2, port.dims[1], 16, 24)),)

    real = capturing.capture

    def capture(name, component, *rest):
        if name == "vae_decoder":
            monkeypatch.setattr(VaeDecoder, "inputs", fixed)
        program = real(name, component, *rest)
        monkeypatch.setattr(VaeDecoder, "inputs", ports)
        return program

    monkeypatch.setattr(capturing, "capture", capture)
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path / "home"))  # nobody else shall find this graph
    with pytest.raises(ParityError, match="vae_decoder can't run at the shapes"):
        bake.export("shapes", tmp_path / "out", parse("null:fp32,vae_decoder=onnx:fp32")[0])
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_module_that_cannot_be_captured_is_named(shapes):
    from bakeoff.components.modules.clip_text import ClipText
    from bakeoff.exporters.capture import capture
    from bakeoff.sources.source import read_json

    class Broken(ClipText):
        def flat(self, module):
            class Branching(torch.nn.Module):
                def forward(self, input_ids):
                    return (input_ids,) if input_ids.sum() > 3 else (-input_ids,)

            return Branching()

    with pytest.raises(LoweringError, match="couldn't capture text_encoder"):
        capture(
            "text_encoder",
            Broken(),
            read_json(shapes / "text_encoder" / "config.json"),
            shapes / "text_encoder",
        )


def test_the_proof_is_skipped_where_it_would_not_fit(baked, monkeypatch):
    artifact = Artifact.open(baked("torch:fp32", proved=True))
    monkeypatch.setattr(prover, "available_bytes", lambda: 1_000_000)
    proved = prover.prove(artifact, Source.open("shapes"))
    assert proved["status"] == "unproved"
    assert "GB" in proved["reason"]


def test_a_model_that_is_nan_in_eager_float32_is_not_proved(baked, shapes, tmp_path):
    """Of NaN against NaN all floors are infinite, and so would be what the part is granted."""
    model = Path(shutil.copytree(shapes, tmp_path / "model"))
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] = torch.full_like(tensors["decoder.conv_in.weight"], math.nan)
    save_file(tensors, file)
    artifact = Artifact.open(baked("torch:fp32", proved=True))
    part, entry = proof.family_part(artifact, "vae_decoder"), artifact.manifest.parts["vae_decoder"]
    with pytest.raises(SourceError, match="vae_decoder in case 0, of made-up inputs"):
        proof.record(part, entry, Source.open(str(model)), tmp_path / "proof")
    assert not (tmp_path / "proof").exists()


def test_the_floor_keeps_the_weights_that_the_artifact_keeps(baked, tmp_path):
    """The table of tokens, which torch has no codes for, stays as it is: rounded, it would be half of the floor."""
    artifact = Artifact.open(baked("torch:fp32,text_encoder=torch:nf4"))
    part, entry = proof.family_part(artifact, "text_encoder"), artifact.manifest.parts["text_encoder"]
    assert "text_model.embeddings.token_embedding.weight" in entry.kept
    floors = {}
    for name, kept in (("kept", entry.kept), ("rounded", {})):
        proof.record(part, replace(entry, kept=kept), Source.open("shapes"), tmp_path / name)
        with safe_open(tmp_path / name / "text_encoder.safetensors", "pt") as stream:
            floors[name] = proof.Floor.read(stream.metadata()["f1"]).error
    assert floors["kept"] < 0.9 * floors["rounded"]


@pytest.mark.parametrize(
    ("precision", "layers", "dtypes"),
    [
        ("fp32", (), []),
        ("fp32", ("fp32",), []),
        ("fp32", ("fp16",), ["float16", "bfloat16"]),
        ("fp32", ("int8",), ["bfloat16"]),
        ("fp16", (), ["float16", "bfloat16"]),
        ("fp16", ("int8",), ["float16", "bfloat16"]),
        ("fp16", ("bf16",), ["bfloat16"]),
        ("bf16", ("fp32",), ["bfloat16"]),
        ("int8", ("fp16",), ["bfloat16"]),
    ],
)
def test_the_floor_is_in_the_widest_dtype_of_a_part_and_its_layers(precision, layers, dtypes):
    mixture = plugins.mixture(precision, {str(number): each for number, each in enumerate(layers)})
    assert proof._floor_dtypes(mixture) == dtypes


def test_a_part_of_fp32_passes_with_layers_of_low_bits(tmp_path):
    recipe = PartRecipe("onnx", "fp32", layers={"text_model.encoder.layers.0.mlp.*": "int8"})
    export("shapes", tmp_path / "out", Recipe(PartRecipe("null", "fp32"), {"text_encoder": recipe}), prove=False)
    artifact = Artifact.open(tmp_path / "out")
    part, entry = proof.family_part(artifact, "text_encoder"), artifact.manifest.parts["text_encoder"]
    assert entry.weight_shares["int8"] > 0.1
    proof.record(part, entry, Source.open("shapes"), tmp_path / "out" / "proof")
    found = prover._prove_part(artifact, part, None)
    assert found["problem"] is None
    assert found["tolerance"] == pytest.approx(2 * found["f1"])


def test_floors_that_are_infinite_in_each_dtype_are_an_error():
    floors = [proof.Floor(math.inf), proof.Floor(0.25)]
    assert proof._first_finite(floors, "unet", "fp16").error == 0.25
    with pytest.raises(ParityError, match="for unet as well, once it is rounded to fp16"):
        proof._first_finite(floors[:1], "unet", "fp16")


def test_an_infinite_tolerance_lets_nothing_pass():
    infinite = distance.Measured({}, math.inf, -math.inf, 0.0, math.inf)
    assert "granted inf" in prover._problem("unet", [infinite], math.inf, math.inf)
    exact = distance.Measured({}, 1e-7, 140.0, 1.0, 1e-7)
    assert prover._problem("unet", [exact], 1e-7, 1e-6) is None
    assert "95 % confidence" in prover._problem("unet", [exact], math.nan, 1e-6)


@pytest.mark.slow
def test_a_budget_refuses_marks_and_stays(tmp_path, capsys):
    """A part that fails what the user asks is refused; let pass, it is marked for good."""
    target = tmp_path / "out"
    arguments = ["export", "shapes", "-o", str(target), "--recipe", "torch:fp32,vae_decoder=torch:bf16"]
    strict = [*arguments, "--budget", "vae_decoder=90dB"]
    assert main(strict) == ParityError.exit_code
    assert "vae_decoder differs from eager fp32" in capsys.readouterr().err
    assert not target.exists()
    assert main([*strict, "--allow-failing"]) == 0
    assert "failing: vae_decoder differs" in capsys.readouterr().out
    proved = Artifact.open(target).manifest.proof
    assert proved["parts"]["vae_decoder"]["budget"] == {"sqnr_db": 90.0, "reason": None}
    assert (
        proved["parts"]["vae_decoder"]["upper"] > max(c["error"] for c in proved["parts"]["vae_decoder"]["cases"]) / 2
    )
    assert not proved["parts"]["unet"]["problem"]
    assert main(strict) == ParityError.exit_code, "the same export again"
    assert main(["verify", str(target), "--parity"]) == 0
    assert main(["verify", str(target), "--parity", "--json"]) == 0
    assert Artifact.open(target).manifest.proof["status"] == "failing"


@pytest.mark.slow
def test_a_looser_budget_needs_a_reason(tmp_path, capsys):
    arguments = ["export", "shapes", "-o", str(tmp_path / "out"), "--recipe", "torch:fp32", "--budget", "unet=20dB"]
    assert main(arguments) == 2
    assert "looser than the" in capsys.readouterr().err
    assert main([*arguments, "--budget-reason", "a draft"]) == 0
    proved = Artifact.open(tmp_path / "out").manifest.proof
    assert proved["status"] == "proved"
    assert proved["parts"]["unet"]["budget"] == {"sqnr_db": 20.0, "reason": "a draft"}


@pytest.mark.parametrize("text", ["unet", "unet=", "unet=loud", "unet=.dB", "unet=0dB", "unet=7000dB", "nothing=30dB"])
def test_budgets_that_cannot_be_meant(tmp_path, text, capsys):
    arguments = ["export", "shapes", "-o", str(tmp_path / "out"), "--recipe", "torch:fp32", "--budget", text]
    assert main(arguments) == 2
    assert text.partition("=")[0] in capsys.readouterr().err


def test_a_part_that_computes_nothing_takes_no_budget(tmp_path, capsys):
    recipe = "null:fp32,vae_decoder=torch:fp32"
    arguments = ["export", "shapes", "-o", str(tmp_path / "out"), "--recipe", recipe, "--budget", "unet=30dB"]
    assert main(arguments) == 2
    assert "unet" in capsys.readouterr().err


def test_another_floor_is_of_the_weights_as_they_were():
    """Those that overflow in float16 don't in bfloat16, which is what an overflow is judged by then."""
    source = Source.open("shapes")
    part, mixture = source.family.part("vae_decoder"), plugins.mixture("fp16")
    flat = part.component.flat(part.component.load(source.path(part.module), torch.float32))
    inputs = part.component.example(source.config(part.module), PROOF_SIZES[0], seed=0)
    made = proof.eager(part.component, flat, source.config(part.module), inputs)
    tensors = {f"0.in.{name}": value for name, value in inputs.items()}
    tensors |= {f"0.out.{name}": value for name, value in made.items()}

    def floors(dtypes):
        fresh = part.component.flat(part.component.load(source.path(part.module), torch.float32))
        return list(proof._rounded_floors(part, fresh, source, mixture, source.path(part.module), tensors, dtypes))

    assert floors(["float16", "bfloat16"])[1] == floors(["bfloat16"])[0]


def test_a_row_of_noughts_is_held_to_the_parts_tolerance():
    """An empty prompt may leave a text encoder nothing to make: rounding changes none of that."""
    floors = {"f0": proof.Floor(1e-6, (1e-6, 1e-6, 0.0)), "f1": proof.Floor(0.01, (0.01, 0.01, 0.0))}
    by_row = proof.row_tolerances(floors)
    assert by_row == [0.02, 0.02, 0.02]
    assert prover._upper([0.0] * 3, by_row, 0.02) == 0
    assert prover._upper([0.01, 0.01, 0.04], by_row, 0.02) > 0.02


def test_a_part_that_makes_noughts_alone_is_granted_what_float32_is():
    """A fresh ControlNet makes nothing but noughts, in every dtype."""
    floors = {"f0": proof.Floor(0.0, (0.0, 0.0)), "f1": proof.Floor(0.0, (0.0, 0.0))}
    assert proof.justified(floors) == FP32_LEAST
    assert prover._upper([0.0, 0.0], proof.row_tolerances(floors), FP32_LEAST) == 0


def test_recording_in_float32_counts_whatever_the_codes_take(baked):
    artifact, source = Artifact.open(baked("null:fp32,unet=onnx:int8")), Source.open("shapes")
    wide = source.checkpoint("unet").bytes_in("float32")
    assert sum(artifact.manifest.parts["unet"].weight_bytes.values()) < 0.3 * wide
    assert prover._needed_bytes(artifact, source) == int(0.7e9 + 1.5 * wide)
    assert prover._needed_bytes(artifact, None) < 0.7e9 + 0.5 * wide


def test_no_floor_justifies_that_nothing_is_left_of_an_output():
    """F1 grows with what a recipe breaks: twice 0.5 would grant an output of noughts."""
    assert tolerance(1e-7, 0.1) == 0.2
    assert tolerance(1e-7, 0.5) == tolerance(1e-7, 1.0) == 0.5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=12))
def test_the_upper_bound_is_that_of_students_t(errors):
    from scipy import stats

    logs = np.log(errors)
    t = stats.t.ppf(0.975, min(len(logs) - 1, 9))
    bound = math.exp(logs.mean() + t * logs.std(ddof=1) / math.sqrt(len(logs)))
    assert upper_bound(errors) == pytest.approx(bound, rel=1e-3)
