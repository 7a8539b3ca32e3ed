"""What the README says, works."""

import json
import re
import runpy
from functools import partial
from pathlib import Path

import pytest

import bakeoff

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_snippet_runs(baked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lent = [baked("onnx:fp32"), baked("torch:fp32")]
    monkeypatch.setattr(bakeoff, "export", partial(bakeoff.export, reuse=lent))
    (code,) = snippets("python")
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own README
    assert (tmp_path / "mixed" / "bakeoff.json").is_file()


def test_the_toml_snippets_are_a_recipe_and_an_experiment():
    from bakeoff.bench import experiment
    from bakeoff.recipe import from_toml, parse

    recipe, declared = snippets("toml")
    assert from_toml(recipe) == parse("openvino:bf16,vae_decoder=torch:fp32")[0]
    assert len(experiment.from_toml(declared).points()) == 6


def test_the_commands_parse():
    import shlex

    from bakeoff.cli import _parser

    lines = [line for block in snippets("sh") for line in block.splitlines() if line.startswith("bakeoff ")]
    assert len(lines) >= 4
    for line in lines:
        _parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_support_table_is_what_exporters_say():
    from bakeoff import plugins

    for backend in plugins.names("exporters"):
        precisions = ", ".join(f"`{precision}`" for precision in plugins.exporter(backend).precisions)
        assert f"| `{backend}` | {precisions} |" in README


def test_the_table_of_families_is_its_record():
    script = runpy.run_path(str(ROOT / "docs" / "benchmarks" / "families.py"))
    page = (ROOT / "docs" / "families.md").read_text()
    assert script["with_table"](page, json.loads((ROOT / "docs" / "families.json").read_text())) == page
