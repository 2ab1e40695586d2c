"""What a wheel built from the committed files holds."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in a wheel that is built in a clean copy: an in-tree build would keep deleted modules."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("packaging")
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("tests/", "benchmarks/")) or not (ROOT / name).is_file():
            continue
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (folder / "source" / "tests").mkdir()
    (folder / "source" / "tests" / "test_nothing.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*command, "-w", str(folder), "."], cwd=folder / "source", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    return {"names": set(names), "metadata": metadata, "entry_points": entry_points, "source": folder / "source"}


def test_only_the_package_is_inside(wheel):
    tops = {name.split("/")[0] for name in wheel["names"]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cinetok"}
    assert "cinetok/setup.py" not in wheel["names"]
    folders = {name.split("/")[1] for name in wheel["names"] if name.startswith("cinetok/")}
    assert not folders & {"tests", "benchmarks", "docs", "examples", "build"}


def test_every_module_is_inside(wheel):
    source = wheel["source"]
    folders = [path for path in source.iterdir() if (path / "__init__.py").exists()]
    expected = {path.relative_to(source).as_posix() for folder in folders for path in folder.rglob("*.py")}
    missing = {f"cinetok/{name}" for name in expected} - wheel["names"]
    assert not missing, f"modules the wheel lacks: {sorted(missing)}"
    assert {"cinetok/__init__.py", "cinetok/_exports.py", "cinetok/_registration.py"} <= wheel["names"]


def test_data_files_are_inside(wheel):
    source = wheel["source"]
    assert "cinetok/py.typed" in wheel["names"]
    for folder, pattern in (("model_cards", "**/*.jinja"), ("model_cards", "**/*.md"), ("assets", "**/*")):
        expected = {
            f"cinetok/{path.relative_to(source).as_posix()}"
            for path in (source / folder).glob(pattern)
            if path.is_file() and path.suffix != ".pyc"
        }
        assert expected, f"{folder}/{pattern} is empty"
        assert expected <= wheel["names"], sorted(expected - wheel["names"])


def test_metadata(wheel):
    import cinetok

    assert f"Version: {cinetok.__version__}\n" in wheel["metadata"]
    assert "Requires-Python: >=3.10" in wheel["metadata"]
    assert re.search(r"^cinetok\s*=\s*cinetok\.cli\.main:main$", wheel["entry_points"], re.MULTILINE)
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", wheel["metadata"], re.MULTILINE))
    assert {"all", "dev", "eval", "plots", "train"} <= extras


def test_known_good_versions_satisfy_the_requirements():
    """constraints.txt pins every direct requirement, each to a version that the requirement allows."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    assert pinned["torch"] == "2.13.0" and pinned["torchvision"] == "0.28.0"
    for requirement in map(Requirement, requires("cinetok")):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"
