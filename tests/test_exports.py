"""The public names, and what the package's own files may import."""

import ast
import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from freeze import exports

import cinetok

FROZEN = Path(__file__).parent / "frozen" / "exports.json"
FOLDERS = ("modeling", "pipelines", "conversion", "trainers", "video", "metrics", "cli", "assets", "model_cards")
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
FORBIDDEN = {
    "einops",
    "omegaconf",
    "lightning",
    "pytorch_lightning",
    "decord",
    "xformers",
    "flash_attn",
    "timm",
    "open_clip",
    "skvideo",
    "pickle5",
}


def test_exports_are_frozen():
    """A name that goes breaks programs. `python tests/freeze.py` records a wanted change."""
    assert exports() == json.loads(FROZEN.read_text())


@pytest.mark.parametrize("name", sorted(cinetok.__all__))
def test_every_export_is_there_and_documented(name):
    value = getattr(cinetok, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__ and value.__doc__.strip(), f"{name} has no docstring"
    assert name in dir(cinetok)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'VidTokenizer'"):
        cinetok.VidTokenizer  # noqa: B018


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_packages(tree):
    """(top-level package, line) of every absolute import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports(path):
    for package, line in imported_packages(parsed(path)):
        assert package not in FORBIDDEN, f"{relative(path)}:{line} imports {package}"
        # The root is the package: `import modeling` works only in a checkout.
        assert package not in FOLDERS, f"{relative(path)}:{line}: import {package} relatively"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_inside_the_package_are_relative(path):
    """`import cinetok` alone is for looking public names up by strings, which the command line does."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] != "cinetok", f"{relative(path)}:{node.lineno}"
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("cinetok.") for alias in node.names), f"{relative(path)}:{node.lineno}"


def calls(tree, owner, name):
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == owner:
            yield node


def unsafe_loads(tree):
    """Lines that unpickle: torch.load without weights_only=True."""
    for node in calls(tree, "torch", "load"):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        flag = keywords.get("weights_only")
        if not (isinstance(flag, ast.Constant) and flag.value is True):
            yield node.lineno


def unpickles(tree):
    return [node.lineno for name in ("load", "loads") for node in calls(tree, "pickle", name)]


SCRIPTS = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=relative)
def test_nothing_unpickles_code(path):
    assert not list(unsafe_loads(parsed(path)))
    if path in FILES:  # a test does it on purpose, to show that its harmful file would have worked
        assert not unpickles(parsed(path))


def test_the_checks_themselves_notice():
    bad = ast.parse(
        "import torch\ntorch.load('x')\ntorch.load('x', weights_only=False)\ndef f():\n    import timm.models"
    )
    assert list(unsafe_loads(bad)) == [2, 3]
    assert ("timm", 5) in imported_packages(bad)
    assert not list(unsafe_loads(ast.parse("torch.load('x', weights_only=True)")))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 900, "split it: files end at 900 lines"


def test_nothing_large_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    goldens = sum(size for name, size in sizes.items() if name.startswith("tests/goldens/"))
    assert goldens < 8 * 2**20, f"committed goldens take {goldens / 2**20:.1f} MiB"
    assert max(sizes.values()) < 8 * 2**20, max(sizes, key=sizes.get)
