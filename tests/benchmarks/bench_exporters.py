"""Capturing each part of `shapes`, and lowering the small ones."""

import itertools

import pytest

from bakeoff import plugins
from bakeoff.exporters.capture import capture
from bakeoff.exporters.exporter import Subject
from bakeoff.source import Source

ROUNDS = 3


@pytest.fixture(scope="module")
def source():
    return Source.open("shapes")


def captured(source, part):
    return capture(part.name, part.component, source.config(part.module), source.folder / part.module, "float32")


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_capture(benchmark, source, name):
    benchmark.group = f"export: {name}"
    benchmark.pedantic(captured, (source, source.family.part(name)), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_lower(benchmark, source, tmp_path, name, backend):
    benchmark.group = f"export: {name}"
    part, exporter, numbers = source.family.part(name), plugins.exporter(backend), itertools.count()

    def prepare():
        """Capture anew, outside of the time: lowering may change the program."""
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return (subject(source, part, captured(source, part)), folder), {}

    benchmark.pedantic(exporter.lower, setup=prepare, rounds=ROUNDS, warmup_rounds=1)


def subject(source, part, program):
    config = source.config(part.module)
    return Subject(
        part=part.name,
        precision="fp32",
        inputs=part.component.inputs(config),
        outputs=part.component.outputs(config),
        source=source.folder / part.module,
        checkpoint=source.checkpoint(part.module),
        program=lambda: program,
        weights="auto",
    )
