"""VidTok: shapes and padding, streaming, tiling, quantizer, files, and every kind of bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from cinetok import TokenFileError, VideoReadError, VidTokConfig, VidTokModel, read_video, write_video
from cinetok.modeling.tiling import run_tiled, tile_starts
from cinetok.modeling.vidtok.regularizers_vidtok import FiniteScalarQuantizer
from cinetok.modeling.vidtok.streaming_vidtok import VidTokTokens

TINY = {"base_channels": 8, "channel_multipliers": [1, 2, 2, 2], "num_res_blocks": 1}
KINDS = {
    "v1.0": {"version": "1.0"},
    "v1.1": {"version": "1.1"},
    "v1.1-nearest": {"version": "1.1", "temporal_interpolation": "nearest"},
    "v1.1-fsq": {"version": "1.1", "regularizer": "fsq", "fsq_levels": [8, 8, 5, 7]},
    "v1.1-888": {
        "version": "1.1",
        "temporal_compression_ratio": 8,
        "temporal_downsample_levels": [0, 1, 2],
        "temporal_upsample_levels": [1, 2, 3],
    },
    "v1.1-288": {
        "version": "1.1",
        "temporal_compression_ratio": 2,
        "temporal_downsample_levels": [1],
        "temporal_upsample_levels": [2],
    },
    "noncausal": {"is_causal": False},
}
CAUSAL = [name for name in KINDS if name != "noncausal"]


def build(name="v1.1", **changes):
    """A tiny model with weights that make every part matter (the temporal blocks start as identities otherwise)."""
    torch.manual_seed(0)
    model = VidTokModel(VidTokConfig(**{**TINY, **KINDS[name], **changes}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "mix_factor" in key:
                parameter.fill_(0.3)
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def clip(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def frames_of(num_frames, height=20, width=34, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def lossless(path, frames, fps=25):
    return write_video(path, frames, fps, codec="ffv1", pixel_format="bgr0")


# ---------------------------------------------------------------------------------------------- shapes, padding


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 3, 16, 16), (2, 5, 3, 13, 19), (1, 16, 3, 8, 24), (1, 18, 3, 16, 8)])
def test_any_size_and_length_round_trips(name, shape):
    model = build(name)
    with torch.no_grad():
        output = model(clip(*shape))
        encoded = model.encode(clip(*shape))
    assert output.reconstruction.shape == shape
    assert (encoded.num_frames, encoded.height, encoded.width) == (shape[1], shape[3], shape[4])
    ratio = model.config.spatial_compression_ratio
    assert encoded.latents.shape[3:] == (-(-shape[3] // ratio), -(-shape[4] // ratio))


def test_official_padding_of_v1_0_keeps_the_authors_frame_counts():
    model = build("v1.0")
    with torch.no_grad():
        for frames, latent_frames, decoded in ((16, 4, 13), (17, 5, 17), (18, 5, 17), (1, 1, 1)):
            latents = model.encode(clip(1, frames, 3, 8, 8), official_padding=True).latents
            assert latents.shape[2] == latent_frames
            assert model.decode(latents).reconstruction.shape[1] == decoded


def test_gradient_path_equals_inference_path():
    for name in KINDS:
        model, video = build(name), clip(2, 17, 3, 16, 16)
        with torch.no_grad():
            expected = model(video, sample_posterior=False).reconstruction
        torch.testing.assert_close(model(video, sample_posterior=False).reconstruction, expected, atol=1e-5, rtol=1e-4)


def test_inference_leaves_its_input_alone():
    model, video = build(), clip(1, 9, 3, 16, 16)
    copy = video.clone()
    with torch.no_grad():
        latents = model.encode(video).latents
        before = latents.clone()
        model.decode(latents)
    assert torch.equal(video, copy) and torch.equal(latents, before)


def test_blocks_keep_their_input_while_training_without_gradients():
    """Reentrant gradient checkpointing runs blocks with gradients off and their inputs again later."""
    model = build("v1.1").train()
    hidden_states = clip(5, 1, 8, 8, 8)
    copy = hidden_states.clone()
    with torch.no_grad():
        model.encoder.down[0].block[0](hidden_states)
        model.encoder.down_temporal[0].block[0](hidden_states)
    assert torch.equal(hidden_states, copy)


def test_causality():
    """A later frame never changes earlier latents, and changes later ones."""
    for name in ("v1.0", "v1.1"):
        model, video = build(name), clip(1, 17, 3, 16, 16)
        changed = video.clone()
        changed[:, 9:] = -changed[:, 9:]
        with torch.no_grad():
            first, second = model.encode(video).latents, model.encode(changed).latents
        assert torch.equal(first[:, :, :3], second[:, :, :3])
        assert not torch.allclose(first[:, :, 3:], second[:, :, 3:], atol=1e-3)


def test_sampling_follows_the_generator():
    model, video = build(), clip(1, 5, 3, 16, 16)

    def sample(seed):
        return model.encode(video, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).latents

    with torch.no_grad():
        assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
        assert torch.equal(model.encode(video).latents, model.encode(video).posterior.mean)


# ---------------------------------------------------------------------------------------------------- streaming


def stream_encode(model, video, parts, **first):
    cache, latents, start = None, [], 0
    for i, length in enumerate(parts):
        output = model.encode(
            video[:, start : start + length], cache=cache, use_cache=True, is_last=i == len(parts) - 1, **first
        )
        cache, start = output.cache, start + length
        latents.append(output.latents)
    assert start == video.shape[1]
    return torch.cat(latents, dim=2)


def stream_decode(model, latents, parts):
    cache, frames, start = None, [], 0
    for i, length in enumerate(parts):
        output = model.decode(
            latents[:, :, start : start + length], cache=cache, use_cache=True, is_last=i == len(parts) - 1
        )
        cache, start = output.cache, start + length
        frames.append(output.reconstruction)
    assert start == latents.shape[2]
    return torch.cat(frames, dim=1)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("parts", [[17, 16], [1, 16, 16], [9, 5, 3, 16], [1] * 33])
def test_streamed_encoding_is_whole_clip_encoding(name, parts):
    model, video = build(name), clip(2, 33, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(stream_encode(model, video, parts), model.encode(video).latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_streamed_decoding_is_whole_clip_decoding(name):
    model = build(name)
    with torch.no_grad():
        latents = model.encode(clip(2, 33, 3, 16, 24)).latents
        expected = model.decode(latents).reconstruction
        count = latents.shape[2]
        for parts in ([1] * count, [2, 1, count - 3], [count]):
            torch.testing.assert_close(stream_decode(model, latents, parts), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [16, 18, 31])
def test_any_chunks_work_when_the_length_is_announced(num_frames):
    video = clip(1, num_frames, 3, 8, 8)
    parts = [6, 5, num_frames - 11]
    with torch.no_grad():
        for name in ("v1.0", "v1.1"):
            model = build(name)
            streamed = stream_encode(model, video, parts, num_frames=num_frames)
            torch.testing.assert_close(streamed, model.encode(video).latents, atol=1e-5, rtol=0)


def test_a_stream_that_does_not_fit_its_first_chunk_says_what_to_do():
    model = build("v1.1")
    with torch.no_grad(), pytest.raises(ValueError, match="num_frames=17"):
        stream_encode(model, clip(1, 17, 3, 8, 8), [8, 9])


def test_the_cache_is_not_changed_by_using_it():
    model, video = build("v1.1"), clip(1, 17, 3, 8, 8)
    with torch.no_grad():
        cache = model.encode(video[:, :9], use_cache=True, is_last=False).cache
        again = [model.encode(video[:, 9:], cache=cache, use_cache=True).latents for _ in range(2)]
    assert torch.equal(*again)


def test_long_clips_run_in_chunks_with_the_same_result(monkeypatch):
    model, video = build("v1.1"), clip(1, 33, 3, 16, 16)
    with torch.no_grad():
        expected = model(video).reconstruction
        monkeypatch.setattr("cinetok.modeling.vidtok.modeling_vidtok._CHUNK_ELEMENTS", 1)
        monkeypatch.setattr("cinetok.modeling.vidtok.layers_vidtok.SLICE_ELEMENTS", 1)
        torch.testing.assert_close(model(video).reconstruction, expected, atol=1e-5, rtol=0)


def test_official_streaming_differs_from_whole_clip_only_after_the_first_chunk():
    model, video = build("v1.1"), clip(1, 33, 3, 8, 8)
    with torch.no_grad():
        encoded = model.encode(video, streaming="official", chunk_frames=16)
        torch.testing.assert_close(encoded.latents, model.encode(video).latents, atol=1e-5, rtol=0)
        whole = model.decode(encoded.latents).reconstruction
        official = model.decode(encoded.latents, streaming="official", chunk_frames=16, overlap=True).reconstruction
        hard = model.decode(encoded.latents, streaming="official", chunk_frames=16, overlap=False).reconstruction
    assert official.shape == whole.shape == hard.shape
    torch.testing.assert_close(official[:, :4], whole[:, :4], atol=1e-5, rtol=0)
    assert not torch.allclose(official, whole, atol=1e-4) and not torch.allclose(hard, official, atol=1e-4)


@pytest.mark.parametrize("name", ["v1.0", "noncausal"])
def test_reconstruction_in_independent_chunks(name):
    model, video = build(name), clip(1, 39, 3, 8, 8)
    with torch.no_grad():
        frames = model.reconstruct_in_chunks(video).reconstruction
        step = 17 if name == "v1.0" else 16
        torch.testing.assert_close(frames[:, :step], model(video[:, :step]).reconstruction, atol=1e-5, rtol=0)
        assert frames.shape == video.shape
        if name == "v1.0":
            continued = model.reconstruct_in_chunks(video, pad_gen_frames=True).reconstruction
            assert continued.shape == video.shape
            assert torch.equal(continued[:, :17], frames[:, :17]) and not torch.equal(continued, frames)


# ------------------------------------------------------------------------------------------------------- tiling


def test_tiles_cover_an_axis_with_equal_sizes():
    assert tile_starts(64, 64, 16) == [0] and tile_starts(40, 64, 16) == [0]
    for length, tile, overlap in ((100, 32, 8), (65, 64, 16), (96, 32, 0)):
        starts = tile_starts(length, tile, overlap)
        assert starts[0] == 0 and starts[-1] == length - tile
        assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:]))


def test_blending_reproduces_what_does_not_depend_on_the_tile():
    image = clip(2, 3, 21, 37)
    result, states = run_tiled(lambda tile, state: (tile * 2, (state or 0) + 1), image, 8, 4, (1, 1))
    torch.testing.assert_close(result, image * 2)
    again, states = run_tiled(lambda tile, state: (tile * 2, state + 1), image, 8, 4, (1, 1), states)
    assert set(states) == {2}


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "v1.1-fsq", "noncausal"])
def test_tiled_results_are_close_and_stream(name):
    model, video = build(name), clip(1, 9, 3, 48, 80)
    tiles = {"tile_size": 32, "tile_overlap": 16}
    with torch.no_grad():
        encoded = model.encode(video, **tiles)
        assert encoded.latents.shape == model.encode(video).latents.shape
        decoded = model.decode(encoded.latents, num_frames=9, **tiles).reconstruction
        assert decoded.shape == video.shape
        if model.config.is_causal:
            torch.testing.assert_close(stream_encode(model, video, [5, 4], **tiles), encoded.latents, atol=1e-5, rtol=0)
    one_tile = model.encode(video[..., :32, :32], tile_size=32).latents
    torch.testing.assert_close(one_tile, model.encode(video[..., :32, :32]).latents, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- quantizer


def test_indices_and_codes_are_inverse():
    quantizer = FiniteScalarQuantizer([8, 5, 7])
    indices = torch.arange(8 * 5 * 7)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert codes[:8, 0].tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]  # channel 0 is the lowest digit


def test_decoding_indices_is_decoding_codes():
    model = build("v1.1-fsq")
    with torch.no_grad():
        encoded = model.encode(clip(1, 5, 3, 16, 16))
        expected = model.decode(encoded.latents).reconstruction
        assert torch.equal(model.decode(indices=encoded.indices.to(torch.int32)).reconstruction, expected)


def test_entropy_loss_in_blocks_equals_one_block_and_has_the_same_gradient(monkeypatch):
    quantizer = FiniteScalarQuantizer([8, 8, 8], 0.1, 2000, 3.0, 0.25)
    results = []
    for elements in (2**30, 512 * 5):
        monkeypatch.setattr("cinetok.modeling.vidtok.regularizers_vidtok._ENTROPY_ELEMENTS", elements)
        latents = (clip(2, 3, 2, 4, 3) * 0.02).requires_grad_()
        loss = quantizer.aux_loss(latents, quantizer(latents)[0], 100)
        results.append((loss, torch.autograd.grad(loss, latents)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_auxiliary_loss_only_when_training_or_asked_for():
    model, video = build("v1.1-fsq"), clip(1, 5, 3, 16, 16)
    with torch.no_grad():
        assert model(video).aux_loss is None
        asked = model(video, compute_aux_loss=True)
    assert asked.loss > asked.reconstruction_loss or asked.aux_loss < 0
    assert model.train()(video).aux_loss is not None


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "v1.1-fsq", "noncausal"])
@pytest.mark.parametrize("num_frames", [1, 18, 33])
def test_file_to_file(name, num_frames, tmp_path):
    model, frames = build(name), frames_of(num_frames)
    source = lossless(tmp_path / "in.mkv", frames)
    tokens = model.encode_video(source, chunk_frames=8)
    path = tokens.save(tmp_path / "tokens.safetensors")
    out = model.decode_to_file(path, tmp_path / "out.mkv", codec="ffv1", pixel_format="bgr0")
    result = read_video(out)
    assert result.frames.shape == frames.shape and result.fps == 25
    if model.config.is_causal:  # exactly what the whole clip gives
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 127.5 - 1
        with torch.no_grad():
            expected = model(video, return_loss=False).reconstruction.clamp(-1, 1)
        expected = ((expected + 1) / 2 * 255).to(torch.uint8)[0].permute(0, 2, 3, 1).numpy()
        assert np.abs(result.frames.astype(int) - expected).max() <= 1


def test_an_iterator_of_unknown_length_is_encoded_whole():
    model, frames = build("v1.1"), frames_of(30)
    tokens = model.encode_video((frames[i : i + 7] for i in range(0, 30, 7)), chunk_frames=8, fps=10)
    decoded = torch.cat(list(model.decode_frames(tokens)), dim=1)
    assert decoded.shape == (1, 30, 3, 20, 34)
    known = model.encode_video((frames[i : i + 7] for i in range(0, 30, 7)), chunk_frames=8, fps=10, num_frames=30)
    whole = model.encode_video(frames, fps=10)
    torch.testing.assert_close(known.latents, whole.latents, atol=1e-5, rtol=0)


def test_token_file_errors(tmp_path):
    model = build("v1.1")
    tokens = model.encode_video(frames_of(5), fps=5)
    path = tokens.save(tmp_path / "a.safetensors")
    with pytest.raises(TokenFileError, match="another model"):
        list(build("v1.1", latent_channels=3).decode_frames(VidTokTokens.load(path)))
    (tmp_path / "garbage.safetensors").write_bytes(b"no tokens in here")
    with pytest.raises(TokenFileError, match="garbage"):
        VidTokTokens.load(tmp_path / "garbage.safetensors")
    with pytest.raises(TokenFileError, match="no such file"):
        VidTokTokens.load(tmp_path / "missing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TokenFileError):
        VidTokTokens.load(tmp_path / "cut.safetensors")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(TokenFileError, match="not a file of VidTok tokens"):
        VidTokTokens.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        tokens.save(tmp_path / "no" / "folder.safetensors")
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_a_truncated_video_leaves_nothing_behind(tmp_path):
    path = lossless(tmp_path / "in.mkv", frames_of(30, 64, 64))
    (tmp_path / "cut.mkv").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoReadError, match=r"cut\.mkv"):
        build("v1.0").encode_video(tmp_path / "cut.mkv")


MEMORY = """
import json, sys, resource, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_vidtok import build
from cinetok import write_video
import numpy as np
def pieces(count):
    random = np.random.default_rng(0)
    for _ in range(count // 20):
        yield random.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
def run(count):
    folder = Path(sys.argv[2])
    model.decode_to_file(model.encode_video(folder / f"{count}.mp4"), folder / "out.mp4")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = build("v1.1")
for count in (20, 100, 500):
    write_video(Path(sys.argv[2]) / f"{count}.mp4", pieces(count), 25)
run(20)
print(json.dumps([run(100), run(500)]))
"""


def test_memory_does_not_grow_with_the_length_of_the_video(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(__import__("pathlib").Path(__file__).parent), str(tmp_path)]
    short, long = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert long <= short * 1.08  # whole clips would hold 400 more frames and their feature maps: 200 MB and more


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8), TypeError, "VidTokVideoProcessor"),
        (np.zeros((1, 5, 3, 16, 16), "f4"), TypeError, "floating-point tensor"),
        (torch.zeros(5, 3, 16, 16), ValueError, "batch, num_frames"),
        (torch.zeros(1, 3, 5, 16, 16), ValueError, "3 channels"),
        (torch.zeros(1, 0, 3, 16, 16), ValueError, "empty"),
        (torch.full((1, 5, 3, 16, 16), 255.0), ValueError, "255"),
        (torch.full((1, 5, 3, 16, 16), float("nan")), ValueError, "finite"),
        (torch.full((1, 5, 3, 16, 16), float("inf")), ValueError, "finite"),
    ],
)
def test_bad_videos(video, error, message):
    with pytest.raises(error, match=message):
        build().encode(video)


def test_bad_latents_and_indices():
    kl, fsq = build("v1.1"), build("v1.1-fsq")
    with pytest.raises(ValueError, match="exactly one"):
        kl.decode()
    with pytest.raises(ValueError, match="KL model"):
        kl.decode(indices=torch.zeros(1, 2, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 channels"):
        kl.decode(torch.zeros(1, 5, 2, 2, 2))
    with pytest.raises(ValueError, match="NaN"):
        kl.decode(torch.full((1, 4, 2, 2, 2), float("nan")))
    for value in (-1, 8 * 8 * 5 * 7):
        with pytest.raises(ValueError, match="another model"):
            fsq.decode(indices=torch.full((1, 2, 2, 2), value))
    with pytest.raises(ValueError, match="integers"):
        fsq.decode(indices=torch.zeros(1, 2, 2, 2))
    latents = torch.zeros(1, 4, 2, 2, 2)
    for trim in ({"num_frames": 9}, {"height": 17}, {"width": 0}):
        with pytest.raises(ValueError, match=next(iter(trim))):
            kl.decode(latents, **trim)


def test_bad_streams():
    model, video = build("v1.1"), clip(1, 9, 3, 16, 16)
    with torch.no_grad():
        cache = model.encode(video, use_cache=True, is_last=False).cache
    with pytest.raises(ValueError, match="would lose"):
        model.encode(video, is_last=False)
    with pytest.raises(ValueError, match="stream that encodes"):
        model.encode(clip(2, 4, 3, 16, 16), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="stream that encodes"):
        model.decode(torch.zeros(1, 4, 1, 2, 2), cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="non-causal"):
        build("noncausal").encode(video, use_cache=True)
    with pytest.raises(ValueError, match=r"v1\.1's mode"):
        build("v1.0").encode(video, streaming="official")
    with pytest.raises(ValueError, match="multiple of 4"):
        model.encode(video, streaming="official", chunk_frames=6)
    with pytest.raises(ValueError, match="streaming must be"):
        model.encode(video, streaming="exact")
    with pytest.raises(ValueError, match="tile_overlap"):
        model.encode(video, tile_size=16, tile_overlap=16)
    with pytest.raises(ValueError, match="multiple of 8"):
        model.encode(video, tile_size=12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "version"),
        ({"version": "2.0"}, "version"),
        ({"version": "1.1", "regularizer": "vq"}, "regularizer"),
        ({"version": "1.1", "regularizer": "fsq"}, "fsq_levels"),
        ({"version": "1.1", "regularizer": "fsq", "fsq_levels": [8, 8]}, "fsq_levels"),
        ({"version": "1.1", "temporal_compression_ratio": 8}, "temporal_compression_ratio"),
        ({"version": "1.1", "spatial_downsample_levels": [0, 1, 9]}, "levels outside"),
        ({"version": "1.1", "norm_type": "groupnorm", "base_channels": 8}, "32 groups"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        VidTokConfig(**arguments)
