"""Reading and writing video: what comes back, what is refused, and what a broken file or disk leaves behind."""

import os
import signal
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from cinetok import VideoReadError, iter_video, read_video, write_video
from cinetok.video import (
    VideoClip,
    VideoWriter,
    plot_quality,
    save_comparison_picture,
    side_by_side,
    write_comparison,
)
from cinetok.video.containers import container_problem
from cinetok.video.sampling import (
    frame_interval,
    uniform_indices,
    vidtok_evaluation_batches,
    vidtok_start_bounds,
    vidtok_training_indices,
)

FILES = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "gif", "webp")


def numbered(num_frames, height=48, width=64):
    """Frames whose brightness tells their number."""
    levels = (20 + 7 * np.arange(num_frames) % 210).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def numbers(clip):
    return np.round((np.asarray(clip.frames, dtype=np.float64).mean((1, 2, 3)) - 20) / 7).astype(int).tolist()


def noise(num_frames, height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def scene(num_frames=12, height=48, width=64):
    """A moving gradient: smooth, so that codecs keep it, and different everywhere, so that turns show."""
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([x * 255 // width, y * 255 // height, 0 * x + 40 + 10 * t], axis=-1) for t in range(num_frames)]
    return np.stack(frames).astype(np.uint8)


def mux(path, frames, times_ms, prepare=None, codec="libx264", **stream_options):
    """Writes frames at given times (variable frame rate) with PyAV alone."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=25, **stream_options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if prepare:
            prepare(stream)
        for time, array in zip(times_ms, frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("suffix", FILES)
def test_round_trip(tmp_path, suffix):
    frames = numbered(20)
    path = write_video(tmp_path / f"clip.{suffix}", frames, 10)
    clip = read_video(path)
    assert clip.frames.shape == frames.shape and clip.frames.dtype == np.uint8
    assert numbers(clip) == list(range(20))
    assert np.abs(clip.frames.astype(int) - frames).max() <= 4
    assert clip.fps == pytest.approx(10, rel=1e-6)
    assert clip.timestamps == pytest.approx(np.arange(20) / 10, abs=2e-3)
    assert clip.complete and clip.note is None and clip.source == str(path)
    assert [p.name for p in tmp_path.iterdir()] == [f"clip.{suffix}"]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "gif", "webm"])
def test_same_frames_same_file(tmp_path, suffix):
    frames = scene()
    contents = {write_video(tmp_path / f"{i}.{suffix}", frames, 10).read_bytes() for i in range(3)}
    assert len(contents) == 1


@pytest.mark.parametrize("fps", [24, 25.0, 29.97, 30000 / 1001, Fraction(60000, 1001), 0.5, 3])
def test_rates(tmp_path, fps):
    clip = read_video(write_video(tmp_path / "clip.mp4", numbered(4), fps))
    assert clip.fps == pytest.approx(float(fps), rel=1e-6)
    if fps == 30000 / 1001:
        with av.open(clip.source) as container:
            assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_default_is_h264_yuv420p_with_the_index_in_front(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(4), 25)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "gif", "webp", "avi"])
@pytest.mark.parametrize("height, width", [(45, 63), (46, 63), (17, 16), (1, 3)])
def test_odd_sizes_are_kept(tmp_path, suffix, height, width):
    frames = scene(3, height, width)
    clip = read_video(write_video(tmp_path / f"clip.{suffix}", frames, 10))
    assert clip.frames.shape == frames.shape


def test_folder_of_frames(tmp_path):
    frames = scene(11)
    write_video(tmp_path / "frames", frames, 12.5)
    clip = read_video(tmp_path / "frames")
    assert np.array_equal(clip.frames, frames) and clip.fps == 12.5
    assert clip.timestamps == pytest.approx(np.arange(11) / 12.5)
    assert np.array_equal(read_video(tmp_path / "frames", indices=[10, 2]).frames, frames[[10, 2]])
    assert np.array_equal(read_video(tmp_path / "frames", num_frames=3).frames, frames[[0, 5, 10]])
    (tmp_path / "frames" / "frame_000004.png").unlink()
    with pytest.raises(VideoReadError, match="declares 11 frames, it holds 10"):
        read_video(tmp_path / "frames")
    assert not read_video(tmp_path / "frames", on_error="keep").complete


def test_folder_order_is_natural_and_sizes_must_agree(tmp_path):
    frames = numbered(12)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"shot{number}.png")
    clip = read_video(tmp_path)
    assert numbers(clip) == list(range(12)) and clip.fps == 24
    Image.fromarray(frames[0, :20]).save(tmp_path / "shot12.png")
    with pytest.raises(VideoReadError, match=r"shot12.png: 64x20 pixels, the first frame has 64x48"):
        read_video(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
def test_single_picture_is_a_video_of_one_frame(tmp_path, suffix):
    Image.fromarray(scene(1)[0]).save(tmp_path / f"picture.{suffix}", quality=95)
    clip = read_video(tmp_path / f"picture.{suffix}")
    assert clip.frames.shape == (1, 48, 64, 3)
    assert np.abs(clip.frames[0].astype(int) - scene(1)[0]).mean() < 4


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "webp"])
def test_one_frame_video(tmp_path, suffix):
    write_video(tmp_path / f"clip.{suffix}", scene(1)[0], 25)
    assert len(read_video(tmp_path / f"clip.{suffix}")) == 1
    assert len(read_video(tmp_path / f"clip.{suffix}", num_frames=1)) == 1
    assert len(read_video(tmp_path / f"clip.{suffix}", fps=3)) == 1
    assert [len(chunk) for chunk in iter_video(tmp_path / f"clip.{suffix}")] == [1]


def test_animated_png_and_gif_of_others(tmp_path):
    pictures = [Image.fromarray(frame) for frame in numbered(6)]
    for suffix in ("png", "gif", "webp"):
        path = tmp_path / f"clip.{suffix}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200, loop=0, lossless=True)
        clip = read_video(path)
        assert numbers(clip) == list(range(6))
        assert clip.fps == pytest.approx(5) and clip.timestamps == pytest.approx(np.arange(6) / 5)


def test_animated_webp_with_uneven_durations(tmp_path):
    pictures = [Image.fromarray(frame) for frame in numbered(3)]
    pictures[0].save(tmp_path / "clip.webp", save_all=True, append_images=pictures[1:], duration=[100, 400, 500])
    clip = read_video(tmp_path / "clip.webp")
    assert clip.timestamps == pytest.approx([0, 0.1, 0.5]) and clip.fps == pytest.approx(3)
    assert numbers(read_video(tmp_path / "clip.webp", fps=10)) == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2]


# ------------------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "gif", "webp"])
def test_selection(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", numbered(25), 10)
    assert numbers(read_video(path, num_frames=5)) == [0, 6, 12, 18, 24]
    assert numbers(read_video(path, num_frames=1)) == [0]
    assert numbers(read_video(path, num_frames=25)) == list(range(25))
    assert numbers(read_video(path, indices=[7, 3, 3, 24])) == [7, 3, 3, 24]
    assert numbers(read_video(path, indices=np.array([2]))) == [2]
    assert numbers(read_video(path, start=0.5, end=0.9)) == [5, 6, 7, 8]
    assert numbers(read_video(path, start=2.2)) == [22, 23, 24]
    assert numbers(read_video(path, start=1.0, end=2.0, num_frames=2)) == [10, 19]
    assert numbers(read_video(path, fps=5)) == list(range(0, 25, 2))
    assert numbers(read_video(path, fps=20, num_frames=4)) == [0, 0, 1, 1]
    assert numbers(read_video(path, fps=5, start=1.0, end=2.0)) == [10, 12, 14, 16, 18]
    assert read_video(path, fps=5).fps == 5
    picked = read_video(path, num_frames=5)
    assert picked.fps == pytest.approx(10 / 6, rel=1e-3) and picked.timestamps[-1] == pytest.approx(2.4, abs=2e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_seeking_gives_the_same_frames(tmp_path, suffix):
    """Long enough, with few keyframes, that later frames are reached by seeking."""
    path = write_video(
        tmp_path / f"clip.{suffix}",
        scene(12)[np.arange(240) % 12],
        10,
        options={"g": "24", "bf": "3"} if suffix != "webm" else {"g": "24"},
    )
    whole = read_video(path)
    for indices in ([0, 239], [100, 5, 201], [150], [237, 238]):
        assert np.array_equal(read_video(path, indices=indices).frames, whole.frames[indices])
    picked = read_video(path, num_frames=4)
    assert np.array_equal(picked.frames, whole.frames[uniform_indices(240, 4)])
    later = read_video(path, start=13.0, end=14.0)
    assert np.array_equal(later.frames, whole.frames[130:140])
    assert later.timestamps == pytest.approx(whole.timestamps[130:140])
    assert np.array_equal(read_video(path, start=21.5).frames, whole.frames[215:])
    assert np.array_equal(read_video(path, start=13.0, fps=5, num_frames=3).frames, whole.frames[[130, 132, 134]])
    chunks = list(iter_video(path, start=20.0, chunk_frames=16))
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), whole.frames[200:])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_is_resampled_by_timestamps(tmp_path, suffix):
    times = [0, 40, 80, 400, 440, 1000, 1040]
    mux(tmp_path / f"vfr.{suffix}", numbered(7), times)
    clip = read_video(tmp_path / f"vfr.{suffix}")
    assert clip.timestamps == pytest.approx(np.array(times) / 1000, abs=1e-6)
    assert numbers(read_video(tmp_path / f"vfr.{suffix}", fps=10, end=1.0)) == [0, 2, 2, 2, 3, 4, 4, 4, 4, 4]
    assert numbers(read_video(tmp_path / f"vfr.{suffix}", fps=5, num_frames=3)) == [0, 2, 3]
    assert numbers(read_video(tmp_path / f"vfr.{suffix}", start=0.4, end=1.0)) == [3, 4]


def test_resampling_copes_with_rounded_timestamps(tmp_path):
    """Matroska keeps milliseconds: 30 frames per second are 0, 33, 67, 100 ms."""
    path = write_video(tmp_path / "clip.mkv", numbered(30), 30)
    assert numbers(read_video(path, fps=30)) == list(range(30))
    assert numbers(read_video(path, fps=15)) == list(range(0, 30, 2))
    assert numbers(read_video(path, fps=60)) == [i // 2 for i in range(60)]


@pytest.mark.parametrize("degrees", [90, 180, 270, -90])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_rotated_video_is_turned(tmp_path, degrees, suffix):
    frames = scene(3)
    mux(tmp_path / f"turned.{suffix}", frames, [0, 40, 80], lambda stream: stream.set_display_rotation(degrees))
    clip = read_video(tmp_path / f"turned.{suffix}")
    with av.open(clip.source) as container:
        counterclockwise = next(container.decode(video=0)).rotation
    assert counterclockwise % 360 in (degrees % 360, -degrees % 360)
    expected = np.rot90(frames, counterclockwise // 90, axes=(1, 2))
    assert clip.frames.shape == expected.shape
    assert np.abs(clip.frames.astype(int) - expected).mean() < 6


def test_mirrored_video(tmp_path):
    frames = scene(3)
    for horizontal, matrix in (
        (True, [-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30]),
        (False, [65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30]),
    ):
        mux(tmp_path / "mirror.mp4", frames, [0, 40, 80], lambda s, m=matrix: s.set_display_matrix(m))
        expected = frames[:, :, ::-1] if horizontal else frames[:, ::-1]
        assert np.abs(read_video(tmp_path / "mirror.mp4").frames.astype(int) - expected).mean() < 6


def test_alpha(tmp_path):
    array = np.zeros((20, 30, 4), dtype=np.uint8)
    array[..., 0], array[:10, :, 3] = 200, 255
    Image.fromarray(array).save(tmp_path / "picture.png")
    Image.fromarray(array).save(
        tmp_path / "clip.webp", save_all=True, append_images=[Image.fromarray(array)], lossless=True
    )
    with av.open(str(tmp_path / "clip.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.height, stream.width, stream.pix_fmt = 20, 30, "yuva420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgba")))
        container.mux(stream.encode(None))
    for name in ("picture.png", "clip.webp", "clip.webm"):
        kept = read_video(tmp_path / name, alpha="keep").frames
        assert kept.shape[3] == 4 and kept[0, 2, 5, 3] == 255 and kept[0, 17, 5, 3] == 0
        black, white = (
            read_video(tmp_path / name).frames,
            read_video(tmp_path / name, background=(255, 255, 255)).frames,
        )
        assert abs(int(black[0, 2, 5, 0]) - 200) < 5 and black[0, 17, 5].tolist() == [0, 0, 0]
        assert white[0, 17, 5].tolist() == [255, 255, 255]
    opaque = read_video(write_video(tmp_path / "opaque.mp4", scene(2), 10), alpha="keep").frames
    assert opaque.shape[3] == 4 and (opaque[..., 3] == 255).all()


def test_sixteen_bit_and_gray_pictures(tmp_path):
    gray = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    assert np.array_equal(read_video(tmp_path / "deep.png").frames[0, ..., 1], gray // 257)
    Image.fromarray((gray // 257).astype(np.uint8)).save(tmp_path / "gray.png")
    assert np.array_equal(read_video(tmp_path / "gray.png").frames[0, ..., 2], gray // 257)


# ------------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_chunks_are_the_whole(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", numbered(23), 10)
    whole = read_video(path)
    for chunk_frames, sizes in ((10, [10, 10, 3]), (23, [23]), (100, [23]), (1, [1] * 23)):
        chunks = list(iter_video(path, chunk_frames=chunk_frames))
        assert [len(chunk) for chunk in chunks] == sizes
        assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), whole.frames)
        assert np.array_equal(np.concatenate([chunk.timestamps for chunk in chunks]), whole.timestamps)
    resampled = np.concatenate([chunk.frames for chunk in iter_video(path, chunk_frames=4, fps=4)])
    assert np.array_equal(resampled, read_video(path, fps=4).frames)


def test_transform_is_applied_while_streaming(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(9), 10)
    chunks = list(iter_video(path, chunk_frames=4, transform=lambda frame: frame[::2, ::4]))
    assert [chunk.frames.shape for chunk in chunks] == [(4, 24, 16, 3), (4, 24, 16, 3), (1, 24, 16, 3)]


def test_streaming_memory_does_not_grow(tmp_path):
    def peak(num_frames):
        path = tmp_path / "clip.mp4"
        write_video(
            path, (numbered(10, 120, 160) for _ in range(num_frames // 10)), 30, options={"preset": "ultrafast"}
        )
        tracemalloc.start()
        with VideoWriter(tmp_path / "copy.mp4", 30, options={"preset": "ultrafast"}) as writer:
            for chunk in iter_video(path, chunk_frames=8):
                writer.write(chunk)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(read_video(tmp_path / "copy.mp4", end=0.2)) == 6 and writer.num_frames == num_frames
        return most

    peak(20)  # imports
    short, long = peak(40), peak(400)
    assert long < 1.1 * short + 200_000, (short, long)


# ---------------------------------------------------------------------------------------------------- broken files


def cut(path, fraction):
    content = path.read_bytes()
    broken = path.with_name(f"cut-{path.name}")
    broken.write_bytes(content[: int(len(content) * fraction)])
    return broken


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", FILES)
def test_cut_off_files_are_never_silently_shorter(tmp_path, suffix, fraction):
    path = write_video(tmp_path / f"clip.{suffix}", scene(30), 10)
    broken = cut(path, fraction)
    for read in (
        read_video,
        lambda p: list(iter_video(p)),
        lambda p: read_video(p, num_frames=30),
        lambda p: read_video(p, fps=5),
    ):
        with pytest.raises(VideoReadError, match="cut off") as caught:
            read(broken)
        assert str(broken) in str(caught.value)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "gif"])
def test_keep_delivers_what_there_is_and_says_so(tmp_path, suffix):
    broken = cut(
        write_video(tmp_path / f"clip.{suffix}", numbered(30, 120, 160) // 2 + noise(30, 120, 160) // 2, 10), 0.6
    )
    clip = read_video(broken, on_error="keep")
    assert 0 < len(clip) < 30 and not clip.complete and "cut off" in clip.note
    chunks = list(iter_video(broken, chunk_frames=4, on_error="keep"))
    assert sum(map(len, chunks)) == len(clip)
    assert [chunk.complete for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    some = read_video(broken, num_frames=4, on_error="keep")
    assert len(some) == 4 and not some.complete


def test_a_cut_off_file_still_gives_the_frames_it_has(tmp_path):
    broken = cut(write_video(tmp_path / "clip.mp4", noise(30), 10), 0.6)
    assert len(read_video(broken, indices=[0, 3])) == 2
    assert len(read_video(broken, end=0.5)) == 5
    with pytest.raises(VideoReadError, match="asked for frames 29"):
        read_video(broken, indices=[29])
    with pytest.raises(VideoReadError, match="from 0 s to 2.9 s"):
        read_video(broken, end=2.9)


def test_index_behind_the_data_is_missing(tmp_path):
    path = write_video(tmp_path / "clip.mp4", scene(), 10, options={"g": "10"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mp4"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    assert len(read_video(tmp_path / "late.mp4")) == 12
    with pytest.raises(VideoReadError, match="cut off"):
        read_video(cut(tmp_path / "late.mp4", 0.5))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_hole_of_zeros_is_noticed(tmp_path, suffix):
    """A download in pieces has the full size, but zeros where pieces are missing."""
    path = write_video(tmp_path / f"clip.{suffix}", noise(30), 10)
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(content)
    with pytest.raises(VideoReadError):
        read_video(path)
    clip = read_video(path, on_error="keep")
    assert not clip.complete and clip.note


def test_a_live_recording_without_declared_length_reads(tmp_path):
    """Matroska written to a pipe: no sizes, no duration, declared frame count 0."""

    class Pipe:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data)

    with open(tmp_path / "live.mkv", "wb") as file, av.open(Pipe(file), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for array in numbered(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    assert numbers(read_video(tmp_path / "live.mkv")) == list(range(12))
    assert numbers(read_video(tmp_path / "live.mkv", num_frames=3)) == [0, 5, 11]


def test_files_that_are_no_video(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.mp4").write_text("<html>404 not found</html>\n" * 50)
    (tmp_path / "header.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(20))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (tmp_path / "folder").mkdir()
    for name, message in {
        "missing.mp4": "no such file",
        "empty.mp4": "the file is empty",
        "garbage.mp4": "not a video",
        "text.mp4": "not a video|no frames|cannot",
        "header.mp4": "index .moov box. is missing",
        "picture.png": "not a picture",
        "folder": "holds no pictures",
    }.items():
        for read in (read_video, lambda p: list(iter_video(p))):
            with pytest.raises(VideoReadError, match=message) as caught:
                read(tmp_path / name)
            assert name in str(caught.value) and isinstance(caught.value, ValueError)


def test_audio_only(tmp_path):
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoReadError, match="only audio"):
        read_video(tmp_path / "song.m4a")


def test_a_video_without_frames(tmp_path):
    """A header, a track, and nothing in it."""
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    for read in (read_video, lambda p: list(iter_video(p)), lambda p: read_video(p, num_frames=1)):
        with pytest.raises(VideoReadError, match="no frames|cut off|damaged|not a video"):
            read(tmp_path / "none.mkv")


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_asking_for_more_than_there_is(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", numbered(12), 10)
    for arguments, message in (
        ({"num_frames": 17}, "asked for 17 frames: only 12 came"),
        ({"indices": [0, 12]}, "asked for frames 0, 12: there are only 12 frames"),
        ({"indices": [500]}, "asked for frames 500: there are only 12 frames"),
        ({"fps": 5, "num_frames": 7}, "asked for 7 frames at 5 fps: only 6 came"),
        ({"end": 2.0}, "the video ends at 1.2"),
        ({"start": 3.0}, "the video ends at 1.2"),
        ({"start": 3.0, "fps": 5}, "the video ends at 1.2"),
        ({"start": 3.0, "num_frames": 2}, "the video ends at 1.2"),
    ):
        with pytest.raises(VideoReadError, match=message):
            read_video(path, **arguments)
    kept = read_video(path, num_frames=17, on_error="keep")
    assert len(kept) == 12 and not kept.complete and "only 12 came" in kept.note


def test_bad_arguments(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(4), 10)
    for arguments, error in (
        ({"num_frames": 0}, ValueError),
        ({"num_frames": 2.5}, TypeError),
        ({"num_frames": True}, TypeError),
        ({"fps": 0}, ValueError),
        ({"fps": float("nan")}, ValueError),
        ({"fps": "30"}, TypeError),
        ({"start": -1}, ValueError),
        ({"start": 2, "end": 1}, ValueError),
        ({"indices": []}, ValueError),
        ({"indices": [-1]}, ValueError),
        ({"indices": [0.5]}, TypeError),
        ({"indices": [0], "fps": 3}, ValueError),
        ({"on_error": "ignore"}, ValueError),
        ({"alpha": "drop"}, ValueError),
    ):
        with pytest.raises(error) as caught:
            read_video(path, **arguments)
        assert not isinstance(caught.value, VideoReadError), arguments
    with pytest.raises(ValueError, match="chunk_frames"):
        iter_video(path, chunk_frames=0)


def test_container_checks_accept_whole_files(tmp_path):
    for suffix in FILES:
        assert container_problem(write_video(tmp_path / f"a.{suffix}", scene(5), 10)) is None


# -------------------------------------------------------------------------------------------------------- writing


def test_inputs_of_write_video(tmp_path):
    frames = scene(6)
    variants = {
        "array": frames,
        "tensor": torch.from_numpy(frames),
        "clip": VideoClip(frames, 10.0, np.arange(6) / 10, "memory"),
        "pieces": (frames[i : i + 2] for i in range(0, 6, 2)),
        "frames": list(frames),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "clips": [VideoClip(frames[:4], 10.0, np.arange(4) / 10, "memory"), frames[4:]],
    }
    contents = {name: write_video(tmp_path / f"{name}.mkv", value, 10).read_bytes() for name, value in variants.items()}
    assert len(set(contents.values())) == 1, {name: len(content) for name, content in contents.items()}


def test_options(tmp_path):
    frames = scene()
    sizes = [write_video(tmp_path / "a.mp4", frames, 10, crf=crf).stat().st_size for crf in (5, 40)]
    assert sizes[0] > 1.5 * sizes[1]
    lossless = write_video(tmp_path / "a.mkv", frames, 10, codec="ffv1", pixel_format="bgr0")
    assert np.array_equal(read_video(lossless).frames, frames)
    with pytest.raises(FileExistsError):
        write_video(tmp_path / "a.mp4", frames, 10, overwrite=False)


@pytest.mark.parametrize(
    "frames, fps, error",
    [
        (np.zeros((2, 8, 8, 3), np.float32), 10, TypeError),
        (torch.zeros(2, 8, 8, 3), 10, TypeError),
        (np.zeros((2, 3, 8, 8), np.uint8), 10, ValueError),
        (np.zeros((2, 8, 8, 4), np.uint8), 10, ValueError),
        (np.zeros((8, 8), np.uint8), 10, ValueError),
        (np.zeros((0, 8, 8, 3), np.uint8), 10, ValueError),
        ([], 10, ValueError),
        (iter([np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 10, 3), np.uint8)]), 10, ValueError),
        ("frames", 10, TypeError),
        (None, 10, TypeError),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, ValueError),
        (np.zeros((2, 8, 8, 3), np.uint8), float("inf"), ValueError),
        (np.zeros((2, 8, 8, 3), np.uint8), "25", TypeError),
    ],
)
def test_what_cannot_be_written(tmp_path, frames, fps, error):
    with pytest.raises(error):
        write_video(tmp_path / "clip.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_bad_targets_and_codecs(tmp_path):
    frames = scene(2)
    for path, options, error in (
        (tmp_path / "clip.xyz", {}, ValueError),
        (tmp_path / "none" / "clip.mp4", {}, FileNotFoundError),
        (tmp_path / "clip.mp4", {"codec": "nonsense"}, ValueError),
        (tmp_path / "clip.webm", {"codec": "libx264"}, ValueError),
        (tmp_path / "clip.mp4", {"pixel_format": "nonsense"}, ValueError),
        (tmp_path / "clip.mp4", {"crf": 1000}, ValueError),
        (tmp_path / "clip.mp4", {"options": {"no-such-option": "1"}}, ValueError),
        (tmp_path / "frames", {"crf": 3}, ValueError),
    ):
        with pytest.raises(error):
            write_video(path, frames, 10, **options)
        assert not list(tmp_path.iterdir()), (path, options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("keep")
    with pytest.raises(FileExistsError):
        write_video(tmp_path / "full", frames, 10)
    assert (tmp_path / "full" / "note.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "frames"])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, name):
    if name != "frames":
        (tmp_path / name).write_bytes(b"old")

    def pieces():
        yield scene(4)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_video(tmp_path / name, pieces(), 10)
    assert [p.name for p in tmp_path.iterdir()] == ([] if name == "frames" else [name])
    assert name == "frames" or (tmp_path / name).read_bytes() == b"old"


FULL_DISK = """
import resource, sys
import numpy as np
from cinetok import write_video
frames = np.random.default_rng(0).integers(0, 256, (30, 128, 128, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    write_video(sys.argv[1], frames, 10)
except OSError as error:
    print("OSError", error)
    sys.exit(7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a POSIX feature")
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm", "clip.gif", "clip.webp", "clip.avi", "frames"])
def test_full_disk(tmp_path, name):
    (tmp_path / "script.py").write_text(FULL_DISK)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stdout + done.stderr
    assert name in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["script.py"]


KILLED = """
import itertools, sys
import numpy as np
from cinetok.video import VideoWriter
frames = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
with VideoWriter(sys.argv[1], 10) as writer:
    for number in itertools.count():
        writer.write(frames)
        if number == 20:
            print("writing", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_while_writing(tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    (tmp_path / "clip.mp4").write_bytes(b"old")
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "clip.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert (tmp_path / "clip.mp4").read_bytes() == b"old"
    left = sorted(p.name for p in tmp_path.iterdir() if p.name not in ("script.py", "clip.mp4"))
    assert all(name.startswith(".clip.mp4.part-") for name in left), left


# ------------------------------------------------------------------------------------------------------ comparison


def test_side_by_side_video(tmp_path):
    left, right = scene(6), 255 - scene(6)
    clip = read_video(write_comparison(tmp_path / "both.mkv", left, right, 10, codec="ffv1", pixel_format="bgr0"))
    assert np.array_equal(clip.frames, np.concatenate([left, right], axis=2))
    pieces = write_comparison(
        tmp_path / "pieces.mp4", iter([left[:4], left[4:]]), iter([right[:4], right[4:]]), 10, gap=2
    )
    assert read_video(pieces).frames.shape == (6, 48, 130, 3)
    assert np.array_equal(side_by_side(left, right, gap=3)[:, :, 64:67], np.full((6, 48, 3, 3), 255))
    for a, b in (
        (left, right[:4]),
        (left, right[:, :40]),
        (iter([left]), iter([])),
        (iter([left]), iter([right, right])),
    ):
        with pytest.raises(ValueError, match="differ|fewer|more"):
            write_comparison(tmp_path / "bad.mp4", a, b, 10)
    assert not (tmp_path / "bad.mp4").exists()


def test_comparison_picture_and_plot(tmp_path):
    save_comparison_picture(tmp_path / "frames.png", scene(9), scene(9), num_frames=3)
    picture = np.asarray(Image.open(tmp_path / "frames.png"))
    assert picture.shape == (96, 192, 3) and np.array_equal(picture[:48, 64:128], scene(9)[4])
    save_comparison_picture(tmp_path / "frames.jpg", scene(2), scene(2))
    pytest.importorskip("matplotlib")
    plot_quality(tmp_path / "plot.png", {"psnr": [30.0, 31.0], "ssim": [0.9, 0.8]}, fps=25, title="clip")
    assert Image.open(tmp_path / "plot.png").size[0] > 400
    with pytest.raises(ValueError, match="no values"):
        plot_quality(tmp_path / "none.png", {"psnr": []})
    assert {p.name for p in tmp_path.iterdir()} == {"frames.png", "frames.jpg", "plot.png"}


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"cinetok\[plots\]"):
        plot_quality(tmp_path / "plot.png", {"psnr": [1.0]})


# ---------------------------------------------------------------------------------------------------- frame choice


def test_uniform_indices():
    assert uniform_indices(10, 10) == list(range(10))
    assert uniform_indices(100, 3) == [0, 49, 99]
    for total, count in ((5, 6), (5, 0)):
        with pytest.raises(ValueError):
            uniform_indices(total, count)


def test_vidtok_training_frames():
    generator = torch.Generator().manual_seed(0)
    low, high = vidtok_start_bounds(300, 30, 17, 3)
    assert (low, high) == (0, 138)
    starts = {vidtok_training_indices(300, 30, 17, 3, generator=generator)[0] for _ in range(2000)}
    assert min(starts) == low and max(starts) == high
    for _ in range(20):
        indices = vidtok_training_indices(200, 25, 16, 8, generator=generator)
        assert len(indices) == 16 and indices[0] >= 0 and indices[-1] < 200 and indices == sorted(indices)
    assert vidtok_training_indices(5, 30, 17, 8) == [0, 1, 2, 3, 4]
    assert frame_interval(10, 30) == 1  # the original's 0 cannot be walked with
    for arguments in ((0, 30, 17, 8), (10, 0, 17, 8), (10, 30, 17, 0), (10, 30, 0, 8), (10, float("nan"), 17, 8)):
        with pytest.raises(ValueError):
            vidtok_training_indices(*arguments)
    with pytest.raises(ValueError, match="start"):
        vidtok_training_indices(10, 30, 5, 30, start=10)


def test_vidtok_evaluation_batches():
    batches = vidtok_evaluation_batches(50, 30, 30)
    assert [len(batch) for batch in batches] == [17, 17, 17] and batches[2][-2:] == [49, 49]
    assert len(vidtok_evaluation_batches(50, 30, 30, incomplete="drop")) == 2
    assert vidtok_evaluation_batches(4, 10, 30)[0][:5] == [0, 1, 2, 3, 3]
    assert [len(b) for b in vidtok_evaluation_batches(40, 30, 30, long_video=True)] == [33]
    assert vidtok_evaluation_batches(16, 30, 30, long_video=True) == []
    with pytest.raises(ValueError, match="incomplete"):
        vidtok_evaluation_batches(50, 30, 30, incomplete="pad")
