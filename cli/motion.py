"""`cinetok motion`: the codec's motion field of a video, as something to look at."""

from pathlib import Path

from . import common
from .common import Result, existing_video

HELP = "show the motion field a video codec finds in a video"
EXAMPLE = """  cinetok motion clip.mp4 -o motion.mp4
  cinetok motion clip.mp4 -o motion.png --fps 12"""
_PICTURE_FRAMES = 4


def add_arguments(parser):
    parser.add_argument("video", help="video file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="video to write: input left, motion right; or a picture"
    )
    parser.add_argument("--only", action="store_true", help="write the motion field alone")
    parser.add_argument(
        "--fps",
        type=common.positive_float,
        default=6.0,
        help="frames per second to look at (default: 6, as Video-LaVIT)",
    )
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="where to begin")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="where to stop (default: the end)")
    parser.add_argument(
        "--max-displacement",
        type=common.positive_float,
        metavar="PIXELS",
        help="speed per frame drawn at full brightness (default: that of the fastest 1 %%)",
    )


def run(args):
    existing_video(args.video)
    common.check_range(args)
    is_picture = Path(args.output).suffix.lower() in (".png", ".jpg", ".jpeg")
    if is_picture:
        common.check_file_output(args.output, (".png", ".jpg", ".jpeg"), args.video)
    else:
        common.check_video_output(args.output, args.video)
    import numpy as np

    from ..video import VideoWriter, iter_video, read_motion_vectors
    from ..video.motion import render_motion

    motion = read_motion_vectors(args.video, args.fps, start=args.start, end=args.end, keep_keyframes=False)
    clips = iter_video(args.video, fps=args.fps, start=args.start, end=args.end)
    inputs = (frame for clip in clips for frame in clip.frames)
    pictures = render_motion(motion, max_displacement=args.max_displacement)
    chosen = _spread(motion.frame_types) if is_picture else None
    rows, last = [], None
    with _writer(VideoWriter, args.output, motion.fps, is_picture) as writer:
        for index, picture in enumerate(_bar(pictures, len(motion), common.progress(args))):
            last = next(inputs, last)
            pair = [picture] if args.only else [last, picture]
            if is_picture and index in chosen:
                rows.append(np.concatenate(pair, axis=0))
            elif not is_picture:
                writer.write(np.concatenate(pair, axis=1))
    if is_picture:
        from .generative import save_picture

        save_picture(args.output, np.concatenate(rows, axis=1))
    vectors = sum(len(table) for table in motion.vectors)
    data = {"video": args.video, "output": args.output, "num_frames": len(motion), "fps": motion.fps}
    data.update(num_vectors=vectors, frame_types=motion.frame_types, height=motion.height, width=motion.width)
    return Result(data, f"wrote {args.output}: {len(motion)} frames at {motion.fps:g} fps, {vectors} motion vectors")


def _spread(frame_types):
    """Indices of a few frames with motion, evenly spread (of any frames, where none has motion)."""
    candidates = [i for i, letter in enumerate(frame_types) if letter != "I"] or list(range(len(frame_types)))
    count = min(_PICTURE_FRAMES, len(candidates))
    return {candidates[(i * (len(candidates) - 1)) // max(1, count - 1)] for i in range(count)}


def _writer(writer, path, fps, is_picture):
    import contextlib

    return contextlib.nullcontext() if is_picture else writer(path, fps)


def _bar(items, total, show):
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc="motion", unit="frame", disable=not show)
