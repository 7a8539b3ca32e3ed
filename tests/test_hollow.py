import pytest
import torch
from safetensors.torch import load_file, save_file

from bakeoff.errors import LoweringError
from bakeoff.exporters.hollow import SOLID_BYTES, Hollow, lower_hollow
from bakeoff.weights import Checkpoint, as_bytes


@pytest.fixture
def source(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(256, 128, generator=generator).bfloat16(),
        "b.weight": torch.randn(256, 128, generator=generator).half(),
        "b.bias": torch.randn(256, generator=generator),
        "ids": torch.arange(5),
    }
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


@pytest.fixture
def hollow(source, tmp_path):
    return Hollow.make(source[0], tmp_path / "hollow")


def test_large_tensors_are_marked_holes_and_small_ones_are_as_they_are(source, hollow):
    found = load_file(hollow.folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in source[1].items()}
    assert torch.equal(found["b.bias"], source[1]["b.bias"])
    assert torch.equal(found["ids"], source[1]["ids"])
    assert found["a.weight"].dtype == torch.float32
    assert found["a.weight"].count_nonzero() <= 4


def test_holes_take_no_disk(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"weight": torch.ones(4096, 4096)}, source / "model.safetensors")
    file = Hollow.make(source, tmp_path / "hollow").folder / "model.safetensors"
    assert file.stat().st_size > 64 << 20
    assert file.stat().st_blocks * 512 < 1 << 20


def test_large_checkpoints_get_several_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr("bakeoff.exporters.hollow._SHARD_BYTES", 150_000)
    hollow = Hollow.make(source[0], tmp_path / "hollow")
    found = Checkpoint.open(hollow.folder)
    assert [file.name for file in found.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert set(found.entries) == set(source[1])
    tensors = {name: tensor for file in found.files for name, tensor in load_file(file).items()}
    assert all(hollow.entry_of(as_bytes(tensor)).name == name for name, tensor in tensors.items())


def test_bytes_lead_back_to_the_checkpoint(hollow):
    found = load_file(hollow.folder / "model.safetensors")
    for name, tensor in found.items():
        entry = hollow.entry_of(as_bytes(tensor))
        assert entry is not None
        assert entry.name == name
    assert hollow.entry_of(as_bytes(found["a.weight"])).dtype == "BF16"
    assert hollow.entry_of(as_bytes(found["a.weight"].reshape(128, 256))).name == "a.weight"


def test_changed_tensors_are_not_found(hollow):
    found = load_file(hollow.folder / "model.safetensors")
    assert hollow.entry_of(as_bytes(found["a.weight"].T.contiguous())) is None
    assert hollow.entry_of(as_bytes(found["a.weight"] * 2)) is None
    assert hollow.entry_of(as_bytes(found["a.weight"][:128].contiguous())) is None
    assert hollow.entry_of(as_bytes(found["b.bias"] + 1e-6)) is None


class _Two(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.a = torch.nn.Parameter(tensors["a.weight"])
        self.b = torch.nn.Parameter(tensors["b.weight"])

    def forward(self, x):
        return x @ self.a.T


def test_a_program_needs_the_tensors_that_it_uses(hollow):
    module = _Two(load_file(hollow.folder / "model.safetensors"))
    program = torch.export.export(module, (torch.ones(2, 128),))
    assert hollow.needed(program) == {"a.weight": 1}


def test_what_a_lowering_changes_is_captured_with_its_values(source, tmp_path):
    asked = []

    def capture(solid):
        asked.append(solid)
        hollow = Hollow.make(source[0], tmp_path / "hollow", solid)
        module = _Two(load_file(hollow.folder / "model.safetensors"))
        return torch.export.export(module, (torch.ones(2, 128),)), hollow

    def lower(program, _):
        return program.state_dict["a"].T.clone(), set()

    folded = lower_hollow("part", capture, lower)
    assert asked == [frozenset(), frozenset({"a.weight"})]
    assert torch.equal(folded, source[1]["a.weight"].float().T)


def test_a_lowering_that_loses_solid_tensors_is_an_error():
    class Greedy:
        def needed(self, _):
            return {"a.weight": 1}

    with pytest.raises(LoweringError, match=r"part: lowering loses a\.weight"):
        lower_hollow("part", lambda _: (None, Greedy()), lambda *_: (None, set()))


def test_small_means_what_optimizers_may_fold():
    from bakeoff.exporters.onnx import _FOLD_ELEMENTS

    assert SOLID_BYTES > 4 * _FOLD_ELEMENTS
