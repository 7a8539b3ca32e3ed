"""Capturing each part of `shapes`, and lowering the small ones."""

import itertools

import pytest

from bakeoff import plugins
from bakeoff.exporters.capture import on_hollow
from bakeoff.exporters.exporter import Subject
from bakeoff.sources.source import Source

ROUNDS = 3


@pytest.fixture(scope="module")
def source():
    return Source.open("shapes")


def captured(source, part, work):
    config = source.config(part.module)
    return on_hollow(part.name, part.component, config, source.path(part.module), work)(frozenset())


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_capture(benchmark, source, tmp_path, name):
    benchmark.group = f"export: {name}"
    benchmark.pedantic(captured, (source, source.family.part(name), tmp_path / name), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_lower(benchmark, source, tmp_path, name, backend):
    benchmark.group = f"export: {name}"
    part, exporter, numbers = source.family.part(name), plugins.exporter(backend), itertools.count()

    def prepare():
        """Capture anew, outside of the time: lowering may change the program."""
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        ready = captured(source, part, tmp_path / "work")
        return (subject(source, part, ready), folder), {}

    benchmark.pedantic(exporter.lower, setup=prepare, rounds=ROUNDS, warmup_rounds=1)


def subject(source, part, ready):
    config = source.config(part.module)
    return Subject(
        part=part.name,
        precision="fp32",
        inputs=part.component.inputs(config),
        outputs=part.component.outputs(config),
        source=source.folder / part.module,
        checkpoint=source.checkpoint(part.module),
        capture=lambda _: ready,
        weights="auto",
    )
