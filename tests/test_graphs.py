"""Graphs that are kept from one export to the next."""

import os
from dataclasses import replace

import pytest

from bakeoff.bake import export
from bakeoff.components.component import Port
from bakeoff.exporters import graphs
from bakeoff.exporters.exporter import Subject
from bakeoff.exporters.graphs import Shelf
from bakeoff.recipe import parse


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def subject():
    return Subject(
        part="unet",
        mixture=None,
        activations={},
        inputs=(Port("sample", "float32", ("batch", 4)),),
        outputs=(),
        source=None,
        checkpoint=None,
        capture=None,
        module=None,
        weights="auto",
        origin={"source": {"config.json": "1"}},
    )


def _fill(folder):
    (folder / "graph").write_text("whole")


def _contents(folder):
    """What a part's folder holds, without what differs between two runs of the same export."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("backend", "parts"),
    [
        ("onnx", {"text_encoder": "int8"}),
        *(
            pytest.param(backend, {"text_encoder": "int8", "vae_decoder": "bf16"}, marks=pytest.mark.slow)
            for backend in ("onnx", "openvino")
        ),
    ],
)
def test_a_kept_graph_makes_the_same_files(home, tiny, tmp_path, monkeypatch, backend, parts):
    source = tiny("stable-diffusion")
    recipe = parse(",".join(["null:fp32", *(f"{part}={backend}:{name}" for part, name in parts.items())]))[0]
    fresh = export(str(source), tmp_path / "fresh", recipe, prove=False)
    kept = sorted(folder.name.partition("-")[0] for folder in (home / "graphs").iterdir())
    assert kept == [backend] * len(parts)

    def never(*_):
        pytest.fail("captured again")

    monkeypatch.setattr("bakeoff.exporters.capture.capture", never)
    again = export(str(source), tmp_path / "again", recipe, prove=False)
    for part in fresh.manifest.parts:
        assert _contents(again.folder / part) == _contents(fresh.folder / part), part
    assert again.manifest.parts == fresh.manifest.parts


def test_what_decides_on_a_graph_has_a_place_of_its_own(home, subject):
    others = [
        replace(subject, part="other"),
        replace(subject, origin={"source": {"config.json": "2"}}),
        replace(subject, inputs=(Port("sample", "float32", ("batch", 8)),)),
    ]
    places = {Shelf.of(each, "onnx", ("torch",)).folder for each in (subject, *others)}
    places |= {Shelf.of(subject, "openvino", ("torch",)).folder, Shelf.of(subject, "onnx", ("torch", "onnx")).folder}
    assert len(places) == 6
    assert Shelf.of(subject, "onnx", ("torch",)).folder in places


def test_other_code_makes_another_graph(home, subject, monkeypatch):
    place = Shelf.of(subject, "onnx", ())
    monkeypatch.setattr(graphs, "_code", lambda: "other")
    assert Shelf.of(subject, "onnx", ()) != place


def test_a_part_of_no_origin_is_not_kept(home, subject):
    shelf = Shelf.of(replace(subject, origin=None), "onnx", ())
    shelf.keep(_fill)
    assert shelf.found() is None
    assert not home.exists()


def test_a_graph_is_kept_whole_or_not_at_all(home, subject):
    def stop(folder):
        _fill(folder)
        raise KeyboardInterrupt

    shelf = Shelf.of(subject, "onnx", ())
    with pytest.raises(KeyboardInterrupt):
        shelf.keep(stop)
    assert shelf.found() is None
    assert not [*(home / "graphs").iterdir()]
    shelf.keep(_fill)
    assert (shelf.found() / "graph").read_text() == "whole"


def test_a_home_that_cannot_be_written_is_done_without(tmp_path, subject, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BAKEOFF_HOME", str(tmp_path / "file"))
    shelf = Shelf.of(subject, "onnx", ())
    shelf.keep(_fill)
    assert shelf.found() is None


def test_the_oldest_go(home, subject, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST", 2)
    shelves = [Shelf.of(replace(subject, part=name), "onnx", ()) for name in "abc"]
    for number, shelf in enumerate(shelves):
        shelf.keep(_fill)
        if number == 1:
            os.utime(shelves[1].folder, (1, 1))
            os.utime(shelves[0].folder, (2, 2))
    assert [shelf.found() is not None for shelf in shelves] == [True, False, True]
