import json
import os
import random
import shutil

import pytest

from bakeoff.artifact import MANIFEST, Artifact, inside, list_files, scratch, staged
from bakeoff.bake import export
from bakeoff.cli import main
from bakeoff.errors import ArtifactError, CorruptError, ParityError, SourceError, UnavailableError
from bakeoff.plan import plan, why_rebuild
from bakeoff.recipe import from_toml, parse
from bakeoff.sources.source import Source


def test_a_fresh_artifact_verifies(baked):
    artifact = Artifact.open(baked("torch:fp32", proved=True))
    assert artifact.verify() == []
    assert artifact.manifest.proved
    assert set(artifact.manifest.parts) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}


@pytest.mark.parametrize("recipe", ["torch:fp32", "onnx:fp32", "openvino:fp32"])
def test_one_flipped_byte_of_any_file_is_found(copied, recipe):
    folder = copied(recipe)
    rng = random.Random(0)
    names = [name for name in list_files(folder) if (folder / name).stat().st_size]
    for name in names:
        flip(folder / name, rng)
    assert sorted(problem.partition(" was changed")[0] for problem in Artifact.open(folder).verify()) == names


def flip(file, rng):
    """Flip one bit; return a function that flips it back."""
    data = bytearray(file.read_bytes())
    position, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    data[position] ^= bit
    file.write_bytes(data)

    def back():
        data[position] ^= bit
        file.write_bytes(data)

    return back


def test_one_flipped_bit_of_the_manifest_is_found(copied):
    folder = copied("torch:fp32")
    rng = random.Random(0)
    for _ in range(200):
        back = flip(folder / MANIFEST, rng)
        with pytest.raises(CorruptError):
            Artifact.open(folder)
        back()
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b"\n", b"\r"))
    with pytest.raises(CorruptError):
        Artifact.open(folder)


def test_a_missing_cut_or_added_file_is_found(copied):
    folder = copied("torch:fp32")
    (folder / "unet" / "extra").write_text("hello")
    assert Artifact.open(folder).verify() == ["unet/extra is not in the manifest"]
    os.truncate(folder / "unet" / "config.json", 5)
    with pytest.raises(CorruptError, match="unet/config.json has 5 bytes"):
        Artifact.open(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CorruptError, match="unet/config.json is missing"):
        Artifact.open(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, name):
    with pytest.raises(ArtifactError, match="outside of itself"):
        inside(tmp_path, name)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "artifact" / "model").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="outside of itself"):
        inside(tmp_path / "artifact", "model")


def test_a_later_schema_says_to_upgrade(copied):
    folder = copied("torch:fp32")
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(ArtifactError, match="upgrade"):
        Artifact.open(folder)


def test_the_same_export_again_does_nothing(baked):
    folder = baked("torch:fp32", proved=True)
    before = (folder / MANIFEST).stat().st_mtime_ns
    said = []
    export("shapes", folder, parse("torch:fp32")[0], progress=said.append)
    assert (folder / MANIFEST).stat().st_mtime_ns == before
    assert said == [f"{folder} is up to date"]


def test_another_export_there_needs_force(baked):
    folder = baked("torch:fp32")
    with pytest.raises(ArtifactError, match="--force"):
        export("shapes", folder, parse("null:fp32")[0])
    assert Artifact.open(folder).verify() == []


def test_why_rebuild_names_the_fields(baked):
    artifact = Artifact.open(baked("torch:fp32"))
    assert why_rebuild(artifact, plan("shapes", parse("torch:fp32")[0])) == []
    reasons = why_rebuild(artifact, plan("shapes", parse("torch:fp32,unet=torch:bf16")[0]))
    assert reasons == ["unet.recipe.precision: fp32 -> bf16"]


@pytest.mark.slow
def test_no_prove_says_unproved_and_verify_proves_it_later(tmp_path):
    from bakeoff.parity import prover
    from bakeoff.parity.origin import source_of

    artifact = export("shapes", tmp_path / "a", parse("torch:fp32")[0], prove=False)
    assert not artifact.manifest.proved
    with pytest.raises(UnavailableError, match="--source"):
        prover.prove_in_place(artifact, None)
    with source_of(artifact, "shapes") as source:
        assert prover.prove_in_place(artifact, source).manifest.proved
    assert Artifact.open(tmp_path / "a").verify() == []


def test_a_proof_that_fails_changes_nothing(copied, monkeypatch):
    from bakeoff.parity import prover

    folder = copied("torch:fp32", proved=True)
    before = (folder / MANIFEST).read_bytes()

    def fail(*_):
        message = "killed"
        raise ParityError(message)

    monkeypatch.setattr(prover, "in_child", fail)
    with pytest.raises(ParityError):
        prover.prove_in_place(Artifact.open(folder), Source.open("shapes"))
    monkeypatch.setattr(prover, "available_bytes", lambda: 0)
    with pytest.raises(UnavailableError, match="GB of memory"):
        prover.prove_in_place(Artifact.open(folder), Source.open("shapes"))
    assert (folder / MANIFEST).read_bytes() == before
    assert Artifact.open(folder).verify() == []


def test_another_model_is_no_source_of_a_proof(copied, baked, tmp_path):
    from bakeoff.parity.origin import source_of

    other = _as_diffusers(baked("torch:fp32"), tmp_path / "other")
    with (
        pytest.raises(SourceError, match="is not what"),
        source_of(Artifact.open(copied("torch:fp32")), str(other)),
    ):
        pass


def test_a_controlnet_may_lie_elsewhere_by_then(tiny, tmp_path):
    from bakeoff.parity.origin import source_of

    folder = tiny("stable-diffusion")
    module = shutil.copytree(tiny("stable-diffusion", "controlnet") / "controlnet", tmp_path / "edges")
    artifact = export(str(folder), tmp_path / "out", parse("null:fp32")[0], controlnet=str(module), prove=False)
    moved = module.rename(tmp_path / "moved")
    with pytest.raises(SourceError, match="edges"), source_of(artifact, str(folder)):
        pass
    with source_of(artifact, str(folder), controlnet=str(moved)) as source:
        assert source.path("controlnet") == moved


def test_scratch_folders_lie_beside_each_other(tmp_path):
    with scratch(tmp_path / "out") as one, scratch(tmp_path / "out") as two:
        (one / "file").touch()
        assert not any(two.iterdir())
    assert not list(tmp_path.iterdir())


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ArtifactError, match="already exists"), staged(target, replace_existing=False) as folder:
        (folder / "file").write_text("new")
        target.mkdir()
        (target / "letter").write_text("precious")
    assert (target / "letter").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_staged_leaves_nothing_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out", replace_existing=False) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_staged_swaps_whole_folders(tmp_path):
    for text in ("old", "new"):
        with staged(tmp_path / "out", replace_existing=True) as folder:
            (folder / "file").write_text(text)
            (folder / MANIFEST).write_text("{}")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_force_replaces_nothing_but_artifacts(tmp_path, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("x")
    else:
        target.mkdir()
        (target / "letter").write_text("x")
    with pytest.raises(ArtifactError, match="artifacts and empty folders alone"):
        export("shapes", target, parse("null:fp32")[0], force=True)
    assert (target if kind == "file" else target / "letter").read_text() == "x"


def test_staged_sweeps_what_the_killed_left(tmp_path):
    (tmp_path / ".out.partial-999999999").mkdir()
    with staged(tmp_path / "out", replace_existing=False):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_are_shared_with_the_source_or_copied(tmp_path, baked):
    source = tmp_path / "source"
    export("shapes", source, parse("torch:fp32")[0], prove=False)
    rebuilt = _as_diffusers(source, tmp_path / "diffusers")
    linked = export(str(rebuilt), tmp_path / "linked", parse("torch:fp32")[0], prove=False)
    assert linked.manifest.parts["unet"].weights in {"linked", "reflinked"}
    copied = export(str(rebuilt), tmp_path / "copied", parse("torch:fp32")[0], prove=False, weights="copy")
    assert copied.manifest.parts["unet"].weights == "copied"
    files = list((tmp_path / "copied").rglob("*.safetensors"))
    assert all(file.stat().st_nlink == 1 for file in files)


def _as_diffusers(artifact, target):
    """Make a fp32 Diffusers folder of a torch artifact."""
    import shutil

    shutil.copytree(artifact, target)
    (target / "vae_decoder").rename(target / "vae")
    shutil.rmtree(target / "vae_encoder")
    (target / MANIFEST).unlink()
    return target


def test_what_an_earlier_process_of_the_same_number_left_is_swept(tmp_path):
    """In a container each run may have the number 1."""
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("x")
    with scratch(tmp_path / "out") as work, staged(tmp_path / "out", replace_existing=False) as folder:
        assert list(folder.iterdir()) == []
        assert work.is_dir(), "what this process is using stays"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_one_and_the_folder_behind_it_is_replaced(tmp_path):
    (tmp_path / "v3").mkdir()
    (tmp_path / "v3" / MANIFEST).write_text("{}")
    link = tmp_path / "current"
    link.symlink_to("v3")
    with staged(link, replace_existing=True) as folder:
        (folder / "file").write_text("new")
        (folder / MANIFEST).write_text("{}")
    assert link.is_symlink()
    assert (tmp_path / "v3" / "file").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "v3"]


def test_an_artifact_with_layers_of_their_own_is_inspected(tmp_path, capsys):
    recipe = from_toml(
        'backend = "null"\nprecision = "fp32"\n[parts.unet]\nbackend = "torch"\n'
        'precision = "bf16"\n[parts.unet.layers]\nconv_in = "fp32"\n'
    )
    export("shapes", tmp_path / "out", recipe, prove=False)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "torch:bf16 but for 1 layer" in capsys.readouterr().out
