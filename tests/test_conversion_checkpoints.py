"""Reading original checkpoints (every kind of bad input), strict loading, atomic output, original configurations."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cinetok import CheckpointError
from cinetok.conversion.checkpoints import (
    atomic_folder,
    check_state_dict,
    load_strict,
    read_checkpoint,
    read_checkpoints,
    save_tensors,
    take_prefix,
)
from cinetok.conversion.original_config import read_original_config

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0])}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------------------------------- good files


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "module", "model"])
def test_reads_torch_files(tmp_path, suffix, wrapper):
    path = tmp_path / f"file{suffix}"
    torch.save(TENSORS if wrapper is None else {wrapper: TENSORS}, path)
    assert_same(read_checkpoint(path), TENSORS)


def test_reads_the_format_before_zip(tmp_path):
    torch.save({"state_dict": TENSORS}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "old.ckpt"), TENSORS)


def test_reads_safetensors_and_strips_a_uniform_prefix(tmp_path):
    save_file({f"module.{name}": value for name, value in TENSORS.items()}, tmp_path / "x.safetensors")
    assert_same(read_checkpoint(tmp_path / "x.safetensors"), TENSORS)
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, tmp_path / "mixed.pt")
    assert set(read_checkpoint(tmp_path / "mixed.pt")) == {"module.a", "b"}


def test_reports_what_is_not_a_model_tensor(tmp_path):
    training = {
        "state_dict": TENSORS,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "epoch": 3,
        "global_step": 100,
    }
    torch.save(training, tmp_path / "train.ckpt")
    left_out = []
    assert_same(read_checkpoint(tmp_path / "train.ckpt", left_out), TENSORS)
    assert left_out == ["optimizer_states", "epoch", "global_step"]


def test_reads_sharded_folders(tmp_path):
    names = list(TENSORS)
    for number, name in enumerate(names):
        save_file({name: TENSORS[name]}, tmp_path / f"model-{number}.safetensors")
    assert_same(read_checkpoint(tmp_path), TENSORS)
    index = {"weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"unlisted": torch.ones(1)}, tmp_path / "other.safetensors")
    assert_same(read_checkpoint(tmp_path), TENSORS)
    assert_same(read_checkpoints([tmp_path / "model-0.safetensors", tmp_path / "model-1.safetensors"]), TENSORS)


def test_reads_folders_of_pickled_shards(tmp_path):
    for number, (name, tensor) in enumerate(TENSORS.items()):
        torch.save({name: tensor}, tmp_path / f"pytorch_model-{number}.bin")
    assert_same(read_checkpoint(tmp_path), TENSORS)


def test_take_prefix_moves_entries():
    tensors = {"loss.a": 1, "encoder.b": 2}
    assert take_prefix(tensors, "loss.") == {"a": 1} and tensors == {"encoder.b": 2}


# ---------------------------------------------------------------------------------------------------------- bad files


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "old torch", "pickle", "inside the state dict"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, how):
    proof, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    attack = _Attack(proof)
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": attack}))
    else:
        content = {"state_dict": {**TENSORS, "x": attack}} if how.startswith("inside") else attack
        torch.save(content, path, _use_new_zipfile_serialization=how != "old torch")
    with pytest.raises(CheckpointError, match=r"evil\.ckpt: refused.*Nothing was executed"):
        read_checkpoint(path)
    assert not proof.exists()
    # the same file does run its code in an unrestricted unpickler, so the test would notice
    if how == "pickle":
        pickle.loads(path.read_bytes())
        assert proof.exists()


def _bad_files(folder):
    whole = folder / "whole.ckpt"
    torch.save({"state_dict": {"a": torch.randn(1000)}}, whole)
    content = whole.read_bytes()
    save_file({"a": torch.randn(1000)}, folder / "whole.safetensors")
    tensors = (folder / "whole.safetensors").read_bytes()
    whole.unlink()
    (folder / "whole.safetensors").unlink()
    torch.save({"epoch": 3, "name": "x"}, folder / "no_tensors.pt")
    torch.save([torch.ones(2)], folder / "a_list.pt")
    torch.save({}, folder / "nothing.pt")
    files = {
        "empty.ckpt": b"",
        "truncated.ckpt": content[: len(content) // 2],
        "lost_end.ckpt": content[:-100],
        "garbage.ckpt": b"\x00\x01garbage" * 100,
        "page.ckpt": b"<!DOCTYPE html><html>Access denied</html>",
        "pointer.ckpt": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 700000000\n",
        "truncated.safetensors": tensors[: len(tensors) // 2],
        "empty.safetensors": b"",
        "garbage.safetensors": b"garbage" * 100,
        "unknown.h5": b"content",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return ["missing.ckpt", "no_tensors.pt", "a_list.pt", "nothing.pt", *files]


def test_bad_files_end_in_one_short_error_that_names_them(tmp_path):
    for name in _bad_files(tmp_path):
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(tmp_path / name)
        message = str(caught.value)
        assert name in message and len(message) < 1000 and "\n" not in message, message


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        read_checkpoint(tmp_path)
    save_file(TENSORS, tmp_path / "1.safetensors")
    save_file({"a.bias": torch.ones(1)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"2\.safetensors: holds tensors that another shard holds too: a\.bias"):
        read_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ("{not json", "not a weight index"),
        ("[]", "not a weight index"),
        ('{"weight_map": {"a.weight": "../1.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a.weight": "3.safetensors"}}', r"3\.safetensors: no such"),
        ('{"weight_map": {"a.weight": "1.safetensors", "gone": "1.safetensors"}}', r"lack tensors that .*: gone"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------- strict loading


def _linear():
    with torch.device("meta"):
        return torch.nn.Linear(3, 2)


def test_load_strict_fills_a_module_on_the_meta_device():
    module = load_strict(_linear(), {"weight": TENSORS["a.weight"], "bias": TENSORS["a.bias"]}, "x")
    assert torch.equal(module(torch.eye(3)), TENSORS["a.weight"].T + TENSORS["a.bias"])


def test_load_strict_lists_everything_that_is_wrong():
    bad = {"weight": torch.ones(3, 2), "extra": torch.ones(1), "more": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(_linear(), bad, "file.ckpt")
    message = str(caught.value)
    for part in ("file.ckpt", "1 missing: bias", "2 unexpected: extra, more", "weight (3, 2) instead of (2, 3)"):
        assert part in message, message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_damaged_values_are_an_error(value, dtype):
    weight = torch.ones(2, 3)
    weight[1, 1] = value
    with pytest.raises(CheckpointError, match="1 with NaN or infinite values: weight"):
        check_state_dict(_linear(), {"weight": weight.to(dtype), "bias": torch.ones(2)}, "x")


def test_large_finite_values_are_fine():
    big = torch.full((2, 3), torch.finfo(torch.float32).max)
    check_state_dict(_linear(), {"weight": big, "bias": torch.ones(2)}, "x")
    opposite = torch.tensor([[float("inf"), -float("inf"), 0], [0, 0, 0]])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        check_state_dict(_linear(), {"weight": opposite, "bias": torch.ones(2)}, "x")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_become_float32(tmp_path, caplog, suffix, dtype):
    small = torch.tensor([[0.5, -1.5, 3.0]]).to(dtype)
    tensors = {"small": small, "half": torch.ones(2, dtype=torch.float16), "count": torch.ones(1, dtype=torch.int64)}
    (save_file if suffix == ".safetensors" else torch.save)(tensors, tmp_path / f"x{suffix}")
    read = read_checkpoint(tmp_path / f"x{suffix}")
    assert torch.equal(read["small"], small.float()) and read["small"].dtype == torch.float32
    assert read["half"].dtype == torch.float16 and read["count"].dtype == torch.int64
    assert "cast to float32: 1" in caplog.text


# ------------------------------------------------------------------------------------------------------ atomic output


def test_atomic_folder_appears_only_on_success(tmp_path):
    output = tmp_path / "deep" / "out"
    with atomic_folder(output) as folder:
        (folder / "file").write_text("x")
        assert not output.exists()
    assert [p.name for p in output.iterdir()] == ["file"] and output.stat().st_mode & 0o777 == 0o755
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "failed") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_existing_output_is_never_touched(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty" / "file").read_text() == "x"
    (tmp_path / "a_file").write_text("mine")
    for name in ("empty", "a_file"):
        with pytest.raises(CheckpointError, match="already exists"), atomic_folder(tmp_path / name):
            pytest.fail("the block must not run")
    assert (tmp_path / "a_file").read_text() == "mine" and (tmp_path / "empty" / "file").read_text() == "x"
    with pytest.raises(CheckpointError, match="could not be written"), atomic_folder(tmp_path / "a_file" / "out"):
        pytest.fail("the block must not run")


def _run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_a_killed_process_leaves_no_output(tmp_path):
    script = """
        import os, signal, sys, torch
        from cinetok.conversion.checkpoints import atomic_folder, save_tensors
        with atomic_folder(sys.argv[1]) as folder:
            save_tensors({"a": torch.ones(1000)}, folder / "model.safetensors")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    result = _run(script, tmp_path / "out")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path / "out").exists()
    with atomic_folder(tmp_path / "out") as folder:  # and the next attempt works
        save_tensors({"a": torch.ones(2)}, folder / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], torch.ones(2))


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path):
    script = """
        import resource, sys, torch
        from cinetok import CheckpointError
        from cinetok.conversion.checkpoints import atomic_folder, save_tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        for write in (lambda path: save_tensors({"a": torch.ones(100000)}, path),
                      lambda path: path.write_bytes(bytes(100000))):
            try:
                with atomic_folder(sys.argv[1]) as folder:
                    write(folder / "model.safetensors")
            except CheckpointError as error:
                print("typed:", error)
    """
    result = _run(script, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("typed:") == result.stdout.count("check the free space") == 2, result.stdout
    assert list(tmp_path.iterdir()) == []


def test_save_tensors_separates_shared_memory(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    save_tensors({"rows": base[:1], "transposed": base.T, "all": base}, tmp_path / "x.safetensors")
    assert_same(load_file(tmp_path / "x.safetensors"), {"rows": base[:1], "transposed": base.T, "all": base})


# ---------------------------------------------------------------------------------------------- original configurations


def test_yaml_references_and_floats(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "model:\n  rate: 1e-5\n  a: {params: {x: [1, 2], y: 0.5}}\n  b: {params: '${model.a.params}'}\n"
        "  c: ${model.a.params.x.1}\n  text: at ${model.rate} now\n  other: ${oc.env:HOME}\n  gone: ${not.there}\n"
    )
    model = read_original_config(path)["model"]
    assert model["rate"] == 1e-5 and model["b"] == model["a"] == {"params": {"x": [1, 2], "y": 0.5}}
    assert model["c"] == 2 and model["text"] == "at 1e-05 now"
    assert model["other"] == "${oc.env:HOME}" and model["gone"] == "${not.there}"


def test_json_and_mappings_are_read_alike(tmp_path):
    config = {"a": {"b": 1}, "c": "${a}"}
    (tmp_path / "x.json").write_text(json.dumps(config))
    expected = {"a": {"b": 1}, "c": {"b": 1}}
    assert read_original_config(tmp_path / "x.json") == read_original_config(config) == expected


def test_bad_configuration_files(tmp_path):
    files = {
        "list.yaml": "- 1",
        "bad.yaml": "a: [1",
        "bad.json": "{",
        "tag.yaml": "a: !!python/object/apply:os.getcwd []",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in [*files, "missing.yaml"]:
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            read_original_config(tmp_path / name)
    with pytest.raises(CheckpointError, match="refers to itself"):
        read_original_config({"a": "${b}", "b": "${a}"})
