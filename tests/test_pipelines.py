"""One set of tests for every pipeline, over the tiny components of `model_cases/`."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import pipeline_cases
from PIL import Image

import cinetok

CASES = pipeline_cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def arguments_of(case):
    return inspect.signature(type(case.build()).__call__).parameters


def with_argument(name):
    chosen = [case for case in CASES if name in arguments_of(case)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def skip_if_excepted(case, check):
    if check in case.exceptions:
        pytest.skip(case.exceptions[check])


def assert_same(first, second, atol=0.0):
    """Both are tensors, or lists of strings."""
    assert len(first) == len(second)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=atol)
    else:
        assert list(first) == list(second)


@every_case
def test_batch_equals_single(case):
    skip_if_excepted(case, "batch")
    pipeline = case.build()
    both, alone = case.result(pipeline(**case.inputs(2))), case.result(pipeline(**case.inputs(1)))
    assert len(both) == 2 and len(alone) == 1
    # sums in another order, magnified by every sampling step; pixels are in [0, 1], so this is about a grey level
    assert_same(both[:1], alone, atol=5e-3)
    if isinstance(both, torch.Tensor):
        assert torch.isfinite(both).all()
        assert (both[0] - both[1]).abs().max() > 1e-3, "both samples give the same: the inputs do not matter"


@every_case
def test_offloading_order_names_the_networks(case):
    skip_if_excepted(case, "offload")
    pipeline = case.build()
    order = pipeline.model_cpu_offload_seq.split("->")
    networks = {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    left_out = networks - set(order) - set(pipeline._exclude_from_cpu_offload)
    assert not left_out, f"would stay on the CPU: {sorted(left_out)}"
    known = set(inspect.signature(type(pipeline).__init__).parameters)
    assert set(order) <= known and len(order) == len(set(order))


# -------------------------------------------------------------------------------------------------- output_type


def pictures(value):
    """The pictures in nested lists of images or arrays, in order, as one array of (height, width, 3) in [0, 1]."""
    if isinstance(value, Image.Image):
        return [np.asarray(value.convert("RGB"), dtype=np.float32) / 255]
    if isinstance(value, np.ndarray):
        return list(value.reshape(-1, *value.shape[-3:]))
    if isinstance(value, torch.Tensor):
        return list(value.reshape(-1, *value.shape[-3:]).permute(0, 2, 3, 1).float().cpu().numpy())
    return [picture for part in value for picture in pictures(part)]


def main_result(output):
    """The part of a pipeline's output that holds pictures."""
    for name in ("frames", "images", "stories"):
        value = getattr(output, name, None)
        if value is not None:
            return [[clip.frames for clip in clips] for clips in value] if name == "stories" else value
    raise AssertionError(f"no pictures among {list(output)}")


@with_argument("output_type")
def test_output_types_agree(case):
    pipeline, results = case.build(), {}
    kinds = {"pt": torch.Tensor, "np": np.ndarray, "pil": Image.Image}
    for kind, leaf in kinds.items():
        value = main_result(pipeline(**{**case.inputs(2), "output_type": kind}))
        results[kind] = np.stack(pictures(value))
        while isinstance(value, list):
            value = value[0]
        assert isinstance(value, leaf), f"output_type={kind!r} gives {type(value).__name__}"
    assert results["pt"].min() >= 0 and results["pt"].max() <= 1
    np.testing.assert_allclose(results["np"], results["pt"], atol=1e-6)
    # bytes: rounded by some, truncated as the authors do by others
    np.testing.assert_allclose(results["pil"], results["pt"], atol=1 / 255 + 1e-6)


@with_argument("output_type")
def test_unknown_output_type_raises(case):
    with pytest.raises(ValueError, match="output_type"):
        case.build()(**{**case.inputs(1), "output_type": "numpy arrays"})


# ----------------------------------------------------------------------------------------------------- callback


@with_argument("callback_on_step_end")
def test_callback_sees_every_step_and_can_change_the_result(case):
    pipeline, seen = case.build(), []
    selects = "callback_on_step_end_tensor_inputs" in arguments_of(case)
    name = pipeline._callback_tensor_inputs[0]

    def watch(pipe, step, timestep, tensors):
        assert pipe is pipeline and name in tensors and (set(tensors) == {name} or not selects)
        seen.append(step)
        return {}

    def erase(pipe, step, timestep, tensors):
        return {name: torch.zeros_like(tensors[name])}

    options = {"callback_on_step_end_tensor_inputs": [name]} if selects else {}
    untouched = case.result(pipeline(**case.inputs(2)))
    watched = case.result(pipeline(**case.inputs(2), callback_on_step_end=watch, **options))
    assert seen and seen[0] == 0
    assert_same(watched, untouched)
    erased = case.result(pipeline(**case.inputs(2), callback_on_step_end=erase, **options))
    assert (erased - untouched).abs().max() > 1e-3, "what the callback returned was dropped"


@with_argument("callback_on_step_end_tensor_inputs")
def test_unknown_callback_tensors_raise(case):
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        case.build()(
            **case.inputs(1),
            callback_on_step_end=lambda *_: {},
            callback_on_step_end_tensor_inputs=["no_such_tensor"],
        )


# ---------------------------------------------------------------------------------- loading in a fresh process


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with every pipeline, and what another process found in it: case name -> facts."""
    folder, names = tmp_path_factory.mktemp("pipelines"), {}
    for case in CASES:
        pipeline = case.build()
        pipeline.save_pretrained(folder / case.name)
        names[case.name] = type(pipeline).__name__
    (folder / "pipelines.json").write_text(json.dumps(names))
    script = Path(__file__).parent / "fresh_process.py"
    command = [sys.executable, str(script), str(folder), str(torch.get_num_threads())]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder, torch.load(folder / "results.pt", weights_only=True)


@every_case
def test_fresh_process_computes_the_same(case, saved):
    found = saved[1][case.name]
    assert "error" not in found, found["error"]
    result = case.result(case.build()(**case.inputs(2)))
    # memory layouts are not saved, so convolutions may sum in another order
    assert_same(found["output"], result, atol=2e-5)


@every_case
def test_generic_loader_finds_the_class(case, saved):
    skip_if_excepted(case, "generic_loading")
    assert saved[1][case.name]["generic"] == type(case.build()).__name__


@every_case
def test_index_names_packages_and_never_modules(case, saved):
    index = json.loads((saved[0] / case.name / "model_index.json").read_text())
    assert index["_class_name"] == type(case.build()).__name__
    entries = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    assert entries
    for name, (library, class_name) in entries.items():
        if library is None:
            continue
        assert library in ("cinetok", "transformers", "diffusers"), f"{name}: {library}"
        assert class_name in cinetok.__all__ or library != "cinetok", f"{name}: {class_name}"


def test_every_exported_pipeline_has_a_case():
    from cinetok._exports import PIPELINES

    assert {type(case.build()).__name__ for case in CASES} == set(PIPELINES)
