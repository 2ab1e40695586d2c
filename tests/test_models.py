"""One set of tests for every model class, over the tiny configurations of `model_cases/`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from freeze import state_dict_keys
from fresh_process import floats, state
from model_cases import model_cases
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import cinetok

CASES = model_cases()
FROZEN = Path(__file__).parent / "frozen" / "state_dict_keys.json"
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def skip_if_excepted(case, check):
    if check in case.exceptions:
        pytest.skip(case.exceptions[check])


def weight_files(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def random_loss(output, case):
    """The model's own loss, or a random projection of its results (a plain sum would hide normalised directions)."""
    if case.has_loss:
        return output.loss
    generator = torch.Generator().manual_seed(5)
    results = [value for value in output.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in results)


@every_case
def test_runs_are_equal_and_leave_the_inputs_alone(case):
    model, inputs = case.build(), case.inputs(2)
    with torch.no_grad():
        first, second = floats(model(**case.inputs(2))), floats(model(**inputs))
    assert case.output in first and torch.isfinite(first[case.output]).all()
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    for name, value in case.inputs(2).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, inputs[name]), f"forward changed its argument {name}"


@every_case
def test_nothing_is_kept_between_calls(case):
    model = case.build()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with torch.no_grad():
        model(**case.inputs(2))
    for name, module in model.named_modules():
        assert set(module.__dict__) == before[name], f"{name or 'the model'} has stored something"
        hidden = [key for key, value in module.__dict__.items() if isinstance(value, torch.Tensor)]
        assert not hidden, f"{name}: {hidden} are neither parameters nor buffers and get lost on the meta device"


@every_case
def test_batch_equals_single(case):
    skip_if_excepted(case, "batch")
    model = case.build()
    with torch.no_grad():
        both, alone = model(**case.inputs(2))[case.output], model(**case.inputs(1))[case.output]
    assert len(both) == 2 and len(alone) == 1
    scale = alone.abs().max().item()
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=2e-5 * scale)
    assert (both[1] - both[0]).abs().max() > 1e-3 * scale, "both samples give the same: the inputs do not matter"


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """softmax(Q K^T) V, written out."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1) @ value


@every_case
def test_eager_equals_sdpa(case, monkeypatch):
    skip_if_excepted(case, "attention")
    model, inputs, calls = case.build(), case.inputs(2), []
    fused = F.scaled_dot_product_attention

    def counting(*arguments, **options):
        calls.append(1)
        return fused(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(**inputs)[case.output]
    num_fused = len(calls)
    assert num_fused, "no attention ran; say so in the case's exceptions"
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager")
        calls.clear()
        with torch.no_grad():
            result = model(**inputs)[case.output]
        if "attention_choice" not in case.exceptions:
            assert len(calls) < num_fused, "choosing eager attention changed nothing"
    if not isinstance(model, PreTrainedModel) or "attention_choice" in case.exceptions:
        monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
        with torch.no_grad():
            result = model(**inputs)[case.output]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def train_once(case, checkpointing):
    """Loss, gradients, and how many numbers were kept for the backward pass."""
    model = case.build().train()
    if checkpointing:
        model.enable_gradient_checkpointing() if isinstance(
            model, ModelMixin
        ) else model.activation_checkpointing_enable()
        assert model.is_gradient_checkpointing
    kept = []
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        loss = random_loss(model(**case.inputs(2)), case)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(kept)


@every_case
def test_gradient_checkpointing_changes_memory_and_nothing_else(case):
    skip_if_excepted(case, "checkpointing")
    loss, gradients, kept = train_once(case, checkpointing=False)
    loss_again, gradients_again, kept_less = train_once(case, checkpointing=True)
    assert kept_less < kept, f"{kept_less} numbers kept for the backward pass, {kept} without checkpointing"
    torch.testing.assert_close(loss_again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        again = gradients_again[name]
        assert (again is None) == (gradient is None), name
        if gradient is not None:
            atol = 1e-5 * gradient.abs().max().item() + 1e-12
            torch.testing.assert_close(again, gradient, rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@every_case
def test_gradients_reach_every_parameter(case):
    model = case.build().train()
    loss = random_loss(model(**case.inputs(2)), case)
    assert loss.ndim == 0 and torch.isfinite(loss)
    loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = {name for name, p in trainable.items() if p.grad is None or not p.grad.any()}
    assert all(torch.isfinite(p.grad).all() for name, p in trainable.items() if name not in dead)
    patterns = {pattern: {name for name in dead if re.fullmatch(pattern, name)} for pattern in case.without_gradient}
    unexplained = dead.difference(*patterns.values())
    assert not unexplained, f"no gradient reaches {sorted(unexplained)[:10]} ({len(unexplained)} in all)"
    stale = [pattern for pattern, names in patterns.items() if not names]
    assert not stale, f"the case's without_gradient {stale} explains nothing any more"


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_finite(case, dtype):
    skip_if_excepted(case, "half")
    model = case.build().to(dtype)
    inputs = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.inputs(2).items()
    }
    with torch.no_grad():
        result = model(**inputs)[case.output]
    assert torch.isfinite(result).all()
    assert model.dtype == dtype


@every_case
def test_constructs_on_the_meta_device(case):
    model = case.build()
    with torch.device("meta"):
        empty = type(model).from_config(model.config) if isinstance(model, ModelMixin) else type(model)(model.config)
    real = {name for name, parameter in empty.named_parameters() if not parameter.is_meta}
    # diffusers' AlphaBlender makes its one number with torch.Tensor([...]), which does not ask for the device
    assert all(name.endswith("time_mixer.mix_factor") for name in real), sorted(real)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in empty.state_dict().items()} == expected


@every_case
def test_sharded_save(case, tmp_path):
    skip_if_excepted(case, "sharded")
    model = case.build()
    total = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=total // 3)
    assert len(weight_files(tmp_path)) > 2 and list(tmp_path.glob("*.index.json"))
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected, found = state(model), state(again)
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@every_case
def test_bf16_checkpoint_stays_bf16(case, tmp_path):
    skip_if_excepted(case, "half")
    model = case.build().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = {name: value for file in weight_files(tmp_path) for name, value in load_file(file).items()}
    # transformers reads the dtype from the checkpoint, diffusers wants to be told
    options = {"torch_dtype": torch.bfloat16} if isinstance(model, ModelMixin) else {}
    again = type(model).from_pretrained(tmp_path, **options)
    assert again.dtype == torch.bfloat16
    found = again.state_dict()
    for name, value in stored.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def _mis_shape(path):
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = tensors[name].flatten()[:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"not a safetensors file at all" * 40),
    "empty": lambda path: path.write_bytes(b""),
    "another shape": _mis_shape,
}


@every_case
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda name: name.replace(" ", "-"))
def test_damaged_weights_raise(case, damage, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    (path,) = weight_files(tmp_path)
    DAMAGE[damage](path)
    with pytest.raises((OSError, ValueError, RuntimeError, SafetensorError)):
        type(model).from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------- loading in a fresh process


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What one other process found after loading every saved model: case name -> facts."""
    folder, names = tmp_path_factory.mktemp("models"), {}
    for case in CASES:
        model = case.build()
        model.save_pretrained(folder / case.name)
        names[case.name] = type(model).__name__
    (folder / "models.json").write_text(json.dumps(names))
    script = Path(__file__).parent / "fresh_process.py"
    command = [sys.executable, str(script), str(folder), str(torch.get_num_threads())]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=True)


@every_case
def test_fresh_process_loads_everything_and_computes_the_same(case, fresh):
    found = fresh[case.name]
    assert "error" not in found, found["error"]
    assert not any(found["report"].values()), found["report"]
    assert not found["training"]
    model = case.build()
    expected = state(model)
    assert set(found["state"]) == set(expected)
    different = [name for name in expected if not torch.equal(found["state"][name], expected[name])]
    assert not different, f"other values after loading: {different[:10]}"
    with torch.no_grad():
        outputs = floats(model(**case.inputs(2)))
    assert set(found["output"]) == set(outputs)
    for name, value in outputs.items():
        assert torch.equal(found["output"][name], value), f"{name}: {(found['output'][name] - value).abs().max()}"


@every_case
def test_auto_class_answers_with_this_class(case, fresh):
    model = case.build()
    if isinstance(model, ModelMixin):
        assert fresh[case.name]["auto"] is None
        assert getattr(cinetok, type(model).__name__) is type(model), "saved pipelines look components up in cinetok"
    else:
        assert fresh[case.name]["auto"] == type(model).__name__


# ----------------------------------------------------------------------------------------------- frozen names


@every_case
def test_state_dict_keys_are_frozen(case):
    """Names are the file format: checkpoints on the Hub hold them. `python tests/freeze.py` records a wanted change."""
    frozen = json.loads(FROZEN.read_text())
    assert case.name in frozen, "a new case: run `python tests/freeze.py`"
    assert state_dict_keys(case.build()) == frozen[case.name]


def test_no_frozen_case_is_gone():
    assert set(json.loads(FROZEN.read_text())) == {case.name for case in CASES}


def test_every_exported_model_class_has_a_case():
    from cinetok._exports import EXPORTS

    bases = {cls.__name__ for case in CASES for cls in type(case.build()).__mro__}
    exported = {name for name in EXPORTS if ".modeling." in EXPORTS[name]}
    classes = {name: getattr(cinetok, name) for name in exported}
    models = {name for name, cls in classes.items() if issubclass(cls, (PreTrainedModel, ModelMixin))}
    inner = {"DivotModel", "VideoLavitModel"}  # run inside their causal language models
    assert models - inner <= bases
    assert inner <= models
