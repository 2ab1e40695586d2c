"""`cinetok reconstruct`: video -> tokens -> video, beside the input, with its quality."""

from pathlib import Path

from . import common
from .common import CommandError, Result
from .models import find_model

HELP = "compress a video, decode it again and measure the difference"
EXAMPLE = """  cinetok reconstruct clip.mp4 -o comparison.mp4 --plot quality.png
  cinetok reconstruct clip.mp4 -o clip_again.mp4 --only --model vidtok_kl_causal_488_4chn_v1_1
  cinetok reconstruct clip.mp4 -o structure.mp4 --model vidtwin --branch structure"""


def add_arguments(parser):
    parser.add_argument("video", help="video file, or folder of pictures")
    parser.add_argument("-o", "--output", metavar="FILE", help="video to write: input left, reconstruction right")
    parser.add_argument("--only", action="store_true", help="write the reconstruction alone")
    parser.add_argument("--plot", metavar="FILE", help="plot of the quality of every frame (.png, .svg, .pdf)")
    parser.add_argument("--picture", metavar="FILE", help="picture of a few frames above their reconstruction")
    common.add_model(parser, "VidTok, VidTwin, Divot de-tokenizer or Video-LaVIT de-tokenizer; default: bundled VidTok")
    common.add_range(parser)
    common.add_size(parser)
    common.add_sampling(parser)
    parser.add_argument(
        "--chunk-frames", type=common.positive_int, metavar="N", help="VidTok: frames encoded at a time (16)"
    )
    parser.add_argument("--tile-size", type=common.positive_int, metavar="PIXELS", help="VidTok: work in tiles")
    parser.add_argument(
        "--branch", choices=("all", "structure", "dynamics"), default="all", help="VidTwin: decode this"
    )
    parser.add_argument("--steps", type=common.positive_int, metavar="N", help="Divot, Video-LaVIT: sampling steps")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="Divot, Video-LaVIT: strength of guidance")
    motion = parser.add_mutually_exclusive_group()
    motion.add_argument(
        "--quantize-motion",
        action="store_true",
        help="Video-LaVIT: pass the motion through its codes (default where the model has a motion tokenizer)",
    )
    motion.add_argument("--raw-motion", action="store_true", help="Video-LaVIT: take the motion as the codec gives it")
    parser.add_argument(
        "--motion-fps",
        type=common.positive_float,
        metavar="FPS",
        help="Video-LaVIT: frames per second of the motion (default: 6 for codes, 12 for raw motion)",
    )
    parser.add_argument("--height", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 320")
    parser.add_argument("--width", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 576")
    parser.add_argument("--offload", action="store_true", help="Divot, Video-LaVIT: keep idle parts off the GPU")


def run(args):
    common.existing_video(args.video)
    common.check_range(args)
    common.check_video_output(args.output, args.video)
    common.check_plot(args.plot)
    common.check_file_output(args.picture, common.PICTURES, args.video)
    folder = find_model(args.model, "reconstruct")
    generative = folder.kind.system in ("divot", "video_lavit")
    _check_options(args, generative)
    if generative:
        from .generative import reconstruct

        return reconstruct(args, folder)

    from . import loading, streams

    model, processor = loading.load_tokenizer(folder, args)
    show = common.progress(args)
    processor = loading.processor_for(model, processor, args)
    reading = {"fps": args.fps, "start": args.start, "end": args.end}
    if model.config.model_type == "vidtwin":
        fps, total, pairs = streams.vidtwin_pairs(model, processor, args.video, args, args.branch, **reading)
    else:
        if args.branch != "all":
            raise CommandError("--branch is for VidTwin; VidTok has no separate structure and dynamics")
        fps, total, pairs = streams.vidtok_pairs(model, processor, args.video, args, show, **reading)
    quality = streams.write_reconstruction(
        pairs,
        fps,
        total,
        output=args.output,
        only=args.only,
        plot=args.plot,
        picture=args.picture,
        progress=show,
        title=Path(args.video).name,
    )
    summary = quality.compute()
    files = {name: getattr(args, name) for name in ("output", "plot", "picture") if getattr(args, name) is not None}
    text = "\n".join([common.quality_text(summary), *(f"wrote {path}" for path in files.values())])
    data = {"video": args.video, "model": str(folder.path), "fps": fps, **summary, **files}
    return Result({**data, "per_frame": quality.per_frame}, text)


def _check_options(args, generative):
    if generative:
        for name in ("plot", "picture", "size", "crop", "sample", "tile_size"):
            if getattr(args, name):
                raise CommandError(f"--{name.replace('_', '-')} is for VidTok and VidTwin")
        if args.chunk_frames:
            raise CommandError("--chunk-frames is for VidTok")
        if args.branch != "all":
            raise CommandError("--branch is for VidTwin")
        if args.output is None:
            raise CommandError("name the video to write: -o FILE")
        return
    names = ("steps", "guidance_scale", "offload", "height", "width", "quantize_motion", "raw_motion", "motion_fps")
    for name in names:
        if getattr(args, name):
            raise CommandError(f"--{name.replace('_', '-')} is for Divot and Video-LaVIT")
