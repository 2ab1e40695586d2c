"""The runners of Seer's golden kinds take weights, tolerances and recorded tensors in every form a case may give them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from golden_kinds import GoldenCase
from golden_kinds.seer import _weights
from run_goldens import run_case
from safetensors.torch import save_file

GOLDENS = Path(__file__).parent / "goldens" / "seer"


def variant(folder, name, run=None, without=(), **changes):
    """A committed case with changed specification: one of its runs, without some recorded tensors."""
    source = GoldenCase(GOLDENS / name)
    spec = {key: value for key, value in {**source.spec, **changes}.items() if value is not None}
    recorded = {key: value for key, value in source.recorded.items() if not key.endswith(tuple(without))}
    if run is not None:
        spec["runs"] = [one for one in spec["runs"] if one["name"] == run]
        recorded = {key: value for key, value in recorded.items() if key.startswith(f"{run}.")}
    folder.mkdir(exist_ok=True)
    for file in (GOLDENS / name).iterdir():
        if not file.name.startswith("io."):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "case.json").write_text(json.dumps(spec))
    save_file({key: value.contiguous() for key, value in recorded.items()}, folder / "io.safetensors")
    return folder


def problems(folder):
    return [f"{row.name}: {row.max_abs:.2e} {row.note}" for row in run_case(folder).rows if not row.passed]


FORMULA = "seer.unet64/"


@pytest.mark.parametrize(
    "weights",
    [
        {"weights": {"unet": {"formula": FORMULA}}, "weights_formula": None},
        {"weights": {"unet": {"formula": FORMULA}}, "weights_formula": {"PREFIX": "other/", "GAIN": 1.0}},
        {"weights": {"formula": FORMULA}, "weights_formula": None},
        {"weights": None, "weights_formula": {"PREFIX": FORMULA}},
        {"weights": {"unet": "unet.safetensors"}, "weights_formula": None},
        {"weights": "unet.safetensors", "weights_formula": None},
    ],
    ids=["component", "component first", "all", "rule", "file of the component", "file"],
)
def test_weights_of_every_form(tmp_path, weights):
    folder = variant(tmp_path / "case", "unet_formula_l1", run="t1", **weights)
    if "unet.safetensors" in str(weights):
        original = GoldenCase(GOLDENS / "unet_formula_l1")
        shapes = {name: tuple(shape) for name, shape in original.spec["weights"].items()}
        save_file(_weights(original, "unet", shapes), tmp_path / "unet.safetensors")  # beside the case
    assert not problems(folder)


def test_weights_of_a_rule_for_another_component(tmp_path):
    folder = variant(tmp_path / "case", "fstext_tiny", run="r2", weights_formula={"PREFIX": "x/", "applies_to": "unet"})
    assert not problems(folder)
    # a formula for the component itself is followed, and gives other numbers
    folder = variant(tmp_path / "other", "fstext_tiny", run="r2", weights={"fstext": {"formula": "x/", "GAIN": 0.5}})
    assert problems(folder)
    case = GoldenCase(folder)
    name, shape = "proj.weight", (4, 6)
    half = _weights(case, "fstext", {name: shape})[name]
    case.spec["weights"]["fstext"].pop("GAIN")
    torch.testing.assert_close(2 * half, _weights(case, "fstext", {name: shape})[name])


@pytest.mark.shared
def test_pipeline_with_fewer_tensors_and_formulas_for_all_parts(tmp_path):
    source = SHARED / "goldens" / "seer" / "image_to_video"
    folder, folders = tmp_path / "case", source.parent
    shutil.copytree(source, folder)
    shutil.copytree(folders / "fstext_tiny", tmp_path / "fstext_tiny")
    recorded = dict(GoldenCase(folder).recorded)
    for name in ("out.vae_std", "out.gif_frames"):
        del recorded[name]
    save_file(recorded, folder / "io.safetensors")
    assert not problems(folder)
    spec = json.loads((folder / "case.json").read_text())
    spec["weights"].update({part: {"formula": "x/"} for part in ("fstext", "vae", "text_encoder")})
    (folder / "case.json").write_text(json.dumps(spec))
    failed = problems(folder)  # other weights, other numbers; but they were all made
    assert failed and not [text for text in failed if text.startswith("(runner)")]


def test_sampling_without_the_first_call(tmp_path):
    folder = variant(tmp_path / "case", "ddim_sampling", run="nocfg", without=("unet_in_first", "unet_out_first"))
    case = run_case(folder)
    assert not [row for row in case.rows if not row.passed]
    assert {row.name for row in case.rows} >= {"nocfg.out.samples", "nocfg.out.x_prev"}


@pytest.mark.parametrize(
    "tolerance",
    [
        {"atol": 4e-3, "rtol": 0.0},
        {"fp32": {"atol": 2e-3}, "fp16": {"atol": 4e-3}},
        {"fp32": "atol 2e-3", "fp16": "atol 4e-3", "angles": 1e-3},
        "atol 4e-3",
    ],
    ids=["one", "numbers", "angles", "words"],
)
def test_tolerances_of_rotary_cases(tmp_path, tolerance):
    assert not problems(variant(tmp_path / "case", "rotary_precision", tolerance=tolerance))
    tight = {"fp32": {"atol": 0.0}, "fp16": {"atol": 0.0}, "angles": 0.0}
    assert problems(variant(tmp_path / "case", "rotary_precision", tolerance=tight))


def test_the_trace_of_several_reference_counts_is_that_of_the_first(tmp_path):
    folder = variant(tmp_path / "case", "unet_formula_l1", run="r0")
    spec = json.loads((folder / "case.json").read_text())
    run = spec["runs"][0]
    traced = run.pop("trace_cond")
    run["cond_frame"] = [traced, 0]
    (folder / "case.json").write_text(json.dumps(spec))
    recorded = dict(GoldenCase(folder).recorded)
    recorded["r0.out.cond0"] = torch.zeros_like(recorded[f"r0.out.cond{traced}"])
    save_file(recorded, folder / "io.safetensors")
    case = run_case(folder)
    assert [row.name for row in case.rows if not row.passed] == ["r0.out.cond0"]
    assert len({row.name for row in case.rows}) == len(case.rows)
