"""Every golden case through the runners: the committed ones, and beside the repository all that were recorded."""

import pytest
from conftest import ROOT, SHARED
from golden_kinds import DEFERRED, find_cases, load_runners
from run_goldens import GoldenCase, run_case
from run_manifests import DEFERRED_MANIFESTS, check_manifest

COMMITTED = find_cases([ROOT / "tests" / "goldens"])
RECORDED = find_cases([SHARED / "goldens"]) if SHARED.is_dir() else []
MANIFESTS = sorted((SHARED / "manifests").rglob("*.json")) if SHARED.is_dir() else []


def name(path):
    return f"{path.parent.name}-{path.name}"


def run(path):
    spec = GoldenCase(path)
    load_runners(spec.system)
    if (spec.system, spec.kind) in DEFERRED:
        pytest.skip(DEFERRED[spec.system, spec.kind])
    case = run_case(path)
    assert case.rows, "nothing was compared"
    failed = [f"{row.name}: abs {row.max_abs:.2e}, {row.tolerance} {row.note}" for row in case.rows if not row.passed]
    assert not failed, "\n".join(failed)


def test_cases_of_every_system_are_committed():
    assert {path.parent.name for path in COMMITTED} == {"vidtok", "vidtwin", "divot", "video_lavit", "seer"}


@pytest.mark.parametrize("path", COMMITTED, ids=name)
def test_committed_case(path):
    run(path)


@pytest.mark.shared
@pytest.mark.parametrize("path", RECORDED, ids=name)
def test_recorded_case(path):
    run(path)


@pytest.mark.shared
@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_manifest(path):
    later = DEFERRED_MANIFESTS.get((path.parent.name, path.stem))
    if later:
        pytest.skip(later)
    problems, _ = check_manifest(path)
    assert not problems, "\n".join(problems[:20])
