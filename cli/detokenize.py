"""`cinetok detokenize`: a file of tokens -> video."""

from . import common
from .common import CommandError, Result
from .models import find_model

HELP = "decode a file of tokens into a video"
EXAMPLE = """  cinetok tokenize clip.mp4 -o clip.safetensors
  cinetok detokenize clip.safetensors -o clip_again.mp4"""


def add_arguments(parser):
    parser.add_argument("tokens", help="file that `cinetok tokenize` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="video to write")
    common.add_model(parser, "the model that made the tokens; default: bundled VidTok")
    parser.add_argument(
        "--fps", type=common.positive_float, help="frames per second of the video (default: as encoded)"
    )
    parser.add_argument("--tile-size", type=common.positive_int, metavar="PIXELS", help="VidTok: work in tiles")
    parser.add_argument(
        "--branch", choices=("all", "structure", "dynamics"), default="all", help="VidTwin: decode this"
    )
    parser.add_argument("--steps", type=common.positive_int, metavar="N", help="Divot, Video-LaVIT: sampling steps")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="Divot, Video-LaVIT: strength of guidance")
    parser.add_argument("--height", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 320")
    parser.add_argument("--width", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 576")
    parser.add_argument("--seed", type=int, default=0, help="Divot, Video-LaVIT: seed of the sampler (default: 0)")


def run(args):
    from . import token_files

    common.check_video_output(args.output, args.tokens)
    _, facts, _ = token_files.read_header(args.tokens)
    folder = find_model(args.model, "detokenize")
    if folder.kind.system in ("divot", "video_lavit"):
        from .generative import detokenize

        written = detokenize(args, folder)
    else:
        written = _detokenize(args, folder, facts)
    data = {"output": args.output, "model": str(folder.path), **written}
    return Result(data, f"wrote {args.output}: {written['num_frames']} frames at {written['fps']:g} fps")


def _detokenize(args, folder, facts):
    from . import loading, streams, token_files

    for name in ("steps", "guidance_scale", "height", "width"):
        if getattr(args, name):
            raise CommandError(f"--{name.replace('_', '-')} is for Divot and Video-LaVIT")
    model, processor = loading.load_tokenizer(folder, args)
    if facts["system"] != model.config.model_type:
        raise CommandError(f"{args.tokens}: tokens of {facts['system']}, the model is {model.config.model_type}")
    loading.check_vidtok_options(model, args)
    if model.config.model_type == "vidtok":
        from ..modeling.vidtok.streaming_vidtok import VidTokTokens

        if args.branch != "all":
            raise CommandError("--branch is for VidTwin; VidTok has no separate structure and dynamics")
        tokens = VidTokTokens.load(args.tokens)
        fps = args.fps or tokens.fps
        model.decode_to_file(
            tokens,
            args.output,
            processor=processor,
            fps=fps,
            tile_size=args.tile_size,
            progress=common.progress(args),
        )
        return {"num_frames": tokens.num_frames, "fps": fps}
    tensors, facts = token_files.load(
        args.tokens, "vidtwin", token_files.fingerprint(model), ("structure", "dynamics_x", "dynamics_y")
    )
    fps = args.fps or facts["fps"]
    streams.decode_vidtwin(model, processor, tensors, facts["num_frames"], args, fps)
    return {"num_frames": facts["num_frames"], "fps": fps}
