"""`cinetok reenact`: what is seen in one video, moving as another (VidTwin)."""

from . import common
from .common import CommandError, Result, existing_video
from .models import find_model

HELP = "make one video move as another (VidTwin)"
EXAMPLE = """  cinetok reenact structure.mp4 dynamics.mp4 -o result.mp4 --model vidtwin
  cinetok reenact structure.mp4 dynamics.mp4 -o views.mp4 --model vidtwin --views --shortest"""


def add_arguments(parser):
    parser.add_argument("structure", help="video whose content is kept")
    parser.add_argument("dynamics", help="video whose motion is used")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="video to write: structure | dynamics | result"
    )
    parser.add_argument("--only", action="store_true", help="write the result alone")
    parser.add_argument(
        "--views", action="store_true", help="also show what the structure and the dynamics decode to by themselves"
    )
    parser.add_argument("--shortest", action="store_true", help="stop with the shorter video instead of refusing")
    common.add_model(parser, "VidTwin", required=True)
    common.add_range(parser)
    common.add_sampling(parser)


def run(args):
    for path in (args.structure, args.dynamics):
        existing_video(path)
    common.check_range(args)
    common.check_video_output(args.output, args.structure, args.dynamics)
    if args.only and args.views:
        raise CommandError("--only and --views exclude each other")
    folder = find_model(args.model, "reenact")
    from . import loading, streams

    model, processor = loading.load_tokenizer(folder, args)
    if model.config.model_type != "vidtwin":
        raise CommandError(f"{folder.path}: reenact needs VidTwin, whose latents separate structure and dynamics")
    reading = {"fps": args.fps, "start": args.start, "end": args.end}
    written = streams.reenact(model, processor, args, common.progress(args), **reading)
    data = {"output": args.output, "model": str(folder.path), **written}
    return Result(data, f"wrote {args.output}: {written['num_frames']} frames at {written['fps']:g} fps")
