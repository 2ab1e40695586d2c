"""VidTwin: recorded numbers, windows, branches, reenactment, bad input (conversion: test_vidtwin_conversion.py)."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from golden_kinds import GoldenCase, find_cases, load_runners
from golden_kinds.vidtwin import with_rounded_blocks
from manifest_files import load as load_manifests
from model_cases import vidtwin as cases
from run_goldens import run_case
from run_manifests import check_manifest
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from cinetok import CheckpointError, VidTwinConfig, VidTwinModel, VidTwinVideoProcessor
from cinetok.conversion import find_release
from cinetok.conversion.vidtwin import RELEASES, build, manifest_parts
from cinetok.modeling.vidtwin.modeling_vidtwin import sinusoidal_table

GOLDENS = Path(__file__).parent / "goldens" / "vidtwin"
LATER = {"loss", "sched"}
RELEASE = "vidtwin_structure_7_7_8_dynamics_7_8"
LATENTS = ("structure", "dynamics_x", "dynamics_y")


def _cases(folder):
    paths = find_cases([folder])
    return [path for path in paths if json.loads((path / "case.json").read_text())["kind"] not in LATER]


@pytest.fixture(scope="module")
def model():
    return cases.build()


@pytest.fixture
def video(model):
    return cases.video(2, model.config)


def _latents(output):
    return {name: getattr(output, name) for name in LATENTS}


# ---------------------------------------------------------------------------------------------------- recorded numbers


def _check_case(path):
    load_runners("vidtwin")
    case = run_case(path)
    assert case.rows
    assert not [f"{row.name}: {row.max_abs:.2e} {row.note}" for row in case.rows if not row.passed]


@pytest.mark.parametrize("path", _cases(GOLDENS), ids=lambda path: path.name)
def test_committed_goldens(path):
    _check_case(path)


@pytest.mark.shared
@pytest.mark.parametrize("path", _cases(SHARED / "goldens" / "vidtwin"), ids=lambda path: path.name)
def test_shared_goldens(path):
    _check_case(path)


# -------------------------------------------------------------------------------------------------------- released size


def test_manifest(tmp_path):
    manifests = load_manifests("vidtwin")
    assert set(manifests) == {release.name for release in RELEASES} == {RELEASE}
    path = tmp_path / "vidtwin" / f"{RELEASE}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(manifests[RELEASE]))
    problems, summary = check_manifest(path)
    assert not problems, (summary, problems)
    parts = {part.name: part for part in manifest_parts(RELEASE, manifests[RELEASE])}
    assert len(parts["model"].tensors) == 587 and len(parts["loss"].tensors) == 56 and parts["loss"].left_out
    with pytest.raises(CheckpointError, match="no VidTwin release"):
        manifest_parts("vidtwin_other", {"tensors": {}})


def test_released_size():
    config = VidTwinConfig(**find_release(RELEASE).config)
    assert config.to_dict() == VidTwinConfig().to_dict()
    assert config.latent_shapes == ((16, 7, 7, 8), (8, 16, 7), (8, 16, 7))
    model = build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 312_701_490
    latents = model.encode(torch.empty(1, 16, 3, 224, 224, device="meta"))
    assert {name: tuple(value.shape[1:]) for name, value in _latents(latents).items()} == config.latent_shapes._asdict()
    assert model.decode(**_latents(latents)).reconstruction.shape == (1, 16, 3, 224, 224)


@pytest.mark.parametrize(("blocks", "grid"), [(1, 7), (2, 4), (3, 2)])
def test_options_of_the_readme(blocks, grid):
    config = VidTwinConfig(cont_num_blocks=blocks, motion_num_blocks=blocks, num_encoder_layers=1, num_decoder_layers=1)
    assert config.structure_grid_size == config.dynamics_grid_size == (grid, grid)
    with torch.device("meta"):
        model = VidTwinModel(config)
    assert model(torch.empty(1, 16, 3, 224, 224, device="meta")).reconstruction.shape == (1, 16, 3, 224, 224)


def test_compression_is_counted():
    facts = VidTwinConfig().compression()
    assert (facts["latent_values"], facts["input_values"]) == (8064, 2_408_448)
    assert facts["structure_values"] == 6272 and facts["dynamics_values"] == 1792
    assert facts["latent_fraction"] == pytest.approx(0.00335, abs=1e-5) and facts["ratio"] == pytest.approx(
        298.67, abs=0.01
    )
    model = cases.build(cases.WIDE)
    latents = model.encode(cases.video(1, model.config))
    assert model.compression()["latent_values"] == sum(value.numel() for value in _latents(latents).values())


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("arguments", [cases.TINY, cases.WIDE], ids=["square", "wide"])
def test_every_parameter_but_the_dead_ones_matters(arguments):
    model = cases.build(arguments, query_dropout=0.0).train()
    model(cases.video(2, model.config), sample_posterior=False).loss.backward()
    dead = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert {name.rsplit(".", 1)[0] for name in dead} <= {
        "encoder.final_layer",
        "encoder.final_layer.linear",
        "decoder.x_embedder.proj",
        # a constant added to all keys does not change a softmax
        *(name.rsplit(".", 1)[0] for name in dead if name.endswith("key.bias")),
    }
    assert "encoder.final_layer.linear.weight" in dead and "decoder.x_embedder.proj.weight" in dead


@torch.no_grad()
def test_each_latent_changes_the_result(model, video):
    latents = _latents(model.encode(video))
    whole = model.decode(**latents).reconstruction
    for name in LATENTS:
        changed = model.decode(**{**latents, name: latents[name] + 1}).reconstruction
        assert (changed - whole).abs().mean() > 1e-3, name


@torch.no_grad()
def test_temporal_attention_is_causal():
    for implementation in ("sdpa", "eager"):
        for causal in (True, False):
            model = cases.build(temporal_causal=causal)
            model.set_attn_implementation(implementation)
            assert model.temporal_qformer.qformer.config._attn_implementation == implementation
            video = cases.video(1, model.config)
            changed = video.clone()
            changed[:, 2:] = -changed[:, 2:]
            difference = (model.encoder(video) - model.encoder(changed)).abs().amax(dim=(0, 1, 3, 4))
            assert (difference[:2] == 0).all() == causal and (difference[2:] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("arguments", [cases.TINY, cases.WIDE], ids=["square", "wide"])
def test_attention_implementations_agree(arguments):
    model = cases.build(arguments)
    video = cases.video(2, model.config)
    expected = model(video).reconstruction
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(video).reconstruction, expected, atol=5e-5, rtol=1e-4)


def test_training_and_inference_paths_agree(model, video, monkeypatch):
    module = sys.modules[VidTwinModel.__module__]
    expected = model(video).reconstruction  # with gradients: whole sequences, nothing in place
    for tokens in (1, 40, 10_000):
        monkeypatch.setattr(module, "_CPU_CHUNK_TOKENS", tokens)
        with torch.no_grad():
            torch.testing.assert_close(model(video).reconstruction, expected, atol=5e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision(tmp_path, model, video, dtype, tolerance):
    model.save_pretrained(tmp_path)
    half = VidTwinModel.from_pretrained(tmp_path, dtype=dtype)
    output = half(video.to(dtype))
    expected = model(video)
    assert output.reconstruction.dtype == dtype
    error = (output.reconstruction.float() - expected.reconstruction).square().mean().sqrt()
    assert error < tolerance * expected.reconstruction.std()


@torch.no_grad()
def test_position_tables():
    model = cases.build(cases.WIDE)
    rows, columns = model.config.grid_size
    spatial, temporal = model.encoder.pos_embed[0].double(), model.encoder.pos_embed_temporal[0].double()
    width = model.config.hidden_size
    for position in range(rows * columns):
        row, column = divmod(position, columns)
        for index in range(width // 4):
            rate = 10000 ** (-index / (width // 4))
            assert spatial[position, index].item() == pytest.approx(math.sin(column * rate), abs=1e-6)
            assert spatial[position, width // 4 + index].item() == pytest.approx(math.cos(column * rate), abs=1e-6)
            assert spatial[position, width // 2 + index].item() == pytest.approx(math.sin(row * rate), abs=1e-6)
    assert temporal[2, 0].item() == pytest.approx(math.sin(2), abs=1e-6)
    assert temporal[2, width // 2 + 1].item() == pytest.approx(math.cos(2 * 10000 ** (-2 / width)), abs=1e-6)


@pytest.mark.parametrize("path", _cases(GOLDENS), ids=lambda path: path.name)
def test_position_tables_are_the_published_ones_to_the_last_bit(path):
    weights = GoldenCase(path).weights()
    for side in ("encoder", "decoder"):
        temporal, spatial = weights[f"{side}.pos_embed_temporal"][0], weights[f"{side}.pos_embed"][0]
        assert torch.equal(sinusoidal_table(*temporal.shape), temporal.double())
        width = spatial.shape[1] // 2  # the first row holds the table of the columns
        columns = int((spatial[:, width:] == spatial[0, width:]).all(1).sum())
        assert torch.equal(sinusoidal_table(columns, width), spatial[:columns, :width].double())


def test_weights_that_are_not_finite(tmp_path, model):
    broken = copy.deepcopy(model)
    broken.encoder.blocks[0].mlp.fc1.bias.data[3] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.0\.mlp\.fc1\.bias"):
        VidTwinModel.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def test_sampling_draws_structure_then_x_then_y(model, video):
    posteriors = model.encode(video).posteriors
    generator = torch.Generator().manual_seed(5)
    expected = [p.mean + p.std * torch.randn(p.mean.shape, generator=generator) for p in posteriors]
    sampled = model.encode(video, sample_posterior=True, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(sampled.structure.permute(0, 4, 1, 2, 3), expected[0])
    torch.testing.assert_close(sampled.dynamics_x, expected[1])
    torch.testing.assert_close(sampled.dynamics_y, expected[2])
    assert not torch.equal(sampled.structure, model.encode(video).structure)


@torch.no_grad()
def test_generators_per_sample_and_window_sizes(model):
    video = cases.video(2, model.config, num_frames=11)

    def run(clips, seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model(clips, sample_posterior=True, generator=generators, **options).reconstruction

    expected = run(video, [3, 4])
    torch.testing.assert_close(run(video, [3, 4], window_batch_size=1), expected, atol=5e-5, rtol=1e-4)
    for index, seed in enumerate((3, 4)):
        torch.testing.assert_close(run(video[index : index + 1], [seed])[0], expected[index], atol=5e-5, rtol=1e-4)
    assert not torch.allclose(run(video, [3, 5])[1], expected[1])
    with pytest.raises(ValueError, match="got 1 generators for a batch of 2"):
        run(video, [3])


@torch.no_grad()
def test_forward_samples_only_in_training():
    model = cases.build(query_dropout=0.0)
    video = cases.video(1, model.config)
    assert torch.equal(model(video).structure, model(video).structure)
    model.train()
    assert not torch.equal(model(video).structure, model(video).structure)
    assert torch.equal(model(video, sample_posterior=False).structure, model.eval()(video).structure)


# ------------------------------------------------------------------------------------------------- windows and branches


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 8, 11])
def test_any_length_by_windows(model, num_frames):
    video = cases.video(2, model.config, num_frames=num_frames)
    output = model(video)
    assert output.reconstruction.shape == video.shape
    size = model.config.num_frames
    for start in range(0, num_frames, size):
        window = video[:, start : start + size]
        filled = torch.cat([window, window[:, -1:].repeat(1, size - window.shape[1], 1, 1, 1)], dim=1)
        expected = model.decode(**_latents(model.encode(filled))).reconstruction[:, : window.shape[1]]
        torch.testing.assert_close(output.reconstruction[:, start : start + size], expected, atol=5e-5, rtol=1e-4)
    merged = model.merge_windows(model.decode(**_latents(output)).reconstruction, num_frames)
    torch.testing.assert_close(merged, output.reconstruction, atol=5e-5, rtol=1e-4)
    assert torch.equal(model.merge_windows(model.split_windows(video), num_frames), video)
    torch.testing.assert_close(
        model(video, window_batch_size=1).reconstruction, output.reconstruction, atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_branches_add_up_before_the_decoder(model, video):
    seen = []
    handle = model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latents = _latents(model.encode(video))
    for branch in ("all", "structure", "dynamics"):
        reconstruction = model.decode(**latents, branch=branch).reconstruction
        assert torch.equal(model(video, branch=branch).reconstruction, reconstruction)
        del seen[-1]
    handle.remove()
    torch.testing.assert_close(seen[1] + seen[2], seen[0])
    alone = model.decode(structure=latents["structure"], branch="structure").reconstruction
    assert not torch.allclose(alone, model.decode(**latents).reconstruction, atol=1e-2)


@torch.no_grad()
def test_loss_and_its_parts(model):
    video = cases.video(2, model.config, num_frames=6)
    output = model(video)
    frames = 2 * 6
    assert output.reconstruction_loss.item() == pytest.approx(
        ((output.reconstruction - video).abs().sum() / frames).item(), rel=1e-5
    )
    posteriors = model.encode(model.split_windows(video)).posteriors
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(p.mean, p.std), torch.distributions.Normal(0.0, 1.0)
        ).sum()
        for p in posteriors
    )
    assert output.kl_loss.item() == pytest.approx(expected.item() / 4, rel=1e-4)
    weight = model.config.kl_loss_weight
    assert output.loss.item() == pytest.approx((output.reconstruction_loss + weight * output.kl_loss).item())
    assert model(video, return_loss=False).loss is None
    as_tuple = model(video, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], output.reconstruction)


# --------------------------------------------------------------------------------------------------------- reenactment


@torch.no_grad()
def test_reenact_takes_structure_from_one_and_dynamics_from_the_other(model):
    a, b = cases.video(2, model.config, 6, seed=2), cases.video(2, model.config, 6, seed=9)
    result = model.reenact(structure_from=a, dynamics_from=b).reconstruction
    assert result.shape == a.shape
    from_a = _latents(model.encode(model.split_windows(a)))
    from_b = _latents(model.encode(model.split_windows(b)))
    decoded = model.decode(from_a["structure"], from_b["dynamics_x"], from_b["dynamics_y"]).reconstruction
    torch.testing.assert_close(result, model.merge_windows(decoded, 6), atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(model.reenact(a, a).reconstruction, model(a).reconstruction, atol=5e-5, rtol=1e-4)
    assert not torch.allclose(model.reenact(b, a).reconstruction, result, atol=1e-2)


@torch.no_grad()
def test_reenact_samples_like_the_published_script(model):
    # each pair of windows: three draws for A, then three for B
    a, b = cases.video(1, model.config, 8, seed=2), cases.video(1, model.config, 8, seed=9)
    expected, generator = [], torch.Generator().manual_seed(7)
    for start in (0, 4):
        of_a = model.encode(a[:, start : start + 4], sample_posterior=True, generator=generator)
        of_b = model.encode(b[:, start : start + 4], sample_posterior=True, generator=generator)
        expected.append(model.decode(of_a.structure, of_b.dynamics_x, of_b.dynamics_y).reconstruction)
    for window_batch_size in (1, 4):
        generator = torch.Generator().manual_seed(7)
        result = model.reenact(
            a, b, sample_posterior=True, generator=generator, window_batch_size=window_batch_size
        ).reconstruction
        torch.testing.assert_close(result, torch.cat(expected, dim=1), atol=5e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- save and load


def test_save_and_load_in_a_fresh_process(tmp_path, model, video):
    model.save_pretrained(tmp_path / "model")
    VidTwinVideoProcessor().save_pretrained(tmp_path / "model")
    with torch.no_grad():
        save_file({"video": video, "reconstruction": model(video).reconstruction}, tmp_path / "io.safetensors")
    script = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from torchvision_shim import install
install()
from safetensors.torch import load_file
from transformers import AutoModel, AutoVideoProcessor
import cinetok
torch.set_num_threads(1)
io = load_file(sys.argv[1] + "/io.safetensors")
model, info = AutoModel.from_pretrained(sys.argv[1] + "/model", output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    assert torch.equal(model.eval()(io["video"]).reconstruction, io["reconstruction"])
print(type(model).__name__, type(AutoVideoProcessor.from_pretrained(sys.argv[1] + "/model")).__name__)
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VidTwinModel", "VidTwinVideoProcessor"]


def test_auto_classes_and_processor_defaults(tmp_path):
    VidTwinConfig().save_pretrained(tmp_path)
    VidTwinVideoProcessor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VidTwinConfig
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(processor) is VidTwinVideoProcessor
    frames = np.random.default_rng(0).integers(0, 256, (16, 240, 320, 3), dtype=np.uint8)
    assert processor(frames, return_tensors="pt")["pixel_values_videos"].shape == (1, 16, 3, 224, 224)
    assert processor.num_frames == 16 and VidTwinVideoProcessor(num_frames=None).num_frames is None


def test_missing_tensors_are_initialised_and_loaded_ones_kept(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    missing = {"encoder.blocks.0.attn_temp.proj.weight", "temporal_qformer.query_embeds", "motion_head.bias"}
    loaded, info = VidTwinModel.from_pretrained(
        None,
        config=model.config,
        state_dict={name: value for name, value in weights.items() if name not in missing},
        output_loading_info=True,
    )
    loaded = loaded.state_dict()
    assert set(info["missing_keys"]) == missing
    assert all(torch.equal(loaded[name], weights[name]) for name in weights if name not in missing)
    assert not loaded["encoder.blocks.0.attn_temp.proj.weight"].any() and loaded["temporal_qformer.query_embeds"].any()


def test_initialisation():
    model = VidTwinModel(VidTwinConfig(**cases.TINY))
    block = model.encoder.blocks[0]
    assert not block.attn_temp.proj.weight.any() and not block.attn.qkv.bias.any()
    bound = math.sqrt(6 / (block.mlp.fc1.in_features + block.mlp.fc1.out_features))
    assert 0.9 * bound < block.mlp.fc1.weight.abs().max() <= bound
    assert 0.5 < model.temporal_qformer.query_embeds.std() < 1.5
    assert model.temporal_qformer.qformer.encoder.layer[0].attention.attention.query.weight.std() < 0.03
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 36}, "height 36 is not a multiple of the patch size 8"),
        ({"width": 64}, "square token grid"),
        ({"hidden_size": 30}, "multiple of 4"),
        ({"num_encoder_attention_heads": 5}, "not a multiple of num_encoder_attention_heads"),
        ({"num_query_attention_heads": 5}, "not a multiple of num_query_attention_heads"),
        ({"patch_size": [8]}, "patch_size must be a number"),
        ({"num_frames": 0}, "num_frames must be positive"),
        ({"cont_num_blocks": -1}, "cont_num_blocks must not be negative"),
        ({"query_dropout": 1.0}, "query_dropout"),
        ({"kl_loss_weight": -1.0}, "kl_loss_weight"),
        ({"height": 40, "downsample_motion": False, "cont_num_blocks": 2}, "cannot be cropped"),
        ({"num_frames": "4"}, "num_frames"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(Exception, match=message) as error:
        VidTwinConfig(**{**cases.TINY, **changes})
    if "num_frames" not in changes or changes["num_frames"] == 0:
        assert isinstance(error.value, ValueError) or "ValueError" in str(error.value)


def test_bad_videos(model, video):
    for bad, error, message in (
        (video[:, :3], ValueError, "must have 4 frames, got 3"),
        (torch.cat([video, video], dim=1), ValueError, "must have 4 frames, got 8"),
        (video[..., :24], ValueError, r"must have shape \(batch, num_frames, 3, 32, 32\)"),
        (video.transpose(1, 2), ValueError, "must have shape"),
        (video[0], ValueError, "must have shape"),
        (video[:0], ValueError, "is empty"),
        (video.to(torch.uint8), TypeError, "floating-point"),
        (video.numpy(), TypeError, "ndarray"),
    ):
        with pytest.raises(error, match=message):
            model.encode(bad)
    with pytest.raises(ValueError, match="is empty"):
        model(video[:, :0])
    with pytest.raises(ValueError, match="window_batch_size"):
        model(video, window_batch_size=0)
    with pytest.raises(ValueError, match="noise must have shape"):
        model.encode(video, noise=[torch.zeros(1)] * 3)


def test_bad_latents(model, video):
    latents = _latents(model.encode(video))
    with pytest.raises(ValueError, match="branch must be one of"):
        model.decode(**latents, branch="content")
    with pytest.raises(ValueError, match='branch="all" needs dynamics_y'):
        model.decode(latents["structure"], latents["dynamics_x"])
    with pytest.raises(ValueError, match='branch="structure" needs structure'):
        model.decode(branch="structure")
    with pytest.raises(ValueError, match=r"dynamics_x must have shape \(batch, 5, 4, 2\)"):
        model.decode(**{**latents, "dynamics_x": latents["dynamics_x"][..., :1]})
    with pytest.raises(ValueError, match="same batch size"):
        model.decode(**{**latents, "structure": latents["structure"][:1]})


def test_bad_pairs(model, video):
    with pytest.raises(ValueError, match="same batch size, number of frames and size"):
        model.reenact(video, video[:, :3])
    with pytest.raises(ValueError, match="same batch size"):
        model.reenact(video, video[:1])
    with pytest.raises(ValueError, match="dynamics_from must have shape"):
        model.reenact(video, video[..., :16])
    with pytest.raises(TypeError, match="structure_from must be a floating-point"):
        model.reenact(video.int(), video)


def test_the_emulated_precision_rounds_in_the_blocks_and_nowhere_else(model, video):
    """Of goldens recorded in half precision; the model itself stays as it is."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = with_rounded_blocks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen = {}
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith(("attn", "attn_temp")):
            module.register_forward_hook(lambda m, args, output, name=name: seen.update({name: (args[0], output)}))
    output = rounded(video).reconstruction

    def is_rounded(value, dtype):
        return torch.equal(value.to(dtype).to(value.dtype), value)

    for name, values in seen.items():
        dtype = torch.float16 if name.endswith(("qkv", "proj", "fc1", "fc2")) else torch.bfloat16
        assert all(is_rounded(value, dtype) for value in values) == (".blocks." in name), name
    assert (
        sum(".blocks." in name for name in seen) == 4 * 8
    )  # all layers and attentions of all blocks were called as modules
    for name, value in rounded.state_dict().items():
        is_linear = ".blocks." in name and not name.endswith("scale_shift_table")
        assert torch.equal(value, before[name].half().float() if is_linear else before[name]), name
    expected = model(video).reconstruction
    assert 1e-4 < (output - expected).abs().max() < 0.1


def test_a_golden_without_its_inputs_fails(tmp_path):
    # the runner must notice numbers it does not reproduce
    source = _cases(GOLDENS)[0]
    for file in source.iterdir():
        if not file.name.startswith("io."):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    recorded = GoldenCase(source).recorded
    name = next(name for name in recorded if name.endswith(".recon"))
    recorded[name] = recorded[name] + 1e-2
    recorded["output.unknown"] = torch.zeros(1)
    save_file(recorded, tmp_path / "io.safetensors")
    load_runners("vidtwin")
    case = run_case(tmp_path)
    assert isinstance(case, GoldenCase)
    assert {row.name for row in case.rows if not row.passed} == {name, "output.unknown"}
