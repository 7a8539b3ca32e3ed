import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bakeoff.errors import PickleError, SourceError, UsageError
from bakeoff.naming import meant
from bakeoff.weights import Checkpoint, convert, place, read_chunks, read_header, read_rows, write_entries


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(64, 48, generator=generator),
        "a.bias": torch.zeros(64),
        "b.bias": torch.zeros(64),
        "ids": torch.arange(5),
        "half": torch.randn(7, 3, generator=generator).half(),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_entries_are_where_the_bytes_are(folder, tensors):
    for entry in Checkpoint.open(folder).entries.values():
        data = entry.file.read_bytes()[entry.offset : entry.offset + entry.length]
        assert data == tensors[entry.name].numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_convert_is_torchs_conversion(folder, tensors, tmp_path, dtype):
    convert(Checkpoint.open(folder), tmp_path / "out.safetensors", dtype)
    written = load_file(tmp_path / "out.safetensors")
    for name, tensor in tensors.items():
        expected = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert torch.equal(written[name], expected)
        assert written[name].dtype == expected.dtype


def test_write_entries_keeps_bytes(folder, tmp_path):
    entries = Checkpoint.open(folder).entries
    places = write_entries([entries["half"], entries["ids"]], tmp_path / "some.safetensors")
    assert set(places) == {"half", "ids"}
    assert torch.equal(
        load_file(tmp_path / "some.safetensors")["half"], load_file(folder / "model.safetensors")["half"]
    )


def test_shards_are_read_through_their_index(tmp_path, tensors):
    names = list(tensors)
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"shard-{number}.safetensors")
    weight_map = {name: f"shard-{int(i > 1)}.safetensors" for i, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.entries) == set(names)
    assert len(checkpoint.files) == 2


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(SourceError, match="not a file of that folder"):
        Checkpoint.open(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PickleError, match="convert once"):
        Checkpoint.open(tmp_path)


@settings(max_examples=30)
@given(st.binary(max_size=64))
def test_garbage_is_not_safetensors(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("garbage") / "model.safetensors"
    file.write_bytes(data)
    try:
        assert read_header(file) == []
    except SourceError:
        return


def test_a_cut_file_says_so(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(SourceError, match="cut short"):
        read_header(file)


@pytest.mark.parametrize(("mode", "shared"), [("auto", True), ("link", True), ("copy", False)])
def test_place(folder, mode, shared):
    how = place(folder / "model.safetensors", folder / "placed", mode)
    assert (folder / "placed").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (how in {"linked", "reflinked"}) == shared


def test_link_that_cannot_be_is_an_error(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("bakeoff.weights._reflink", lambda *_: False)
    with pytest.raises(UsageError, match="different file systems"):
        place(folder / "model.safetensors", tmp_path / "placed", "link")
    assert place(folder / "model.safetensors", tmp_path / "placed", "auto") == "copied"


@pytest.mark.parametrize("header", [b'{"a":1}', b"[1]", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["x",4]}}'])
def test_a_header_that_says_nothing_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SourceError, match="header can't be read"):
        read_header(file)


@pytest.mark.parametrize("index", [b"{", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": "model-1.safetensors"}}'])
def test_a_broken_index_or_a_lacking_shard_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(SourceError, match="index"):
        Checkpoint.open(tmp_path)


def test_a_variant_alone_is_refused_with_the_name_to_give_it(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(SourceError, match="expected .*model.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("path", "names", "expected"),
    [
        ("proj_out", ["blocks.0.proj_out", "proj_out"], "proj_out"),
        ("module.proj_out", ["blocks.0.proj_out", "proj_out"], "proj_out"),
        ("module.blocks.0.proj_out", ["proj_out", "blocks.0.proj_out", "blocks.1.proj_out"], "blocks.0.proj_out"),
        ("proj_out", ["model.blocks.0.proj_out", "model.proj_out"], "model.proj_out"),
        ("proj", ["my_proj", "blocks.projection"], None),
    ],
)
def test_the_name_that_a_path_means(path, names, expected):
    assert meant(path, names) == meant(path, names[::-1]) == expected


@pytest.mark.parametrize(("value", "rounded", "converted"), [(float("nan"), True, True), (float("inf"), True, False)])
def test_what_holds_no_number_is_neither_rounded_nor_converted(tmp_path, value, rounded, converted):
    """A mask may be of infinities, and be stored in fewer bits; no weight may be NaN."""
    broken = torch.ones(4, 8)
    broken[2, 3] = value
    save_file({"w": broken}, tmp_path / "model.safetensors")
    (entry,) = read_header(tmp_path / "model.safetensors")
    for read, refused in (
        (lambda: list(read_rows(entry)), rounded),
        (lambda: list(read_chunks(entry, "BF16")), converted),
    ):
        if refused:
            with pytest.raises(SourceError, match=r"w of .*model.safetensors holds NaN"):
                read()
        else:
            read()
    list(read_chunks(entry, "F32"))  # as it is
