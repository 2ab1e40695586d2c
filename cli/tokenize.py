"""`cinetok tokenize`: video -> a small file of tokens with all that is needed to decode it."""

import os

from . import common
from .common import Result, existing_video
from .models import find_model

HELP = "turn a video into a file of tokens"
EXAMPLE = """  cinetok tokenize clip.mp4 -o clip.safetensors
  cinetok detokenize clip.safetensors -o clip_again.mp4"""


def add_arguments(parser):
    parser.add_argument("video", help="video file, or folder of pictures")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file of tokens to write (.safetensors)")
    common.add_model(parser, "VidTok, VidTwin, Divot or Video-LaVIT de-tokenizer; default: bundled VidTok")
    common.add_range(parser)
    common.add_size(parser)
    common.add_sampling(parser)
    parser.add_argument(
        "--chunk-frames", type=common.positive_int, metavar="N", help="VidTok: frames encoded at a time (16)"
    )
    parser.add_argument("--tile-size", type=common.positive_int, metavar="PIXELS", help="VidTok: work in tiles")


def run(args):
    existing_video(args.video)
    common.check_range(args)
    common.check_file_output(args.output, (".safetensors",), args.video)
    folder = find_model(args.model, "tokenize")
    if folder.kind.system in ("divot", "video_lavit"):
        from .generative import tokenize

        facts = tokenize(args, folder)
    else:
        facts = _tokenize(args, folder)
    size = os.path.getsize(args.output)
    facts = {"output": args.output, "bytes": size, **facts, "model": str(folder.path)}
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in facts["tensors"].items())
    text = f"wrote {args.output}: {size:,} bytes for {facts['num_frames']} frames; {shapes}"
    return Result(facts, text)


def _tokenize(args, folder):
    from . import loading, streams, token_files

    model, processor = loading.load_tokenizer(folder, args)
    processor = loading.processor_for(model, processor, args)
    reading = {"fps": args.fps, "start": args.start, "end": args.end}
    if model.config.model_type == "vidtok":
        tokens = streams.encode_vidtok(model, processor, args.video, args, common.progress(args), **reading)
        tokens.extra["model"] = args.model or "bundled"
        tokens.save(args.output)
        name = "indices" if tokens.indices is not None else "latents"
        return {**tokens.facts(), "tensors": {name: list(getattr(tokens, name).shape)}}
    tensors, facts = streams.encode_vidtwin(model, processor, args.video, args, common.progress(args), **reading)
    facts["model"] = args.model
    facts["fingerprint"] = token_files.fingerprint(model)
    token_files.save(args.output, tensors, **facts)
    return {**facts, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}
