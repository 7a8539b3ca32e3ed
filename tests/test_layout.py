"""The shape of the project: packages, layers, one copy of each module, light imports."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(
    p.parent for p in ROOT.glob("*/**/__init__.py") if not {"build", "tests"} & set(p.parts) and ".venv" not in str(p)
)

LAYERS = [
    {"errors"},
    {"nvidia", "placement"},
    {"recipe", "artifact", "hardware", "weights", "naming", "memory", "pictures", "progress", "terminal", "verdict"},
    {"components", "quantize", "reports", "home", "cuda"},
    {"plugins", "nvinfer"},
    {"sources", "footprint"},
    {"forecast"},
    {"exporters", "runtimes", "models"},
    {"parity"},
    {"plan"},
    {"bake"},
    {"bench", "doctor", "precisions"},
    {"tuning"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
SAME_LAYER = {("artifact", "weights"), ("naming", "weights"), ("weights", "errors")}


def modules():
    files = [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in folder.glob("*.py"))]
    return [p for p in files if p.parent != ROOT or p.name != "__init__.py"]


def top(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported(path):
    """Names of our top-level modules that a file imports when it runs, annotations apart."""
    depth = len(path.relative_to(ROOT).parts)
    found = set()
    tree = ast.parse(path.read_text())
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in only_types:
            if node.level == depth:
                found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            elif node.level < depth:
                found.add(top(path))
    return found


def test_the_listed_packages_are_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = ["bakeoff", *(".".join(["bakeoff", *folder.relative_to(ROOT).parts]) for folder in FOLDERS)]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    me = top(path)
    for name in imported(path):
        allowed = level[name] < level[me] or name == me or (me, name) in SAME_LAYER
        assert allowed, f"{path.name} ({me}) imports {name}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_folder_imports_itself_in_a_circle(folder):
    siblings = {file.stem: _siblings(file) for file in folder.glob("*.py")}
    order = [*TopologicalSorter(siblings).static_order()]
    assert set(siblings) <= set(order)


def _siblings(path):
    """Names of modules of the same folder that a file imports when it runs."""
    runs = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.level == 1]
    named = {alias.name for node in runs if not node.module for alias in node.names}
    return named | {node.module.split(".")[0] for node in runs if node.module}


def test_our_folders_are_not_top_level_modules_in_a_worker():
    names = [folder.name for folder in FOLDERS if folder.parent == ROOT]
    code = f"import importlib.util as u, bakeoff; print([n for n in {names} if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("code", ["import bakeoff", "import bakeoff.cli; bakeoff.cli._parser().format_help()"])
def test_light_imports(code):
    code += "; import sys; print([m for m in ('torch', 'numpy', 'diffusers', 'PIL') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_cli_as_a_script_says_what_to_type():
    found = subprocess.run([sys.executable, str(ROOT / "cli.py")], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "bakeoff" in found.stderr


def test_public_names_are_there():
    import bakeoff

    assert bakeoff.__all__ == sorted(bakeoff.__all__)
    assert all(getattr(bakeoff, name) for name in bakeoff.__all__)


def test_no_family_name_outside_components():
    words = ("unet", "StableDiffusion", "clip")
    for folder in ("exporters", "bench", "quantize"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            code = "\n".join(ast.unparse(node) for node in ast.parse(text).body if not isinstance(node, ast.Expr))
            assert not [word for word in words if f"'{word}" in code], path
