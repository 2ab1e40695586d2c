"""`cinetok predict`: how a clip goes on (Seer)."""

from pathlib import Path

from . import common
from .common import CommandError, Result, existing_video
from .models import find_model

HELP = "predict how a picture or clip goes on, told by a sentence (Seer)"
EXAMPLE = """  cinetok predict --model sthv2_seer --image book.jpg "close book" -o out.gif
  cinetok predict "fold the cloth" --video start.mp4 --num-reference 2 --num-frames 24 -o out.mp4 --model bridge_seer"""


def add_arguments(parser):
    parser.add_argument("prompt", nargs="?", help="what happens")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="reference image, or several in order")
    parser.add_argument("--video", metavar="FILE", help="video whose first frames are the reference")
    parser.add_argument(
        "--num-reference", type=common.positive_int, metavar="N", help="--video: frames taken (default: as trained)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="video or .gif to write")
    common.add_model(parser, "Seer pipeline", required=True)
    parser.add_argument(
        "--num-frames", type=common.positive_int, metavar="N", help="frames of the result, reference included"
    )
    parser.add_argument("--height", type=common.positive_int, metavar="PIXELS", help="default: as trained")
    parser.add_argument("--width", type=common.positive_int, metavar="PIXELS", help="default: as trained")
    parser.add_argument(
        "--steps", type=common.positive_int, default=30, metavar="N", help="sampling steps (default: 30)"
    )
    parser.add_argument("--guidance-scale", type=float, default=7.5, metavar="X", help="strength of the text (7.5)")
    parser.add_argument("--fps", type=common.positive_float, default=4.0, help="frames per second of the file (4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--offload", action="store_true", help="keep idle parts off the GPU")


def run(args):
    if (args.image is None) == (args.video is None):
        raise CommandError("give --image or --video")
    if args.num_reference is not None and args.video is None:
        raise CommandError("--num-reference is for --video; with --image every image is a reference frame")
    prompt = _prompt(args)
    for path in args.image or [args.video]:
        existing_video(path)
    common.check_video_output(args.output, *(args.image or [args.video]))
    folder = find_model(args.model, "predict")
    from ..video import write_video
    from . import loading
    from .generative import to_bytes

    pipeline = loading.load_pipeline(folder, args)
    references = _references(args, pipeline)
    options = {name: getattr(args, name) for name in ("height", "width") if getattr(args, name) is not None}
    output = pipeline(
        prompt,
        **references,
        num_frames=args.num_frames,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        generator=loading.seeded(args),
        output_type="np",
        **options,
    )
    frames = to_bytes(output.frames[0])
    write_video(args.output, frames, args.fps)
    data = {"output": args.output, "model": str(folder.path), "num_frames": len(frames), "fps": args.fps}
    return Result(data, f"wrote {args.output}: {len(frames)} frames at {args.fps:g} fps")


def _prompt(args):
    """The sentence. `--image` takes all words that follow it, so a prompt right behind its files is the last of them."""
    if args.prompt is None and args.image is not None and len(args.image) > 1:
        last = Path(args.image[-1])
        if not last.exists() and last.suffix.lower() not in common.PICTURES:
            return args.image.pop()
    if args.prompt is None:
        raise CommandError('no prompt: say what happens, as in cinetok predict "close book" --image book.jpg ...')
    return args.prompt


def _references(args, pipeline):
    from PIL import Image, UnidentifiedImageError

    from ..video import read_video

    if args.video is not None:
        count = args.num_reference or pipeline.config.num_cond_frames
        return {"video": read_video(args.video, indices=range(count))}
    images = []
    for path in args.image:
        try:
            images.append(Image.open(path).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise CommandError(f"{path}: not a readable image") from error
    return {"image": images[0]} if len(images) == 1 else {"video": images}
