"""VidTwin: recorded numbers, windows, branches, reenactment, conversion, bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from card_snippets import run_card
from conftest import SHARED
from golden_kinds import GoldenCase, find_cases, load_runners
from manifest_files import load as load_manifests
from model_cases import vidtwin as cases
from run_goldens import run_case
from run_manifests import check_manifest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

import cinetok
from cinetok import CheckpointError, VidTwinConfig, VidTwinModel, VidTwinVideoProcessor, convert_checkpoint
from cinetok.conversion import find_release, state_dict_names
from cinetok.conversion.vidtwin import RELEASES, build, config_from_original, manifest_parts
from cinetok.model_cards import card_path

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


# ---------------------------------------------------------------------------------------------------------- conversion


def original_config(arguments=None, **changes):
    """A configuration as the authors write it."""
    config = VidTwinConfig(**(arguments or find_release(RELEASE).config))
    trunk = {
        "in_channels": config.num_channels,
        "input_size": [config.num_frames, config.height, config.width],
        "patch_size": [1, *config.patch_height_and_width],
        "hidden_size": config.hidden_size,
        "temporal_casual": config.temporal_causal,
    }
    encoder = {"depth": config.num_encoder_layers, "num_heads": config.num_encoder_attention_heads}
    decoder = {"depth": config.num_decoder_layers, "num_heads": config.num_decoder_attention_heads}
    params = {
        "ckpt_path": "somewhere",
        "expect_ch": config.structure_channels,
        "cont_num_blocks": config.cont_num_blocks,
        "downsample_motion": config.downsample_motion,
        "motion_num_blocks": config.motion_num_blocks,
        "d_dim": config.dynamics_channels,
        "init_ch": config.structure_base_channels,
        "temporal_qformer_config": {
            "target": "vidtwin.modules.qformer.MyQformerInterface",
            "params": {
                "num_query_tokens": config.num_query_tokens,
                "query_hidden_size": config.query_hidden_size,
                "encoder_hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_query_layers,
                "intermediate_size": config.query_intermediate_size,
                "num_attention_heads": config.num_query_attention_heads,
            },
        },
        "encoder_config": {"target": "vidtwin.modules.st_transformer.STTEncoder", "params": {**trunk, **encoder}},
        "decoder_config": {"target": "vidtwin.modules.st_transformer.STTDecoder", "params": {**trunk, **decoder}},
        "regularizer_config": {
            "target": "vidtok.modules.regularizers.DiagonalGaussianRegularizer",
            "params": {"sample": True},
        },
        "loss_config": {"params": {"regularization_weights": {"kl_loss": config.kl_loss_weight}}},
        **changes,
    }
    return {"model": {"target": "vidtwin.models.vidtwin_ae.VidAutoEncoderQformerCompactSymVidVAE", "params": params}}


def _edit(path, value):
    """The tiny configuration with one entry below `params` changed (None removes it)."""
    source = original_config(cases.TINY)
    target = source["model"]["params"]
    *parents, last = path.split(".")
    for name in parents:
        target = target[name]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return source


def _checkpoint(folder, arguments=cases.TINY, **extra):
    """An original checkpoint (Lightning's outer structure) of a tiny model; returns (path, model)."""
    model = cases.build(arguments)
    tensors = state_dict_names("vidtwin", "model", model.config).from_hf(model.state_dict())
    path = Path(folder) / "original.ckpt"
    torch.save({"state_dict": {**tensors, **extra}, "epoch": 3, "optimizer_states": [{"x": 1}]}, path)
    return path, model


def test_original_configuration_gives_the_release(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(original_config()))
    from cinetok.conversion.original_config import read_original_config

    expected = VidTwinConfig(**find_release(RELEASE).config).to_dict()
    assert config_from_original(read_original_config(path)).to_dict() == expected
    # the published file leaves these to the defaults
    source = original_config()
    params = source["model"]["params"]
    del params["init_ch"]
    for key in ("num_hidden_layers", "intermediate_size", "num_attention_heads"):
        del params["temporal_qformer_config"]["params"][key]
    assert config_from_original(source["model"]).to_dict() == expected


@pytest.mark.parametrize("arguments", [cases.TINY, cases.WIDE], ids=["square", "wide"])
def test_convert_and_back(tmp_path, arguments):
    path, model = _checkpoint(tmp_path, arguments, **{"loss.logvar": torch.tensor(0.5)})
    folder = convert_checkpoint("vidtwin", path, tmp_path / "out", original_config=original_config(arguments))
    converted = AutoModel.from_pretrained(folder)
    ignored = ("dtype", "architectures", "_name_or_path")
    ours, theirs = (
        {k: v for k, v in c.to_dict().items() if k not in ignored} for c in (converted.config, model.config)
    )
    assert ours == theirs
    video = cases.video(1, model.config, num_frames=5)
    with torch.no_grad():
        assert torch.equal(converted.eval()(video).reconstruction, model(video).reconstruction)
    processor = AutoVideoProcessor.from_pretrained(folder)
    frames = np.zeros((model.config.num_frames, 50, 70, 3), dtype=np.uint8)
    expected = video[:, : model.config.num_frames].shape
    assert processor(frames, return_tensors="pt")["pixel_values_videos"].shape == expected
    report = json.loads((folder / "conversion.json").read_text())
    assert report["left_out"] == {"loss.*": 1} and report["training_state"] is None
    # everything that was in the checkpoint comes back, dead tensors and float64 tables included
    original = torch.load(path, weights_only=True)["state_dict"]
    back = state_dict_names("vidtwin", "model", converted.config).from_hf(converted.state_dict())
    assert back.keys() == {name for name in original if not name.startswith("loss.")}
    assert all(torch.equal(back[name], original[name]) and back[name].dtype == original[name].dtype for name in back)
    assert back["encoder.pos_embed"].dtype == torch.float64 and "decoder.x_embedder.proj.weight" in back


def test_convert_keeps_training_state_on_request(tmp_path):
    path, _ = _checkpoint(tmp_path, **{"loss.logvar": torch.tensor(0.5)})
    source = original_config(cases.TINY)
    folder = convert_checkpoint("vidtwin", path, tmp_path / "out", original_config=source, keep_training_state=True)
    assert load_file(folder / "training_state.safetensors").keys() == {"loss.logvar"}
    bare, _ = _checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds no training state"):
        convert_checkpoint("vidtwin", bare, tmp_path / "no", original_config=source, keep_training_state=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("motion_head.weight"), "1 missing: motion_head.weight"),
        (lambda t: t.update({"motion_head.extra": torch.zeros(1)}), "1 unexpected: motion_head.extra"),
        (lambda t: t.update({"conv_in.bias": torch.zeros(9)}), r"conv_in.bias \(9,\) instead of \(8,\)"),
        (lambda t: t["cont_emb.0.weight"].fill_(float("nan")), "NaN or infinite values: cont_emb.0.weight"),
        (lambda t: t.pop("encoder.pos_embed"), "missing: encoder.pos_embed"),
        (lambda t: t["decoder.pos_embed"].add_(1), "not the sinusoidal table"),
        (lambda t: t.update({"encoder.pos_embed": torch.zeros(1, 25, 32)}), "another input size"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, spoil, message):
    path, _ = _checkpoint(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    spoil(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint("vidtwin", path, tmp_path / "out", original_config=original_config(cases.TINY))
    assert not (tmp_path / "out").exists()


def test_the_wrong_release_is_refused(tmp_path):
    path, _ = _checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="another input size"):
        convert_checkpoint("vidtwin", path, tmp_path / "out", release=RELEASE)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("encoder_config", None, "model.params.encoder_config with `params` is missing"),
        ("encoder_config.params.hidden_size", None, "encoder_config: missing keys hidden_size"),
        ("decoder_config.params.input_size", None, "decoder_config: missing keys input_size"),
        ("temporal_qformer_config.params.num_query_tokens", None, "missing keys num_query_tokens"),
        ("temporal_qformer_config.params.query_hidden_size", None, "missing keys query_hidden_size"),
        ("temporal_qformer_config.params.encoder_hidden_size", None, "encoder_hidden_size 768 is not the trunk's"),
        ("encoder_config.params.dropuot", 0.1, "encoder_config: unknown keys dropuot"),
        ("temporal_qformer_config.params.heads", 2, "temporal_qformer_config: unknown keys heads"),
        ("shuffle_contents", True, "model.params: unknown keys shuffle_contents"),
        ("shuffle_content", True, "model.params: shuffle_content is True; only False is supported"),
        ("encoder_config.params.space_scale", 2.0, "encoder_config: space_scale is 2.0; only 1 is supported"),
        ("decoder_config.params.time_scale", 0.5, "decoder_config: time_scale is 0.5; only 1 is supported"),
        ("decoder_config.params.no_temporal", True, "no_temporal is True; only False is supported"),
        ("decoder_config.params.pred_sigma", True, "pred_sigma is True; only False is supported"),
        ("encoder_config.params.temporal_group", True, "temporal_group is True; only False is supported"),
        ("decoder_config.params.hidden_size", 64, "hidden_size is 32 in the encoder, 64 in the decoder"),
        ("temporal_qformer_config.params.encoder_hidden_size", 16, "is not the trunk's hidden_size"),
        ("encoder_config.params.enable_flashattn", False, "switches flash attention off"),
        ("regularizer_config.target", "vidtok.modules.regularizers.FSQRegularizer", "only DiagonalGaussianRegularizer"),
        ("expect_ch", "3", "structure_channels"),
        ("motion_num_blocks", -1, "motion_num_blocks must not be negative"),
    ],
)
def test_bad_original_configurations(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_original(_edit(path, value))


@pytest.mark.parametrize(
    ("path", "field", "default"),
    [
        ("expect_ch", "structure_channels", 4),
        ("init_ch", "structure_base_channels", 128),
        ("cont_num_blocks", "cont_num_blocks", 2),
        ("d_dim", "dynamics_channels", 16),
        ("motion_num_blocks", "motion_num_blocks", 2),
        ("downsample_motion", "downsample_motion", False),
        ("encoder_config.params.depth", "num_encoder_layers", 12),
        ("decoder_config.params.depth", "num_decoder_layers", 12),
        ("encoder_config.params.num_heads", "num_encoder_attention_heads", 8),
        ("decoder_config.params.num_heads", "num_decoder_attention_heads", 16),
        ("temporal_qformer_config.params.num_hidden_layers", "num_query_layers", 6),
        ("temporal_qformer_config.params.intermediate_size", "query_intermediate_size", 768),
        ("temporal_qformer_config.params.num_attention_heads", "num_query_attention_heads", 8),
    ],
)
def test_what_a_configuration_leaves_out_is_the_original_default(path, field, default):
    assert getattr(config_from_original(_edit(path, None)), field) == default


def test_defaults_both_trunks_share():
    source = original_config(cases.TINY)
    for side in ("encoder_config", "decoder_config"):
        for key in ("in_channels", "temporal_casual"):
            del source["model"]["params"][side]["params"][key]
    config = config_from_original(source)
    assert (config.num_channels, config.mlp_ratio, config.temporal_causal) == (3, 4.0, True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"encoder_config.params.{key}", value) for key, value in {
            "drop_path": 0.1, "freeze": "not_temporal", "enable_layernorm_kernel": True, "no_temporal_pos_emb": True,
            "space_scale": 1.0, "time_scale": 1, "no_temporal": False, "pred_sigma": False, "temporal_group": False,
            "group_size": 4,
        }.items()),
        *((key, value) for key, value in {
            "partial_content_motion": "content", "temporal_down_dim": 16, "weight_decay": 0.1,
            "trainable_ae_params": [["a"]], "trainable_disc_params": [["b"]], "ae_optimizer_args": [{}],
            "disc_optimizer_args": [{}], "shuffle_content": False,
        }.items()),
    ],
)  # fmt: skip
def test_options_without_influence_on_the_weights_are_accepted(path, value):
    expected = config_from_original(original_config(cases.TINY)).to_dict()
    assert config_from_original(_edit(path, value)).to_dict() == expected


@torch.no_grad()
def test_dynamics_of_full_length_through_the_layers_that_restore_it(tmp_path):
    # motion_num_blocks=0 with downsample_motion: no convolution, but `up_motion` all the same, as in the original
    arguments = {**cases.TINY, "motion_num_blocks": 0}
    path, model = _checkpoint(tmp_path, arguments)
    assert model.config.downsample_motion and model.config.dynamics_grid_size == model.config.grid_size
    assert len(model.downsample_motion_module) == 0 and "up_motion.0.weight" in model.state_dict()
    video = cases.video(1, model.config)
    latents = model.encode(video)
    assert latents.dynamics_x.shape[1:] == model.config.latent_shapes.dynamics_x
    output = model.decode(**_latents(latents)).reconstruction
    model.up_motion[0].bias.add_(1)
    assert (model.decode(**_latents(latents)).reconstruction - output).abs().max() > 1e-4
    folder = convert_checkpoint("vidtwin", path, tmp_path / "out", original_config=original_config(arguments))
    torch.testing.assert_close(AutoModel.from_pretrained(folder).eval()(video).reconstruction, output)


def test_other_bad_original_configurations():
    with pytest.raises(CheckpointError, match="no `model` section"):
        config_from_original({"data": {}})
    source = original_config(cases.TINY)
    source["model"]["target"] = "vidtwin.models.vidtwin_ae.Other"
    with pytest.raises(CheckpointError, match="Other"):
        config_from_original(source)
    source = original_config(cases.TINY)
    for side in ("encoder_config", "decoder_config"):
        source["model"]["params"][side]["params"]["patch_size"] = [2, 8, 8]
    with pytest.raises(CheckpointError, match="patches span 2 frames"):
        config_from_original(source)


def test_card_snippet_runs(tmp_path):
    release = find_release(RELEASE)
    small = {key: cases.TINY[key] for key in cases.TINY if key not in ("num_frames", "height", "width", "patch_size")}
    cases.build({**release.config, **small, "structure_channels": 8, "dynamics_channels": 8}).save_pretrained(
        tmp_path / RELEASE
    )
    VidTwinVideoProcessor(**release.processor).save_pretrained(tmp_path / RELEASE)
    frames = np.random.default_rng(0).integers(0, 256, (20, 240, 320, 3), dtype=np.uint8)
    cinetok.write_video(tmp_path / "clip.mp4", frames, fps=10)
    run_card(card_path(release).read_text(encoding="utf-8"), tmp_path)
    for name in ("reconstruction", "structure", "reenacted"):
        assert cinetok.read_video(tmp_path / f"{name}.mp4").frames.shape == (16, 224, 224, 3)


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
