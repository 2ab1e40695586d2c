"""Conversion of VidTok: all releases on the meta device, original configurations, tiny checkpoints end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from golden_kinds import GoldenCase
from huggingface_hub import ModelCard
from manifest_files import load as load_manifests
from run_manifests import check_manifest
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from cinetok import CheckpointError, VidTokConfig, VidTokModel, convert_checkpoint
from cinetok.conversion import find_release, releases, state_dict_names
from cinetok.conversion.original_config import read_original_config
from cinetok.conversion.vidtok import build, config_from_original, manifest_parts

MANIFESTS = load_manifests("vidtok")
RELEASES = {release.name: release for release in releases("vidtok")}


# ---------------------------------------------------------------------------------------------------- the 23 releases


def test_every_released_file_is_in_the_table():
    assert set(RELEASES) == set(MANIFESTS) and len(RELEASES) == 23


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest(tmp_path, name):
    path = tmp_path / "vidtok" / f"{name}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(MANIFESTS[name]))
    problems, summary = check_manifest(path)
    assert not problems, (summary, problems)
    model, loss = manifest_parts(name, MANIFESTS[name])
    assert loss.left_out and len(loss.tensors) == 56 and len(model.tensors) == len(MANIFESTS[name]["tensors"]) - 56


def test_manifest_check_notices_differences(tmp_path):
    name = "vidtok_kl_causal_488_4chn"
    tensors = dict(MANIFESTS[name]["tensors"])
    del tensors["encoder.conv_in.conv.bias"]
    tensors["encoder.extra"] = {"shape": [1]}
    tensors["decoder.conv_out.conv.bias"] = {"shape": [4]}
    path = tmp_path / "vidtok" / f"{name}.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"tensors": tensors}))
    problems = " ".join(check_manifest(path)[0])
    for part in (
        "encoder.conv_in.conv.bias is not filled",
        "encoder.extra has no place",
        "decoder.conv_out.conv.bias is",
    ):
        assert part in problems


def test_unknown_manifest_is_an_error():
    with pytest.raises(CheckpointError, match="no VidTok release"):
        manifest_parts("vidtok_other", {"tensors": {}})


@pytest.mark.parametrize("name", RELEASES)
def test_names_map_both_ways(name):
    config = VidTokConfig(**RELEASES[name].config)
    mapping = state_dict_names("vidtok", "model", config)
    ours = build(config).state_dict()
    original = mapping.from_hf(ours)
    assert mapping.to_hf(original).keys() == ours.keys()
    assert original.keys() == {n for n in MANIFESTS[name]["tensors"] if not n.startswith("loss.")}


def test_unknown_component():
    with pytest.raises(ValueError, match="no component 'unet'"):
        state_dict_names("vidtok", "unet", None)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vidtok_kl_causal_488_16chn_v1_1", 157.95e6), ("vidtok_kl_causal_288_8chn", 148.8e6)],
)
def test_parameter_counts(name, parameters):
    count = sum(p.numel() for p in build(VidTokConfig(**RELEASES[name].config)).parameters())
    assert count == pytest.approx(parameters, rel=1e-3)


# ------------------------------------------------------------------------------------------- original configurations


def original(
    network="model_3dcausal", engine="autoencoder", regularizer="DiagonalGaussianRegularizer", levels=None, **changes
):
    """A configuration as the authors write it."""
    encoder = "Encoder3D" if "noncausal" in network else "EncoderCausal3DPadding"
    params = {
        "double_z": levels is None,
        "z_channels": 4 if levels is None else len(levels),
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "time_downsample_factor": 4,
        "num_res_blocks": 2,
        "dropout": 0.0,
        "use_checkpoint": False,
        "init_pad_mode": "replicate",
        "norm_type": "layernorm",
        "fix_encoder": False,
        "fix_decoder": False,
        **changes,
    }
    if levels is not None:
        regularizer = "FSQRegularizer"
    section = {"target": f"vidtok.modules.regularizers.{regularizer}"}
    if levels is not None:
        section["params"] = {
            "levels": levels,
            "entropy_loss_weight": 0.1,
            "entropy_loss_annealing_steps": 2000,
            "entropy_loss_annealing_factor": 3,
            "commitment_loss_weight": 0.25,
        }
    return {
        "model": {
            "base_learning_rate": "1e-5",
            "target": f"vidtok.models.{engine}.AutoencodingEngine",
            "params": {
                "monitor": "val/rec_loss",
                "mode": "min",
                "ignore_keys": [],
                "encoder_config": {"target": f"vidtok.modules.{network}.{encoder}", "params": params},
                "decoder_config": {
                    "target": f"vidtok.modules.{network}.{encoder.replace('Encoder', 'Decoder')}",
                    "params": "${model.params.encoder_config.params}",
                },
                "regularizer_config": section,
                "loss_config": {
                    "target": "vidtok.modules.losses.GeneralLPIPSWithDiscriminator",
                    "params": {"regularization_weights": {"aux_loss": 1.0, "kl_loss": 1e-6}},
                },
            },
        },
        "data": {"target": "x", "params": {"train": "${nothing.here}"}},
    }


V1_1 = {"network": "model_3dcausal_v1_1", "engine": "autoencoder_v1_1", "interpolation_mode": "trilinear"}
ORIGINALS = {
    "vidtok_kl_causal_488_4chn": original(),
    "vidtok_kl_causal_288_8chn": original(z_channels=8, time_downsample_factor=2, tempo_ds=[1], tempo_us=[2]),
    "vidtok_kl_causal_444_4chn": original(spatial_ds=[1, 2], spatial_us=[1, 2]),
    "vidtok_kl_causal_41616_4chn": original(ch_mult=[1, 2, 4, 4, 4]),
    "vidtok_kl_noncausal_488_16chn": original(network="model_3dnoncausal", z_channels=16, tempo_ds=[0], spatial_us=[3]),
    "vidtok_fsq_noncausal_41616_262144": original(network="model_3dnoncausal", levels=[8] * 6, ch_mult=[1, 2, 4, 4, 4]),
    "vidtok_fsq_causal_488_32768_v1_1": original(**V1_1, levels=[8] * 5),
    "vidtok_fsq_causal_888_32768_v1_1": original(
        **V1_1, levels=[8] * 5, time_downsample_factor=8, tempo_ds=[0, 1, 2], tempo_us=[1, 2, 3]
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("form", ["yaml", "json", "model section"])
def test_original_configurations_give_the_release(tmp_path, name, form):
    source = ORIGINALS[name]
    if form == "model section":
        source = read_original_config(source)["model"]
    else:
        path = tmp_path / f"config.{form}"
        path.write_text(yaml.safe_dump(source) if form == "yaml" else json.dumps(source))
        source = path
    config = config_from_original(read_original_config(source))
    assert config.to_dict() == VidTokConfig(**RELEASES[name].config).to_dict()


def convert_config(source, version=None):
    return config_from_original(read_original_config(source), version)


def test_options_of_the_original_arrive():
    source = original(**V1_1, levels=[7, 5, 8], norm_type="groupnorm", dropout=0.1, ch=32, num_res_blocks=1)
    source["model"]["params"]["regularizer_config"]["params"].update(
        entropy_loss_weight=0.2, commitment_loss_weight=0.5
    )
    source["model"]["params"]["loss_config"]["params"]["regularization_weights"] = {"aux_loss": 0.3}
    config = convert_config(source)
    assert (config.fsq_levels, config.norm_type, config.dropout) == ([7, 5, 8], "groupnorm", 0.1)
    assert (config.base_channels, config.num_res_blocks, config.temporal_interpolation) == (32, 1, "linear")
    assert (config.entropy_loss_weight, config.commitment_loss_weight) == (0.2, 0.5)
    assert (config.aux_loss_weight, config.kl_loss_weight) == (0.3, 0.0)
    nearest = {**V1_1, "interpolation_mode": "nearest"}
    assert convert_config(original(**nearest)).temporal_interpolation == "nearest"
    # the original classes' defaults: group norm, nearest interpolation, posterior sampling left to the caller
    bare = original(**V1_1)
    del bare["model"]["params"]["encoder_config"]["params"]["norm_type"]
    del bare["model"]["params"]["encoder_config"]["params"]["interpolation_mode"]
    config = convert_config(bare)
    assert (config.norm_type, config.temporal_interpolation) == ("groupnorm", "nearest")
    source = original()
    source["model"]["params"]["regularizer_config"]["params"] = {"sample": True}
    assert convert_config(source).sample_posterior


def test_the_version_is_never_guessed():
    fork = original(network="my_networks", engine="my_engine")
    with pytest.raises(CheckpointError, match=r'version="1\.0" or version="1\.1"'):
        convert_config(fork)
    assert convert_config(fork, "1.0").version == "1.0"
    assert convert_config({**fork}, "1.1").version == "1.1"
    with pytest.raises(ValueError, match="version must be"):
        convert_config(fork, "2.0")
    with pytest.raises(CheckpointError, match=r"version='1\.1' was given, but the configuration is of version 1\.0"):
        convert_config(original(), "1.1")
    with pytest.raises(CheckpointError, match="non-causal"):
        convert_config(original(network="model_3dnoncausal"), "1.0")
    with pytest.raises(CheckpointError, match="belong to different versions"):
        convert_config(original(network="model_3dcausal_v1_1"))
    mixed = original()
    mixed["model"]["params"]["decoder_config"]["target"] = "vidtok.modules.model_3dcausal_v1_1.DecoderCausal3DPadding"
    with pytest.raises(CheckpointError, match="belong to different versions"):
        convert_config(mixed)


def _changed(*path, value=None, delete=False):
    source = read_original_config(original())
    target = source["model"]["params"]
    for part in path[:-1]:
        target = target[part]
    if delete:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return source


BAD = {
    "no model": ({"data": {}}, "no `model` section"),
    "no encoder": (_changed("encoder_config", delete=True), "encoder_config with a `target` is missing"),
    "unresolved": (_changed("decoder_config", "params", value="${gone}"), "is not a mapping"),
    "unknown engine key": (_changed("diffusion", value=1), "model.params: unknown keys diffusion"),
    "unknown network keys": (
        _changed("encoder_config", "params", "zeta", value=1),
        "encoder_config.params: unknown keys zeta",
    ),
    "unknown regularizer key": (
        _changed("regularizer_config", "params", value={"temperature": 1}),
        "regularizer_config.params: unknown keys temperature",
    ),
    "unknown regularizer": (_changed("regularizer_config", "target", value="a.VQ"), "unknown regularizer 'a.VQ'"),
    "tanh": (_changed("decoder_config", "params", "tanh_out", value=True), "tanh_out = True; only False is supported"),
    "padding": (_changed("encoder_config", "params", "init_pad_mode", value="constant"), "init_pad_mode = 'constant'"),
    "widths differ": (
        _changed("decoder_config", "params", "ch", value=64),
        "ch is 128 in the encoder, 64 in the decoder",
    ),
    "no width": (
        _changed("encoder_config", "params", "ch", delete=True),
        "encoder_config.params.ch must be an integer",
    ),
    "double_z": (_changed("encoder_config", "params", "double_z", value=False), "contradicts the regularizer"),
    "factor": (_changed("encoder_config", "params", "tempo_ds", value=[1]), "temporal_compression_ratio"),
    "norm": (original(norm_type="batchnorm"), "norm_type"),
    "fsq channels": (original(levels=[8] * 4, z_channels=5), "z_channels is 5, but FSQ has the levels"),
    "interpolation": (original(**{**V1_1, "interpolation_mode": "cubic"}), "unknown interpolation_mode 'cubic'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations(name):
    source, message = BAD[name]
    with pytest.raises(CheckpointError) as caught:
        convert_config(source)
    assert message in str(caught.value)


# -------------------------------------------------------------------------------------------------------- end to end

TINY = {"ch": 4, "num_res_blocks": 1, "ch_mult": [1, 2, 3, 3]}
KINDS = {
    "v1.0 KL": original(**TINY),
    "v1.1 FSQ": original(**V1_1, **TINY, levels=[8, 5]),
    "non-causal KL": original(network="model_3dnoncausal", **TINY),
}


def make_checkpoint(kind="v1.0 KL"):
    """(weights, training state) with the original names."""
    torch.manual_seed(1)
    model = VidTokModel(convert_config(KINDS[kind]))
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    training = {
        "loss.logvar": torch.tensor(0.25),
        "loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4),
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(20001),
        "loss.perceptual_loss.lin0.model.1.weight": torch.randn(1, 4, 1, 1),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.encoderconv_inconvbias": torch.randn(4),
    }
    return weights, training


@pytest.fixture
def checkpoint(tmp_path):
    weights, training = make_checkpoint()
    path = tmp_path / "fine_tuned.ckpt"
    torch.save(
        {"state_dict": {**weights, **training}, "optimizer_states": [{"state": {}}], "global_step": 7, "epoch": 1}, path
    )
    return path


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name in expected:
        assert tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_converted_folders_load(tmp_path, kind):
    weights, training = make_checkpoint(kind)
    torch.save({"state_dict": {**weights, **training}}, tmp_path / "x.ckpt")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(KINDS[kind]))
    output = convert_checkpoint("vidtok", tmp_path / "x.ckpt", tmp_path / "out", original_config=tmp_path / "x.yaml")
    assert output == tmp_path / "out"
    names = {path.name for path in output.iterdir()}
    processor_file = names - {"README.md", "config.json", "conversion.json", "model.safetensors"}
    assert len(names) == 5 and len(processor_file) == 1 and "preprocessor_config.json" in processor_file.pop()
    model, info = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model, VidTokModel)
    assert_same(model.state_dict(), weights)
    assert model.config.version == {"v1.0 KL": "1.0", "v1.1 FSQ": "1.1", "non-causal KL": None}[kind]
    names = state_dict_names("vidtok", "model", model.config)
    assert_same(names.from_hf(model.state_dict()), weights)
    processor = AutoVideoProcessor.from_pretrained(output)
    assert processor.size == {"shortest_edge": 256}
    card = ModelCard.load(output / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "cinetok" and 'from_pretrained("out")' in card.text
    report = json.loads((output / "conversion.json").read_text())
    assert report["left_out"] == {"loss.*": 4, "model_ema.*": 2} and report["converted_tensors"] == len(weights)


def test_converted_folder_loads_in_a_fresh_process(tmp_path, checkpoint):
    output = convert_checkpoint("vidtok", checkpoint, tmp_path / "out", original_config=KINDS["v1.0 KL"])
    script = (
        "import sys, torch, cinetok\nfrom transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, sum(v.double().sum().item() for v in model.state_dict().values()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(output)], capture_output=True, text=True, timeout=180, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr
    name, total = result.stdout.split()
    assert name == "VidTokModel"
    assert float(total) == pytest.approx(sum(v.double().sum().item() for v in make_checkpoint()[0].values()))


def test_training_state_is_kept_when_asked_for(tmp_path, checkpoint):
    source = KINDS["v1.0 KL"]
    output = convert_checkpoint(
        "vidtok", checkpoint, tmp_path / "out", original_config=source, keep_training_state=True
    )
    assert_same(load_file(output / "training_state.safetensors"), make_checkpoint()[1])
    assert_same(AutoModel.from_pretrained(output).state_dict(), make_checkpoint()[0])
    report = json.loads((output / "conversion.json").read_text())
    assert report["left_out"] == {} and report["training_state"] == "training_state.safetensors"
    assert report["left_out_entries"] == ["epoch", "global_step", "optimizer_states"]
    torch.save(make_checkpoint()[0], tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="holds no training state"):
        convert_checkpoint(
            "vidtok", tmp_path / "plain.pt", tmp_path / "out2", original_config=source, keep_training_state=True
        )
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("form", ["safetensors", "bare", "module.", "compiled", "shards", "sharded folder"])
def test_other_forms_of_the_same_checkpoint(tmp_path, form):
    weights, training = make_checkpoint()
    source = tmp_path / "source"
    source.mkdir()
    checkpoint = source / "x.ckpt"
    half = dict(list(weights.items())[::2])
    rest = {name: value for name, value in weights.items() if name not in half}
    if form == "safetensors":
        checkpoint = source / "x.safetensors"
        save_file(weights, checkpoint)
    elif form == "bare":
        torch.save(weights, checkpoint)
    elif form == "module.":
        torch.save({"module": {f"module.{n}": v for n, v in {**weights, **training}.items()}}, checkpoint)
    elif form == "compiled":
        renamed = {
            n.replace("encoder.", "encoder._orig_mod.").replace("decoder.", "decoder._orig_mod."): v
            for n, v in weights.items()
        }
        torch.save({"state_dict": renamed}, checkpoint)
    else:
        save_file(half, source / "1.safetensors")
        save_file({**rest, **training}, source / "2.safetensors")
        checkpoint = source if form == "sharded folder" else [source / "1.safetensors", source / "2.safetensors"]
    output = convert_checkpoint("vidtok", checkpoint, tmp_path / "out", original_config=KINDS["v1.0 KL"])
    assert_same(AutoModel.from_pretrained(output).state_dict(), weights)


def test_half_precision_is_kept(tmp_path):
    weights = {name: value.half() for name, value in make_checkpoint()[0].items()}
    torch.save(weights, tmp_path / "x.pt")
    output = convert_checkpoint("vidtok", tmp_path / "x.pt", tmp_path / "out", original_config=KINDS["v1.0 KL"])
    assert_same(load_file(output / "model.safetensors"), weights)


def _fails(tmp_path, match, **arguments):
    before = sorted(path.name for path in tmp_path.iterdir())
    error = arguments.pop("error", CheckpointError)
    with pytest.raises(error, match=match):
        convert_checkpoint("vidtok", output=tmp_path / "out", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_failures_name_the_reason_and_leave_nothing(tmp_path, checkpoint):
    tiny = KINDS["v1.0 KL"]
    _fails(tmp_path, "exactly one", checkpoint=checkpoint, error=ValueError)
    _fails(tmp_path, "exactly one", checkpoint=checkpoint, release="x", original_config=tiny, error=ValueError)
    _fails(
        tmp_path, "did you mean vidtok_kl_causal_488_4chn", checkpoint=checkpoint, release="vidtok_kl_causal_488_4ch"
    )
    _fails(tmp_path, "no such checkpoint", checkpoint=tmp_path / "none.ckpt", original_config=tiny)
    _fails(tmp_path, "no such configuration", checkpoint=checkpoint, original_config=tmp_path / "none.yaml")
    _fails(
        tmp_path,
        r"(?s)fine_tuned\.ckpt as vidtok_kl_causal_488_4chn.*missing.*of another shape: .*instead of",
        checkpoint=checkpoint,
        release="vidtok_kl_causal_488_4chn",
    )
    _fails(tmp_path, "missing.*unexpected", checkpoint=checkpoint, original_config=KINDS["non-causal KL"])
    _fails(
        tmp_path,
        "known version",
        checkpoint=checkpoint,
        release="vidtok_kl_causal_488_4chn",
        version="1.0",
        error=ValueError,
    )
    with pytest.raises(ValueError, match="unknown system"):
        convert_checkpoint("vidtoc", checkpoint, tmp_path / "out", original_config=tiny)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    _fails(tmp_path, "already exists", checkpoint=checkpoint, original_config=tiny)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "nan"])
def test_damaged_checkpoints(tmp_path, damage):
    weights, training = make_checkpoint()
    name = "decoder.conv_out.conv.weight"
    if damage == "missing":
        del weights[name]
        message = f"1 missing: {name}"
    elif damage == "extra":
        weights["encoder.quant_conv.weight"] = torch.ones(1)
        message = r"1 unexpected: encoder\.quant_conv\.weight"
    elif damage == "shape":
        weights[name] = weights[name][:, :2]
        message = rf"1 of another shape: {name} \(3, 2, 3, 3, 3\) instead of \(3, 4, 3, 3, 3\)"
    else:
        weights[name].view(-1)[5] = float("nan")
        message = f"1 with NaN or infinite values: {name}"
    torch.save({"state_dict": {**weights, **training}}, tmp_path / "x.ckpt")
    _fails(tmp_path, message, checkpoint=tmp_path / "x.ckpt", original_config=KINDS["v1.0 KL"])


def test_converting_with_the_release_uses_its_configuration(tmp_path, monkeypatch):
    """A whole release is too large for a test, so its table entry is made small."""
    import dataclasses

    from cinetok.conversion import vidtok

    name = "vidtok_fsq_causal_488_32768_v1_1"
    small = dataclasses.replace(
        find_release(name), config={**find_release(name).config, "base_channels": 4, "num_res_blocks": 1}
    )
    monkeypatch.setattr(vidtok, "RELEASES", (small,))
    weights = VidTokModel(VidTokConfig(**small.config)).state_dict()
    torch.save({"state_dict": {**weights, "loss.logvar": torch.zeros(())}}, tmp_path / "x.ckpt")
    output = convert_checkpoint("vidtok", tmp_path / "x.ckpt", tmp_path / name, release=name)
    model = AutoModel.from_pretrained(output)
    assert_same(model.state_dict(), weights)
    assert model.config.version == "1.1" and model.config.regularizer == "fsq" and model.config.fsq_levels == [8] * 5
    assert json.loads((output / "conversion.json").read_text())["release"] == name
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "mit" and card.data.eval_results and f'from_pretrained("{name}")' in card.text


def _recorded_models():
    folders = [
        Path(__file__).parent / "goldens" / "vidtok",
        Path(__file__).resolve().parents[2] / "shared/goldens/vidtok",
    ]
    found = []
    for folder, marks in zip(folders, ((), (pytest.mark.shared,))):
        for config in sorted(folder.glob("*/config.json")):
            if "encoder_config" in json.loads(config.read_text()).get("params", {}):
                name = f"{'shared-' if marks else ''}{config.parent.name}"
                found.append(pytest.param(config.parent, id=name, marks=marks))
    return found


@pytest.mark.parametrize("folder", _recorded_models())
def test_recorded_models_convert(tmp_path, folder):
    """The original code's own configuration files and weights, wrapped as a training checkpoint."""
    case = GoldenCase(folder)
    weights = {
        name: value.float() for name, value in case.weights(case.spec.get("weights", "weights.safetensors")).items()
    }
    torch.save({"state_dict": {**weights, **make_checkpoint()[1]}, "epoch": 1}, tmp_path / "x.ckpt")
    output = convert_checkpoint(
        "vidtok",
        tmp_path / "x.ckpt",
        tmp_path / "out",
        original_config=folder / "config.json",
        keep_training_state=True,
    )
    model = AutoModel.from_pretrained(output)
    assert_same(model.state_dict(), weights)
    assert_same(load_file(output / "training_state.safetensors"), make_checkpoint()[1])
    assert model.config.is_causal is ("noncausal" not in json.dumps(json.loads((folder / "config.json").read_text())))
