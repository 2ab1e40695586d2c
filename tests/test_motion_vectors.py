"""Motion vectors of the codec, motion maps, clip selection, pictures of the field."""

import io

import av
import numpy as np
import PIL.Image
import pytest
import torch
from moving_clips import HEIGHT, WIDTH, moving_clip, moving_frames, write

from cinetok import VideoLavitMotionProcessor, VideoReadError, read_motion_vectors
from cinetok.video.motion import (
    MOTION_STD,
    MotionVectors,
    block_motion_map,
    clip_motion_map,
    dense_motion_map,
    render_motion,
    resize_motion,
    select_keyframes,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return moving_clip(tmp_path_factory.mktemp("clips"), 30)


# ------------------------------------------------------------------------------------------------------------ reading


def test_reencoding_gives_frame_types_tables_and_keyframes(clip):
    motion = read_motion_vectors(clip, fps=12)
    assert motion.frame_types == "IPPPPPPPPPPP" * 2 + "IPPPPP"
    assert (motion.height, motion.width, motion.fps, len(motion)) == (HEIGHT, WIDTH, 12.0, 30)
    assert motion.complete and motion.source == clip
    assert [len(table) for table in motion.vectors][:2] == [0, (HEIGHT // 16) * (WIDTH // 16)]
    assert sorted(motion.keyframes) == [0, 12, 24]
    differences = [np.abs(motion.keyframe(12).astype(int) - frame).mean() for frame in moving_frames(30)]
    assert int(np.argmin(differences)) == 12 and differences[12] < 20


def test_vectors_follow_the_motion(clip):
    motion = read_motion_vectors(clip, fps=12)
    tables = np.concatenate([t for t in motion.vectors if len(t)])
    inner = tables[
        (tables[:, 5] > 16) & (tables[:, 5] < WIDTH - 16) & (tables[:, 6] > 16) & (tables[:, 6] < HEIGHT - 16)
    ]
    displacement = np.median(inner[:, :1] * inner[:, 7:9] / inner[:, 9:10], axis=0)
    assert displacement.tolist() == [2.0, 1.0]
    assert (tables[:, 0] == -1).all() and (tables[:, 9] == 2).all()


def test_fps_halves_the_frames_and_doubles_the_motion(clip):
    motion = read_motion_vectors(clip, fps=6)
    assert motion.frame_types == "IPPPPPPPPPPPIPP" and motion.fps == 6.0
    tables = np.concatenate([t for t in motion.vectors if len(t)])
    inner = tables[
        (tables[:, 5] > 16) & (tables[:, 5] < WIDTH - 16) & (tables[:, 6] > 16) & (tables[:, 6] < HEIGHT - 16)
    ]
    assert np.median(inner[:, :1] * inner[:, 7:9] / inner[:, 9:10], axis=0).tolist() == [4.0, 2.0]


def test_result_is_repeatable_and_files_equal_file_objects(clip):
    first, second = read_motion_vectors(clip), read_motion_vectors(clip)
    with open(clip, "rb") as file:
        third = read_motion_vectors(io.BytesIO(file.read()))
    for other in (second, third):
        assert other.frame_types == first.frame_types
        assert all(np.array_equal(a, b) for a, b in zip(first.vectors, other.vectors))


def test_own_vectors_of_mpeg4_files_are_read_without_reencoding(tmp_path):
    path = write(str(tmp_path / "raw.m4v"), moving_frames(26), format="m4v")
    motion = read_motion_vectors(path, fps=None)
    assert motion.frame_types == "IPPPPPPPPPPP" * 2 + "IP"
    # The same stream the re-encoding makes, as the source and the encoder are the same.
    again = read_motion_vectors(path, fps=None)
    assert all(np.array_equal(a, b) for a, b in zip(motion.vectors, again.vectors))
    assert sum(len(t) for t in motion.vectors) > 0


def test_own_vectors_of_another_codec_are_refused(clip):
    with pytest.raises(VideoReadError, match=r"h264, not MPEG-4 Part 2; pass fps="):
        read_motion_vectors(clip, fps=None)


def test_range_in_seconds(clip):
    motion = read_motion_vectors(clip, fps=12, start=1.0, end=2.0)
    assert len(motion) == 12
    whole = read_motion_vectors(clip, fps=12)
    assert np.abs(motion.keyframe(0).astype(int) - whole.keyframe(12).astype(int)).mean() < 8


def test_scene_cut_adds_an_i_frame_that_no_clip_starts_at(tmp_path):
    frames = moving_frames(30) + [30 + f // 16 for f in moving_frames(42, step=(-1, 2), seed=9)]
    path = write(str(tmp_path / "cut.mp4"), frames, codec="libx264")
    motion = read_motion_vectors(path, fps=12)
    intra = [i for i, letter in enumerate(motion.frame_types) if letter == "I"]
    assert 30 in intra and intra[:3] == [0, 12, 24]
    assert 24 not in select_keyframes(motion.frame_types)
    clip = VideoLavitMotionProcessor(fps=12)(motion)
    assert all(motion.frame_types[s] == "I" for s in clip["clip_starts"][0])


@pytest.mark.parametrize("size", [(50, 70), (18, 34), (61, 83)])
def test_odd_sizes(tmp_path, size):
    frames = [f[: size[0], : size[1]] for f in moving_frames(14, height=size[0], width=size[1])]
    path = write(str(tmp_path / "odd.mkv"), frames, codec="ffv1", pix_fmt="yuv444p")
    motion = read_motion_vectors(path, fps=12)
    assert (motion.height, motion.width) == size and motion.keyframe(0).shape == (*size, 3)
    assert clip_motion_map(motion, 0).shape == (2, 24, 20, 36)


def test_too_large_a_picture_is_refused(tmp_path):
    frames = [np.zeros((16, 8208, 3), np.uint8)] * 2
    path = write(str(tmp_path / "wide.mkv"), frames, codec="ffv1")
    with pytest.raises(VideoReadError, match="8208x16 is too large for MPEG-4 Part 2"):
        read_motion_vectors(path, fps=12)


def test_one_frame_video(tmp_path):
    path = write(str(tmp_path / "one.mp4"), moving_frames(1), codec="libx264")
    motion = read_motion_vectors(path)
    assert motion.frame_types == "I"
    features = VideoLavitMotionProcessor()(path)
    assert features["clip_starts"] == [[0]] and features["motion_values"].abs().max() == 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_clip_shorter_than_half_a_frame_keeps_its_first_picture(tmp_path, count):
    frames = moving_frames(count)
    path = write(str(tmp_path / "blink.mp4"), frames, codec="libx264", fps=30)
    motion = read_motion_vectors(path)
    assert (motion.frame_types, motion.fps, len(motion.vectors[0])) == ("I", 6.0, 0)
    assert np.abs(motion.keyframe(0).astype(int) - frames[0]).mean() < 20
    features = VideoLavitMotionProcessor()(path)
    assert features["clip_starts"] == [[0]] and features["motion_values"].abs().max() == 0
    with pytest.raises(VideoReadError, match="no frames in the requested range"):
        read_motion_vectors(path, start=5.0)


def test_a_still_picture_is_a_clip_without_motion(tmp_path):
    path = tmp_path / "still.png"
    picture = moving_frames(1)[0]
    PIL.Image.fromarray(picture).save(path)
    motion = read_motion_vectors(path)
    assert motion.frame_types == "I" and np.abs(motion.keyframe(0).astype(int) - picture).mean() < 20
    clip = VideoLavitMotionProcessor().clip_for_reconstruction(path, 4, 6)
    assert clip.motion.shape == (2, 24, 4, 6) and clip.motion.abs().max() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"not a video at all" * 50, "not a readable video"), (b"", "not a readable video")],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "broken.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoReadError, match=f"broken.mp4.*{message}"):
        read_motion_vectors(path)


def test_truncated_file_raises_or_is_marked(tmp_path):
    path = str(tmp_path / "whole.mp4")
    frames = moving_frames(60, height=96, width=128)
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with open(path, "rb") as file:
        data = file.read()
    broken = tmp_path / "truncated.mp4"
    broken.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(VideoReadError, match="truncated.mp4"):
        read_motion_vectors(broken, fps=12)
    kept = read_motion_vectors(broken, fps=12, on_error="keep")
    assert not kept.complete and 0 < len(kept) < 60


def test_range_past_the_end_is_refused(clip):
    with pytest.raises(VideoReadError, match="no frames in the requested range"):
        read_motion_vectors(clip, start=100.0)


@pytest.mark.parametrize(
    "options",
    [{"fps": 0}, {"fps": -6}, {"fps": float("nan")}, {"start": -1.0}, {"start": 2.0, "end": 1.0}, {"on_error": "skip"},
     {"gop_size": 0}, {"num_threads": 0}],
)  # fmt: skip
def test_bad_arguments(clip, options):
    with pytest.raises(ValueError):
        read_motion_vectors(clip, **options)


def test_audio_only_file_is_refused(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(VideoReadError, match="no video stream"):
        read_motion_vectors(path)


def test_a_frame_that_is_no_keyframe_is_refused(clip):
    with pytest.raises(ValueError, match="frame 3 .* is no kept I-frame"):
        read_motion_vectors(clip).keyframe(3)


# --------------------------------------------------------------------------------------------------------------- maps


def random_table(count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    table = np.zeros((count, 10), np.int32)
    table[:, 0] = -1
    table[:, 5] = rng.integers(-5, width + 5, count)
    table[:, 6] = rng.integers(-5, height + 5, count)
    table[:, 7:9] = rng.integers(-40, 40, (count, 2))
    table[:, 9] = 2
    return table


def test_block_map_equals_pooling_the_dense_maps():
    height, width = 70, 50
    tables = [np.zeros((0, 10), np.int32)] + [random_table(60, height, width, seed=s) for s in range(23)]
    dense = torch.stack([torch.from_numpy(dense_motion_map(t, height, width)) for t in tables]).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(dense, (0, -width % 16, 0, -height % 16), value=-10000.0)
    pooled = torch.nn.functional.max_pool2d(padded, 16)
    pooled[pooled < -1000] = 0
    pooled[12] = (pooled[11] + pooled[13]) / 2
    ours = block_motion_map(tables, height, width)
    torch.testing.assert_close(ours, pooled.permute(1, 0, 2, 3))


def test_scales_and_direction():
    table = np.array([[-1, 16, 16, 0, 0, 8, 8, 10, -4, 2]], np.int32)
    scaled, raw = (dense_motion_map(table, 32, 64, rescale=r)[8, 8] for r in (True, False))
    np.testing.assert_allclose(raw, [-5 / 64 / MOTION_STD[0], 2 / 32 / MOTION_STD[1]], rtol=1e-5)
    np.testing.assert_allclose(scaled, raw * 10, rtol=1e-5)


def test_short_clips_are_padded_with_rest():
    table = random_table(40, 64, 64)
    maps = block_motion_map([np.zeros((0, 10), np.int32), table, table], 64, 64)
    assert maps.shape == (2, 24, 4, 4)
    assert maps[:, 1:3].abs().sum() > 0 and maps[:, 3:].abs().sum() == 0 and maps[:, 0].abs().sum() == 0


def test_resize_does_not_antialias():
    motion = torch.randn(2, 3, 40, 40)
    kept = resize_motion(motion, 10, 10)
    assert torch.equal(resize_motion(motion, 40, 40), motion)
    smooth = torch.nn.functional.interpolate(motion, size=(10, 10), mode="bicubic", antialias=True)
    assert (kept - smooth).abs().max() > 0.1


def test_clip_must_start_at_an_i_frame(clip):
    motion = read_motion_vectors(clip)
    for start in (1, -1, 99):
        with pytest.raises(ValueError, match="a clip starts at an I-frame"):
            clip_motion_map(motion, start)


# ---------------------------------------------------------------------------------------------------------- selection


def test_selection_without_i_frames_is_refused():
    with pytest.raises(ValueError, match="no I-frame"):
        select_keyframes("PPPP")
    with pytest.raises(ValueError, match="max_clips"):
        select_keyframes("I", 0)


def test_selection_spans_long_videos():
    types = "IPPPPPPPPPPP" * 100
    chosen = select_keyframes(types, max_clips=8)
    assert len(chosen) == 8 and chosen[0] == 12 and all(types[i] == "I" for i in chosen)
    assert select_keyframes("IPPPPPPPPPPP" * 5) == [12, 36]


# ---------------------------------------------------------------------------------------------------------- processor


def test_processor_batches_videos_and_round_trips(clip, tmp_path):
    processor = VideoLavitMotionProcessor(fps=12, max_clips=2)
    processor.save_pretrained(tmp_path)
    loaded = VideoLavitMotionProcessor.from_pretrained(tmp_path)
    one, both = loaded(clip), processor([clip, clip])
    assert both["num_clips"] == [len(one["keyframes"])] * 2
    assert torch.equal(both["motion_values"][: len(one["motion_values"])], one["motion_values"])
    assert loaded.max_clips == 2 and loaded.fps == 12


def test_processor_reconstruction_clip(clip):
    processor = VideoLavitMotionProcessor(fps=12)
    made = processor.clip_for_reconstruction(clip, 8, 12)
    assert made.start == 0 and made.motion.shape == (2, 24, 8, 12) and made.keyframe.shape == (HEIGHT, WIDTH, 3)
    later = processor.clip_for_reconstruction(clip, 8, 12, start=12)
    assert later.start == 12 and not torch.equal(later.motion, made.motion)
    tokenized = processor.clip_for_reconstruction(clip, 8, 12, tokenized=True)
    assert tokenized.motion.shape == (2, 24, 20, 36)
    with pytest.raises(ValueError, match="a clip starts at an I-frame"):
        processor.clip_for_reconstruction(clip, 8, 12, start=5)


def test_processor_refuses_frames():
    with pytest.raises(TypeError, match="motion is read from a video file"):
        VideoLavitMotionProcessor()(np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="no videos"):
        VideoLavitMotionProcessor()([])
    with pytest.raises(ValueError, match="positive"):
        VideoLavitMotionProcessor(max_clips=0)
    nothing = MotionVectors("PPP", [np.zeros((0, 10), np.int32)] * 3, 16, 16, 6.0)
    with pytest.raises(ValueError, match="no I-frame"):
        VideoLavitMotionProcessor().clip_for_reconstruction(nothing, 8, 8)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_show_direction_and_speed(clip):
    motion = read_motion_vectors(clip, fps=12)
    pictures = list(render_motion(motion))
    assert len(pictures) == 30 and pictures[0].shape == (HEIGHT, WIDTH, 3) and pictures[0].dtype == np.uint8
    assert pictures[0].max() == 0  # an I-frame has no motion
    assert pictures[1].max() > 100
    right = torch.zeros(2, 2, 2, 2)
    right[0, 1] = 1.0
    red, left = list(render_motion(right))[1], list(render_motion(-right))[1]
    assert red.shape == (32, 32, 3) and red[0, 0].tolist() == [255, 0, 0] and left[0, 0].tolist() == [0, 255, 255]
    with pytest.raises(ValueError, match="a motion map is"):
        list(render_motion(torch.zeros(3, 4, 4)))
