"""An artifact's manifest, keys and hashes, and recipes."""

import pytest

from bakeoff import recipe
from bakeoff.artifact import MANIFEST, Artifact, Manifest, describe_files
from bakeoff.plan import plan, why_rebuild
from bakeoff.weights import sha256

RECIPE = "onnx:fp32"
SHORT = "openvino:bf16,vae_decoder=torch:fp32"


@pytest.fixture
def artifact(baked):
    return Artifact.open(baked(RECIPE))


@pytest.mark.benchmark(group="manifest")
def test_read(benchmark, artifact):
    file = artifact.folder / MANIFEST
    benchmark(Manifest.parse, file.read_bytes(), file)


@pytest.mark.benchmark(group="manifest")
def test_open(benchmark, artifact):
    benchmark(Artifact.open, artifact.folder)


@pytest.mark.benchmark(group="manifest")
def test_write(benchmark, artifact, tmp_path):
    benchmark(Artifact(tmp_path, artifact.manifest).write_manifest)


@pytest.mark.benchmark(group="hash")
def test_verify(benchmark, artifact):
    assert benchmark(artifact.verify) == []


@pytest.mark.benchmark(group="hash")
def test_describe_files(benchmark, artifact):
    benchmark(describe_files, artifact.folder)


@pytest.mark.benchmark(group="hash")
def test_sha256_of_the_largest_file(benchmark, artifact):
    largest = max(artifact.manifest.files, key=lambda name: artifact.manifest.files[name].size)
    benchmark(sha256, artifact.folder / largest)


@pytest.mark.benchmark(group="key")
def test_plan(benchmark):
    benchmark(plan, "shapes", recipe.parse(RECIPE)[0])


@pytest.mark.benchmark(group="key")
def test_why_rebuild(benchmark, artifact):
    assert benchmark(why_rebuild, artifact, plan("shapes", recipe.parse(RECIPE)[0])) == []


@pytest.mark.benchmark(group="recipe")
def test_parse(benchmark):
    benchmark(recipe.parse, SHORT)


@pytest.mark.benchmark(group="recipe")
def test_from_toml(benchmark):
    text = 'backend = "openvino"\nprecision = "bf16"\n[parts.vae_decoder]\nbackend = "torch"\nprecision = "fp32"\n'
    assert benchmark(recipe.from_toml, text) == recipe.parse(SHORT)[0]
