"""VidTok and diffusers' `AutoencoderVidTok`: configurations and weights move both ways and compute the same."""

import pytest
import torch
from diffusers import AutoencoderVidTok

from cinetok import CheckpointError, VidTokConfig, VidTokModel
from cinetok.conversion import releases
from cinetok.conversion.vidtok_diffusers import config_from_diffusers, config_to_diffusers

SMALL = {"ch": 4, "num_res_blocks": 1, "ch_mult": [1, 2, 3, 3]}
DIFFUSERS = {
    "causal KL 488": {**SMALL},
    "causal KL 288": {**SMALL, "z_channels": 8, "tempo_ds": [1], "tempo_us": [2]},
    "causal KL 444": {**SMALL, "spatial_ds": [1, 2], "spatial_us": [1, 2]},
    "causal FSQ 41616": {
        **SMALL,
        "ch_mult": [1, 2, 2, 2, 3],
        "z_channels": 3,
        "double_z": False,
        "regularizer": "fsq",
        "codebook_size": 512,
    },
    "non-causal KL 488": {**SMALL, "is_causal": False},
    "non-causal FSQ 488": {
        **SMALL,
        "is_causal": False,
        "z_channels": 2,
        "double_z": False,
        "regularizer": "fsq",
        "codebook_size": 64,
    },
}


def make_theirs(name):
    torch.manual_seed(3)
    theirs = AutoencoderVidTok(**DIFFUSERS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # nothing stays at zero, where paths would not show
    return theirs


def video(model):
    num_frames = 9 if model.config.is_causal else 8
    return torch.rand(1, num_frames, 3, 16, 32) * 2 - 1


@torch.no_grad()
def assert_same_results(ours, theirs):
    pixels = video(ours)
    if theirs.config.regularizer == "fsq":
        # their encode() quantizes already; the second entry holds the indices
        latents, indices = theirs.regularization(theirs.encoder(_padded(pixels, ours)))
        encoded = ours.encode(pixels)
        assert torch.equal(encoded.indices.long(), indices.long())
    else:
        latents = theirs.encoder(_padded(pixels, ours)).chunk(2, dim=1)[0]
        encoded = ours.encode(pixels)
    assert_close(encoded.latents, latents)
    frames = ours.decode(latents=latents).reconstruction
    expected = theirs.decoder(latents).transpose(1, 2)
    assert expected.std() > 1e-3
    assert_close(frames, expected[:, -frames.shape[1] :])


def assert_close(value, expected):
    # Normalising over 4 channels blows rounding up where they happen to be equal: single elements may be further off.
    difference = (value - expected).abs()
    assert value.shape == expected.shape and difference.max() < 1e-3 and difference.mean() < 3e-6


def _padded(pixels, ours):
    """(batch, channels, frames, ...), the first frame repeated in front up to a multiple of the temporal ratio."""
    pixels = pixels.transpose(1, 2)
    missing = -pixels.shape[2] % ours.config.temporal_compression_ratio
    return torch.cat([pixels[:, :, :1].expand(-1, -1, missing, -1, -1), pixels], dim=2)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_from_diffusers(tmp_path, name):
    theirs = make_theirs(name)
    ours = VidTokModel.from_diffusers(theirs).eval()
    assert ours.config.version == ("1.1" if theirs.config.is_causal else None)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert_same_results(ours, theirs)
    theirs.save_pretrained(tmp_path)
    from_folder = VidTokModel.from_diffusers(tmp_path)
    assert from_folder.config.to_dict() == ours.config.to_dict()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in from_folder.state_dict().items())


@pytest.mark.parametrize("name", ["causal KL 488", "non-causal FSQ 488"])
def test_to_diffusers(tmp_path, name):
    ours = VidTokModel.from_diffusers(make_theirs(name)).eval()
    theirs = ours.to_diffusers().eval()
    assert isinstance(theirs, AutoencoderVidTok)
    assert_same_results(ours, theirs)
    ours.save_pretrained(tmp_path)
    again = VidTokModel.from_diffusers(VidTokModel.from_pretrained(tmp_path).to_diffusers())
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in again.state_dict().items())


def test_weights_are_copied_not_shared():
    theirs = make_theirs("causal KL 488")
    ours = VidTokModel.from_diffusers(theirs)
    before = ours.encoder.conv_in.conv.weight.clone()
    with torch.no_grad():
        theirs.encoder.conv_in.conv.weight.add_(1)
    assert torch.equal(ours.encoder.conv_in.conv.weight, before)


@pytest.mark.parametrize("release", releases("vidtok"), ids=lambda release: release.name)
def test_configurations_of_all_releases(release):
    config = VidTokConfig(**release.config)
    if config.version == "1.0":
        with pytest.raises(CheckpointError, match="version 1.0 of the causal code"):
            config_to_diffusers(config)
        return
    arguments = config_to_diffusers(config)
    assert config_from_diffusers(arguments).to_dict() == config.to_dict()
    if config.regularizer == "kl":  # the FSQ class computes its codebook while it is built, which meta tensors cannot
        with torch.device("meta"):
            theirs, ours = AutoencoderVidTok(**arguments), VidTokModel(config)
        assert {k: v.shape for k, v in theirs.state_dict().items()} == {
            k: v.shape for k, v in ours.state_dict().items()
        }
        assert config_from_diffusers(theirs.config).to_dict() == config.to_dict()


def test_v1_0_is_refused_by_the_model_too():
    config = VidTokConfig(version="1.0", base_channels=4, num_res_blocks=1)
    with pytest.raises(CheckpointError, match="version 1.0"):
        VidTokModel(config).to_diffusers()


def test_v1_0_weights_inside_a_diffusers_model():
    config = config_from_diffusers({}, version="1.0")
    assert config.version == "1.0" and config.base_channels == 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_type": "groupnorm", "base_channels": 32}, "norm_type 'groupnorm'"),
        ({"temporal_interpolation": "nearest"}, "temporal_interpolation 'nearest'"),
        ({"regularizer": "fsq", "fsq_levels": [8, 5], "latent_channels": 2}, "FSQ levels [8, 5]"),
    ],
)
def test_what_diffusers_cannot_represent(changes, reason):
    with pytest.raises(CheckpointError) as caught:
        config_to_diffusers(VidTokConfig(version="1.1", **changes))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "version", "error", "message"),
    [
        ({}, "2", ValueError, "version must be"),
        ({"regularizer": "fsq"}, None, CheckpointError, "contradicts double_z"),
        ({"regularizer": "vq"}, None, CheckpointError, "contradicts double_z"),
        ({"tempo_ds": [1]}, None, CheckpointError, "time 1 times, the decoder doubles them 3 and 2 times"),
    ],
)
def test_bad_diffusers_configurations(arguments, version, error, message):
    with pytest.raises(error, match=message):
        config_from_diffusers(arguments, version)
