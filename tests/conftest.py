"""What tests share: the embedded model baked once for each backend, and the errors they expect of bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # A core each: two processes of several threads on the same cores would wait for each other most of the time.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

PROMPTS = [
    "a large red circle on a white background",
    "a small blue star above a large green ring on a gray background",
    "a small yellow square left of a small purple triangle on a black background",
]


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory):
    """Keep the user's cache out of it; processes of one session share theirs, which holds the graphs of `shapes`."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "home"
    os.environ["BAKEOFF_HOME"] = str(home)


@pytest.fixture(scope="session")
def shapes():
    """The embedded model's folder."""
    return Path(__file__).parent.parent / "models" / "shapes"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A family's tiny random pipeline, written once a process: `tiny("flux")`, `tiny("stable-diffusion", "controlnet")`."""
    from bakeoff.models.tiny import build

    root = tmp_path_factory.mktemp("tiny")

    def get(family, variant=None):
        folder = root / f"{family}-{variant or 'plain'}"
        return folder if folder.exists() else build(family, folder, variant=variant)

    return get


@pytest.fixture(scope="session")
def baked(tmp_path_factory):
    """Bake `shapes` by a recipe, once a session of however many processes: `baked("onnx:fp32")` is the artifact's folder.

    It is proved if `proved=True` is asked for, which takes about 20 s of a core.
    """
    from filelock import FileLock

    from bakeoff.bake import export
    from bakeoff.recipe import parse

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"
    root.mkdir(exist_ok=True)

    def bake(recipe, *, proved=False):
        name = recipe.replace(":", "-").replace(",", "_").replace("=", "-").replace("+", "-")
        folder = root / (f"{name}-proved" if proved else name)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                lenders = [other for other in sorted(root.glob("[!.]*")) if (other / "bakeoff.json").exists()]
                export("shapes", folder, parse(recipe)[0], reuse=lenders, prove=proved)
        return folder

    return bake


@pytest.fixture
def copied(baked, tmp_path):
    """Like `baked`, but a copy of one's own, to damage."""

    def copy(recipe, **options):
        return Path(shutil.copytree(baked(recipe, **options), tmp_path / "artifact"))

    return copy


@pytest.fixture
def run_cli():
    """Run the command line in a process of its own; return the finished process."""

    def run(*arguments, **options):
        command = [sys.executable, "-P", "-m", "bakeoff.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)

    return run


@pytest.fixture
def run_json(capsys):
    """Run the command line in this process, which has imported what it takes; return the JSON that it prints."""
    from bakeoff.cli import main

    def run(*arguments):
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        told = capsys.readouterr()
        assert code == 0, told.err
        return json.loads(told.out)

    return run
