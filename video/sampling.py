"""Which frames to take: even spacing, resampling by timestamps, and VidTok's rules (arXiv 2412.13061, section 4)."""

import math


def uniform_indices(total_frames, num_frames):
    """`num_frames` indices spread evenly over `total_frames`, first and last frame included (rounded down).

    Raises:
        ValueError: more frames asked for than there are, or a count below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if num_frames > total_frames:
        raise ValueError(f"{num_frames} frames asked for, but there are only {total_frames}")
    if num_frames == 1:
        return [0]
    return [i * (total_frames - 1) // (num_frames - 1) for i in range(num_frames)]


def frame_interval(video_fps, sample_fps=None):
    """Native frames per sampled frame, at least 1 (the original rounds to 0 and fails above twice the native rate)."""
    if not (video_fps > 0 and math.isfinite(video_fps)):
        raise ValueError(f"video_fps must be a positive number of frames per second, got {video_fps}")
    if sample_fps is None:
        return 1
    if not (sample_fps > 0 and math.isfinite(sample_fps)):
        raise ValueError(f"sample_fps must be a positive number of frames per second, got {sample_fps}")
    return max(1, round(video_fps / sample_fps))


def _check_counts(**counts):
    for name, value in counts.items():
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _training_range(total_frames, video_fps, num_frames, sample_fps):
    """Frames to deliver and native frames they span."""
    _check_counts(total_frames=total_frames, num_frames=num_frames)
    num_frames = min(num_frames, total_frames)
    return num_frames, (num_frames - 1) * frame_interval(video_fps, sample_fps) + 1


def vidtok_start_bounds(total_frames, video_fps, num_frames, sample_fps=None):
    """Inclusive bounds (low, high) of the random first frame of a VidTok training clip; (0, 0) when it is too short."""
    _, span = _training_range(total_frames, video_fps, num_frames, sample_fps)
    return 0, max(0, total_frames - span - 1)


def vidtok_training_indices(total_frames, video_fps, num_frames, sample_fps=None, start=None, generator=None):
    """Frame indices of a VidTok training clip.

    The original spreads the frames over one native frame more than needed, so that the spacing is a little larger
    than the interval; this is kept. Videos with fewer than `num_frames` frames give all their frames (training then
    repeats the last one).

    Args:
        total_frames: frames of the video.
        video_fps: its rate; sample_fps: rate to sample at (default: the native one).
        num_frames: frames of the clip.
        start: index of the first frame; drawn with `generator` (a torch.Generator) when None.

    Returns:
        list of min(num_frames, total_frames) indices.
    """
    import numpy as np

    num_frames, span = _training_range(total_frames, video_fps, num_frames, sample_fps)
    if start is None:
        import torch

        low, high = vidtok_start_bounds(total_frames, video_fps, num_frames, sample_fps)
        start = int(torch.randint(low, high + 1, (), generator=generator))
    if not 0 <= start < total_frames:
        raise ValueError(f"start must be a frame index below {total_frames}, got {start}")
    stop = min(total_frames - 1, start + span)
    # numpy's linspace: the products it forms decide which side of an integer a value falls on before the floor
    return np.floor(np.linspace(start, stop, num_frames)).astype(int).tolist()


def vidtok_evaluation_batches(
    total_frames,
    video_fps,
    sample_fps,
    *,
    num_frames=None,
    chunk_frames=16,
    causal=True,
    long_video=False,
    incomplete="repeat",
):
    """Frame indices of the batches VidTok's scripts cut a video into.

    Args:
        total_frames, video_fps: of the video; `sample_fps`: rate to sample at.
        num_frames: frames per batch; default `chunk_frames` + 1 for causal models, `chunk_frames` for the others.
        long_video: one batch with as many frames as whole chunks allow (plus the first frame for causal models),
            none when there is not one chunk.
        incomplete: what becomes of an incomplete last batch: "repeat" its last frame or "drop" it (as the
            reconstruction script does).

    Returns:
        list of lists of indices.
    """
    _check_counts(total_frames=total_frames, chunk_frames=chunk_frames)
    if incomplete not in ("repeat", "drop"):
        raise ValueError(f'incomplete must be "repeat" or "drop", not {incomplete!r}')
    indices = list(range(0, total_frames, frame_interval(video_fps, sample_fps)))
    if long_video:
        first = 1 if causal else 0
        num_chunks = (len(indices) - first) // chunk_frames
        return [indices[: num_chunks * chunk_frames + first]] if num_chunks else []
    num_frames = num_frames or chunk_frames + (1 if causal else 0)
    _check_counts(num_frames=num_frames)
    batches = [indices[i : i + num_frames] for i in range(0, len(indices), num_frames)]
    if len(batches[-1]) < num_frames:
        last = batches.pop()
        if incomplete == "repeat":
            batches.append(last + [last[-1]] * (num_frames - len(last)))
    return batches
