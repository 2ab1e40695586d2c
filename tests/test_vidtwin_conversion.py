"""VidTwin's conversion: original configurations and checkpoints, and the model card."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from card_snippets import run_card
from model_cases import vidtwin as cases
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

import cinetok
from cinetok import CheckpointError, VidTwinConfig, VidTwinVideoProcessor, convert_checkpoint
from cinetok.conversion import find_release, state_dict_names
from cinetok.conversion.original_config import read_original_config
from cinetok.conversion.vidtwin import config_from_original
from cinetok.model_cards import card_path

RELEASE = "vidtwin_structure_7_7_8_dynamics_7_8"


def _latents(output):
    return {name: getattr(output, name) for name in ("structure", "dynamics_x", "dynamics_y")}


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
