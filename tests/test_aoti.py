"""Code that AOTInductor compiled: on the machine that it was made for, from a verified manifest alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import bakeoff
import bakeoff.pictures
from bakeoff import plugins
from bakeoff.artifact import Artifact
from bakeoff.bake import export
from bakeoff.components.component import Port
from bakeoff.errors import ArtifactError, CorruptError, InputError, RecipeError, UnavailableError, UsageError
from bakeoff.exporters import aoti as written
from bakeoff.parity import explain, meaning, prover, trajectory
from bakeoff.recipe import Placement, parse
from bakeoff.runtimes import aoti, opening
from bakeoff.runtimes.opening import open_part, read_folder
from bakeoff.runtimes.runtime import PartFiles
from bakeoff.sources.source import Source
from bakeoff.weights import sha256

PROMPT = "a large red circle on a white background"


@pytest.fixture
def part(tmp_path):
    """Return the files of a part whose code is garbage: it must never be opened."""
    (tmp_path / aoti.PACKAGE).write_bytes(b"native code")
    (tmp_path / aoti.CONSTANTS).write_bytes(b"")
    (tmp_path / aoti.FACTS).write_text(json.dumps(written.facts()))
    port = Port("x", "float32", ("batch", 2))
    return PartFiles("unet", tmp_path, "fp32", (port,), (port,), lambda dtype: None)


def vouched(part):
    hashes = {name: sha256(part.folder / name) for name in (aoti.PACKAGE, aoti.FACTS, aoti.CONSTANTS)}
    return PartFiles(part.name, part.folder, "fp32", part.inputs, part.outputs, part.build, vouched=hashes)


@pytest.fixture
def never_opened(monkeypatch):
    def opened(*_):
        pytest.fail("native code was opened")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", opened)


def test_without_a_manifest_it_is_not_opened(part, never_opened):
    with pytest.raises(ArtifactError, match="no verified manifest vouches for") as raised:
        aoti.Compiled(part, torch.nn.Identity(), "cpu")
    assert "+aoti" in raised.value.fix


@pytest.mark.parametrize("name", [aoti.PACKAGE, aoti.FACTS, aoti.CONSTANTS])
def test_a_changed_byte_is_not_opened(part, never_opened, name):
    files = vouched(part)
    (part.folder / name).write_bytes(b"other code")
    with pytest.raises(CorruptError, match="changed after it was written"):
        aoti.Compiled(files, torch.nn.Identity(), "cpu")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"instruction_sets": ["avx2", "avx1024"]}, "instruction sets that aren't here: avx1024"),
        ({"torch": "2.0.0"}, "torch 2.0.0, here"),
        ({"device": "cuda", "gpu": "NVIDIA H100", "compute_capability": "9.0"}, "device cuda, here cpu"),
    ],
)
def test_code_for_another_machine_is_not_opened(part, never_opened, change, says):
    facts = {**written.facts(), "device": "cpu", **change}
    (part.folder / aoti.FACTS).write_text(json.dumps(facts))
    with pytest.raises(UnavailableError, match=says):
        aoti.Compiled(vouched(part), torch.nn.Identity(), "cpu")


GIVEN = {"dtype": "float32", "dims": [[1, None], [4, 4], [1, 77]]}


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (torch.zeros(1, 4, 77), True),
        (torch.zeros(9, 4, 5), True),
        (torch.zeros(1, 5, 77), False),
        (torch.zeros(1, 4, 78), False),
        (torch.zeros(1, 4, 77).half(), False),
        (torch.zeros(4, 77), False),
    ],
)
def test_what_the_code_was_not_made_for_is_refused(tensor, fits):
    if fits:
        aoti._refuse_misfit("unet", "sample", GIVEN, tensor)
        return
    with pytest.raises(InputError, match=r"compiled for \(1 to any, 4, 1 to 77\) float32"):
        aoti._refuse_misfit("unet", "sample", GIVEN, tensor)


class Placed(BaseException):  # stops what has placed a part, and is caught by nothing
    pass


def test_whoever_judges_places_code_on_the_device_that_it_was_made_for(baked, shapes, tmp_path, monkeypatch):
    seen = []

    def opened(*given, **_):
        seen.append(next(each for each in given if isinstance(each, Placement)))
        raise Placed

    artifact = Artifact.open(Path(shutil.copytree(baked("torch:fp32", proved=True), tmp_path / "artifact")))
    (artifact.folder / "text_encoder" / aoti.PACKAGE).touch()
    (artifact.folder / "text_encoder" / aoti.FACTS).write_text(json.dumps({"device": "cuda"}))
    for module, name in ((opening, "open_part"), (explain, "open_part"), (trajectory, "Engine"), (meaning, "Engine")):
        monkeypatch.setattr(module, name, opened)
    monkeypatch.setattr(meaning, "_right", lambda *_: [True])
    part = opening.of_artifact(artifact).family.part("text_encoder")
    for judge in (
        lambda: prover._prove_part(artifact, part, None),
        lambda: explain.explain(artifact, Source.open(str(shapes))),
        lambda: trajectory.prove(artifact),
        lambda: meaning.judge_here(str(artifact.folder), str(shapes), {}, 2),
    ):
        with pytest.raises(Placed):
            judge()
        assert seen[-1].of("text_encoder").device == "cuda"
    assert seen[-1].of("unet").device == seen[-2].of("unet").device == "cpu"


def test_exporter_and_runtime_agree_on_names():
    assert (written.PACKAGE, written.FACTS, written.CONSTANTS) == (aoti.PACKAGE, aoti.FACTS, aoti.CONSTANTS)


def test_it_is_for_float_weights_and_takes_a_compiler(monkeypatch):
    exporter = plugins.exporter("torch")
    exporter.check("nf4", {})
    with pytest.raises(RecipeError, match="float weights alone, got nf4"):
        exporter.check("nf4", {"aoti": ""})
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnavailableError, match=r"C\+\+ compiler"):
        exporter.check("fp32", {"aoti": ""})


def test_the_machine_is_in_the_key_of_what_is_bound_to_it_alone():
    exporter = plugins.exporter("torch")
    assert exporter.key_fields("fp32", {}) == {}
    bound = exporter.key_fields("fp32", {"aoti": ""})["bound"]
    assert bound["torch"] == torch.__version__
    assert bound["device"] in {"cpu", "cuda"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_part_computes_what_the_module_does(tmp_path, shapes, precision):
    """The text encoder alone: a UNet takes minutes to compile."""
    recipe = f"torch:{precision},text_encoder=torch:{precision}+aoti"
    artifact = export(str(shapes), tmp_path / "artifact", parse(recipe)[0])
    assert artifact.manifest.proved
    assert artifact.manifest.hardware["text_encoder"] == written.facts()
    plain = export(str(shapes), tmp_path / "plain", parse(f"torch:{precision}")[0], prove=False)
    pictures = []
    for folder in (artifact.folder, plain.folder):
        with bakeoff.load(folder, device="cpu", threads=1) as engine:
            pictures.append(engine.generate(PROMPT, seeds=1, steps=2).images)
            told = engine.configuration["text_encoder"]["compile"]
        assert told == ("aoti" if folder == artifact.folder else False)
    assert bakeoff.pictures.psnr(*pictures) > (45 if precision == "fp32" else 25)
    with pytest.raises(UsageError, match="attention can't change it"):
        with bakeoff.load(artifact.folder, device="cpu", attention="math") as engine:
            engine.generate(PROMPT, seeds=1, steps=1)
    opened = read_folder(artifact.folder)
    part = opened.family.part("text_encoder")
    files = opened.folders[part.name], part, opened.parts[part.name], Placement("cpu", threads=1)
    with pytest.raises(ArtifactError, match="no verified manifest"):
        open_part(*files)
    with (
        open_part(*files, vouched=opened.vouched(part.name)) as runtime,
        open_part(plain.folder / part.name, part, opened.parts[part.name], Placement("cpu", threads=1)) as eager,
    ):
        for rows, tokens in ((1, 32), (3, 5)):  # other shapes than it was captured at
            ids = {"input_ids": torch.arange(rows * tokens).reshape(rows, tokens) % 90}
            got, expected = runtime.run(ids), eager.run(ids)
            assert all((got[name] - expected[name]).abs().max() < 0.1 for name in expected)
        with pytest.raises(InputError, match="1 to 32"):  # there are no more positions: it would read beyond them
            runtime.run({"input_ids": torch.ones(1, 77, dtype=torch.int64)})
