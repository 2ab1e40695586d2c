"""The golden harness fails when it must."""

import json

import golden_kinds
import pytest
import torch
from golden_kinds import Tolerance, compare
from run_goldens import main, run_case
from safetensors.torch import load_file, save_file

SYSTEM, KIND = "harness", "double"


@pytest.fixture(autouse=True)
def _runner(monkeypatch):
    """A kind whose result is twice its input, and a count of it."""

    def run(case):
        x = case.input("x")
        case.check("y", 2 * x)
        case.check("count", x.numel())
        case.check_value("shape", list(x.shape), case.spec["shape"])

    monkeypatch.setitem(golden_kinds.RUNNERS, (SYSTEM, KIND), run)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cases" / "one"
    path.mkdir(parents=True)
    x = torch.arange(6.0).reshape(2, 3)
    save_file({"x": x, "y": 2 * x, "count": torch.tensor(6)}, path / "io.safetensors")
    spec = {"system": SYSTEM, "kind": KIND, "tolerance": {"atol": 1e-3, "rtol": 0.0}, "shape": [2, 3]}
    (path / "case.json").write_text(json.dumps(spec))
    return path


def change(folder, **tensors):
    path = folder / "io.safetensors"
    recorded = {**load_file(path), **tensors}
    save_file({name: value for name, value in recorded.items() if value is not None}, path)


def respecify(folder, **changes):
    path = folder / "case.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def failures(folder):
    return {row.name for row in run_case(folder).rows if not row.passed}


def test_a_good_case_passes(folder, capsys):
    assert failures(folder) == set()
    assert main([str(folder.parent)]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out


def test_one_perturbed_number_fails(folder, capsys):
    y = load_file(folder / "io.safetensors")["y"]
    y[1, 2] += 2e-3
    change(folder, y=y)
    assert failures(folder) == {"y"}
    assert main([str(folder.parent)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_difference_within_the_tolerance_passes(folder):
    y = load_file(folder / "io.safetensors")["y"]
    change(folder, y=y + 5e-4)
    assert failures(folder) == set()


def test_nan_fails(folder):
    y = load_file(folder / "io.safetensors")["y"]
    y[0, 0] = float("nan")
    change(folder, y=y)
    assert failures(folder) == {"y"}


def test_integers_are_exact(folder):
    respecify(folder, tolerance={"atol": 5.0, "rtol": 0.0})
    change(folder, count=torch.tensor(7))
    assert failures(folder) == {"count"}


def test_another_shape_fails(folder):
    change(folder, y=2 * torch.arange(6.0).reshape(3, 2))
    assert failures(folder) == {"y"}


def test_a_recorded_value_must_be_equal(folder):
    respecify(folder, shape=[3, 2])
    assert failures(folder) == {"shape"}


def test_a_recorded_tensor_that_nothing_uses_fails(folder):
    change(folder, extra=torch.zeros(2))
    assert failures(folder) == {"extra"}


def test_a_missing_input_fails(folder):
    change(folder, x=None)
    assert "(runner)" in failures(folder)


def test_an_error_in_a_runner_fails(folder, monkeypatch):
    def run(case):
        raise ArithmeticError("no result")

    monkeypatch.setitem(golden_kinds.RUNNERS, (SYSTEM, KIND), run)
    assert failures(folder) == {"(runner)", "x", "y", "count"}
    assert main([str(folder.parent), "--quiet"]) == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_small_floats_are_cast_and_weights_can_lie_in_another_case(folder, dtype):
    other = folder.parent / "other"
    other.mkdir()
    save_file({"a.w": torch.arange(4.0).to(dtype), "b.w": torch.arange(3)}, other / "weights.safetensors")
    for place in ("config.json", "case.json"):
        path = folder / place
        config = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**config, "weights_from": "../other/weights.safetensors (all but some keys)"}))
        weights = golden_kinds.GoldenCase(folder).weights()
        assert torch.equal(weights["a.w"], torch.arange(4.0)) and weights["b.w"].dtype == torch.int64
        path.write_text(json.dumps({**config, "weights_from": {"file": "other/weights.safetensors", "prefix": "a."}}))
        assert list(golden_kinds.GoldenCase(folder).weights()) == ["w"]
        path.write_text(json.dumps(config))


def test_an_unknown_kind_fails(folder):
    respecify(folder, kind="another kind")
    assert failures(folder) == {f"{SYSTEM}/another kind"}
    assert main([str(folder.parent)]) == 1


def test_no_cases_at_all_fail(tmp_path):
    assert main([str(tmp_path)]) == 1


def test_deferred_kinds_are_listed_and_neither_pass_nor_fail(folder, monkeypatch, capsys):
    monkeypatch.setitem(golden_kinds.DEFERRED, (SYSTEM, KIND), "belongs to a later stage")
    assert main([str(folder.parent)]) == 0
    output = capsys.readouterr().out
    assert "belongs to a later stage" in output and "0 passed, 0 failed, 1 deferred" in output


def test_only_and_skip(folder, capsys):
    assert main([str(folder.parent), "--skip", KIND]) == 0
    assert main([str(folder.parent), "--only", KIND]) == 0
    first, second = capsys.readouterr().out.split("of 1 cases")[:2]
    assert "1 skipped" in first and "1 passed" in second


@pytest.mark.parametrize(
    "spec, atol, rtol, mean",
    [
        ({"atol": 1e-4, "rtol": 1e-3}, 1e-4, 1e-3, None),
        ({"atol": 1e-4}, 1e-4, 0.0, None),
        (0.25, 0.25, 0.0, None),
        ("exact", 0.0, 0.0, None),
        ("exact (integers)", 0.0, 0.0, None),
        ("+-1 grey level", 1.0, 0.0, None),
        ("atol 1e-5 rtol 1e-4", 1e-5, 1e-4, None),
        ("atol 2.5e-05", 2.5e-5, 0.0, None),
        ("max abs difference <= 3 and mean abs difference <= 0.5", 3.0, 0.0, 0.5),
    ],
    ids=str,
)
def test_tolerances_are_read(spec, atol, rtol, mean):
    assert Tolerance.parse(spec) == Tolerance(atol, rtol, mean)


def test_an_unreadable_tolerance_raises():
    with pytest.raises(ValueError, match="no tolerance found"):
        Tolerance.parse("about the same")


def test_the_mean_is_bounded_too():
    limit = Tolerance(atol=1.0, mean_atol=0.1)
    expected = torch.zeros(100)
    one_off = torch.zeros(100)
    one_off[0] = 1.0
    assert compare("x", one_off, expected, limit).passed
    assert not compare("x", one_off + 0.2, expected, limit).passed
