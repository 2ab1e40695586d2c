"""`cinetok compare`: quality of one video against another of the same size and length."""

from pathlib import Path

from . import common
from .common import CommandError, Result, existing_video

HELP = "measure how far a video is from its reference"
EXAMPLE = """  cinetok compare original.mp4 processed.mp4
  cinetok compare original.mp4 processed.mp4 -o side_by_side.mp4 --plot quality.png --json"""


def add_arguments(parser):
    parser.add_argument("reference", help="the original video")
    parser.add_argument("video", help="the video to measure")
    parser.add_argument("-o", "--output", metavar="FILE", help="video to write: reference left, video right")
    parser.add_argument("--plot", metavar="FILE", help="plot of the quality of every frame (.png, .svg, .pdf)")
    parser.add_argument("--picture", metavar="FILE", help="picture of a few frames of both")
    common.add_range(parser)


def run(args):
    for path in (args.reference, args.video):
        existing_video(path)
    common.check_range(args)
    common.check_video_output(args.output, args.reference, args.video)
    common.check_plot(args.plot)
    common.check_file_output(args.picture, common.PICTURES, args.reference, args.video)
    from . import streams

    reading = {"fps": args.fps, "start": args.start, "end": args.end}
    first, second = (_pieces(path, reading) for path in (args.reference, args.video))
    pairs = _pairs(args, first, second)
    fps, *first_pair = next(pairs)
    quality = streams.write_reconstruction(
        _chain(first_pair, pairs),
        fps,
        None,
        output=args.output,
        plot=args.plot,
        picture=args.picture,
        progress=common.progress(args),
        title=f"{Path(args.video).name} against {Path(args.reference).name}",
    )
    summary = quality.compute()
    files = {name: getattr(args, name) for name in ("output", "plot", "picture") if getattr(args, name) is not None}
    text = "\n".join([common.quality_text(summary), *(f"wrote {path}" for path in files.values())])
    data = {"reference": args.reference, "video": args.video, "fps": fps, **summary, **files}
    return Result({**data, "per_frame": quality.per_frame}, text)


def _pieces(path, reading):
    """Yields (fps, frames (1, some, 3, height, width) in [0, 1])."""
    import torch

    from ..video import iter_video

    for clip in iter_video(path, **reading):
        yield clip.fps, torch.from_numpy(clip.frames).permute(0, 3, 1, 2)[None].float().div(255)


def _pairs(args, first, second):
    while True:
        (fps, one), (_, other) = next(first, (None, None)), next(second, (None, None))
        if one is None and other is None:
            return
        lengths = [0 if piece is None else piece.shape[1] for piece in (one, other)]
        if lengths[0] != lengths[1]:
            raise CommandError(
                f"{args.reference} and {args.video} differ in length; choose a common part with --fps, --start, --end"
            )
        if one.shape != other.shape:
            sizes = [f"{piece.shape[4]}x{piece.shape[3]}" for piece in (one, other)]
            raise CommandError(
                f"{args.reference} is {sizes[0]}, {args.video} is {sizes[1]} pixels; sizes must be equal"
            )
        yield fps, one, other


def _chain(first, rest):
    yield tuple(first)
    for _, one, other in rest:
        yield one, other
