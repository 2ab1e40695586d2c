"""`cinetok generate`: text (and an image) -> video, image or story."""

import json
import shutil
import tempfile
from pathlib import Path

from . import common
from .common import CommandError, Result
from .models import find_model

HELP = "make a video, an image or a story from a prompt"
EXAMPLE = """  cinetok generate "a dog runs along the beach" -o dog.mp4 --model divot_text_to_video
  cinetok generate "a dog runs" -o dog.mp4 --model divot_llm_sft_gen --detokenizer divot_detokenizer_stage2
  cinetok generate "a steam train in the snow" -o train.mp4 --model video_lavit --num-clips 2
  cinetok generate "Generate a story about a visit to the dentist." -o story --story --model divot_text_to_video"""
_PICTURES = common.PICTURES[:3]


def add_arguments(parser):
    parser.add_argument("prompt", nargs="?", help="what it shows (may be left out with --image)")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help="video to write; .png or .jpg for an image; with --story also a folder (a name without a suffix)",
    )
    common.add_model(parser, "Divot or Video-LaVIT generation model", required=True)
    parser.add_argument("--detokenizer", metavar="FOLDER", help="Divot: de-tokenizer for a language model's folder")
    parser.add_argument("--story", action="store_true", help="Divot: several captioned clips")
    parser.add_argument("--max-clips", type=common.positive_int, default=4, help="--story: most clips (default: 4)")
    parser.add_argument("--image", metavar="FILE", help="Video-LaVIT: image that starts the video")
    parser.add_argument(
        "--num-clips", type=common.positive_int, default=1, metavar="N", help="Video-LaVIT: clips of 4 seconds"
    )
    parser.add_argument("--height", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 512")
    parser.add_argument("--width", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 896")
    parser.add_argument(
        "--keyframe-height", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 576"
    )
    parser.add_argument(
        "--keyframe-width", type=common.positive_int, metavar="PIXELS", help="Video-LaVIT: default 1024"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="Video-LaVIT: what to steer away from")
    parser.add_argument(
        "--max-new-tokens", type=common.positive_int, metavar="N", help="most ids written per text or clip"
    )
    parser.add_argument("--steps", type=common.positive_int, metavar="N", help="sampling steps (default: as released)")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="strength of guidance (default: as released)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--offload", action="store_true", help="keep idle parts off the GPU")


def run(args):
    output = Path(args.output)
    is_picture = output.suffix.lower() in _PICTURES
    if is_picture:
        common.check_file_output(args.output, _PICTURES, args.image)
    else:
        common.check_video_output(args.output, args.image)
    if not output.suffix and not args.story:
        raise CommandError(f"{output}: the name needs a suffix such as .mp4 (folders are for --story)")
    folder = find_model(args.model, "generate")
    if folder.kind.system == "divot":
        return _divot(args, folder, is_picture)
    return _video_lavit(args, folder, is_picture)


def _only_for(args, system, names):
    for name in names:
        value = getattr(args, name)
        if not (value is None or value is False or (name == "num_clips" and value == 1)):
            raise CommandError(f"--{name.replace('_', '-')} is not for {system}")


def _sampling(args):
    from .loading import seeded

    options = {"generator": seeded(args), "output_type": "np"}
    for name, value in (("num_inference_steps", args.steps), ("guidance_scale", args.guidance_scale)):
        if value is not None:
            options[name] = value
    return options


def _divot(args, folder, is_picture):
    from . import generative

    lavit_only = ("image", "num_clips", "height", "width", "keyframe_height", "keyframe_width", "negative_prompt")
    _only_for(args, "Divot", lavit_only)
    if not args.prompt:
        raise CommandError("give a prompt")
    if is_picture and args.story:
        raise CommandError("a story is written to a video or a folder, not to a picture")
    name = "DivotStoryPipeline" if args.story else "DivotTextToVideoPipeline"
    pipeline = _divot_pipeline(args, folder, name)
    options = _sampling(args)
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    data = {"output": args.output, "model": str(folder.path), "prompt": args.prompt}
    if args.story:
        return _write_story(args, pipeline(args.prompt, max_clips=args.max_clips, **options), data)
    output = pipeline(args.prompt, kind="image" if is_picture else "video", **options)
    frames = output.frames[0]
    generative.write_media(args.output, frames, output.fps, "truncate")
    data.update(num_frames=1 if is_picture else len(frames), fps=output.fps, text=output.texts[0])
    said = [f"model said: {output.texts[0]}"] if output.texts[0] else []
    return Result(data, "\n".join([_wrote(args, data), *said]))


def _wrote(args, data):
    if data["num_frames"] == 1:
        return f"wrote {args.output}"
    return f"wrote {args.output}: {data['num_frames']} frames at {data['fps']:g} fps"


def _divot_pipeline(args, folder, name):
    import cinetok

    from . import loading

    if folder.is_pipeline:
        if args.detokenizer:
            raise CommandError(f"--detokenizer: {folder.path} is a whole pipeline and holds one already")
        return loading.load_pipeline(folder, args, name)
    if not args.detokenizer:
        raise CommandError(f"{folder.path}: is a language model alone; name its --detokenizer (a Divot de-tokenizer)")
    detokenizer = find_model(args.detokenizer)
    if detokenizer.name != "DivotReconstructionPipeline":
        raise CommandError(f"{detokenizer.path}: is a {detokenizer.kind.title}, not a Divot de-tokenizer")
    loading.quiet_libraries(args)
    device, dtype = loading.placement(args)
    with loading.load_errors(folder.path):
        pipeline = getattr(cinetok, name).from_parts(folder.path, detokenizer.path, dtype=dtype)
    return loading.settle(pipeline, args, device)


def _write_story(args, output, data):
    """Clips one after another in a video, or each in a file of a folder with `story.json`."""
    import os

    from ..video import write_video
    from .generative import to_bytes

    clips, ending = output.stories[0], output.endings[0]
    captions = [clip.caption for clip in clips]
    data.update(fps=output.fps, captions=captions, ending=ending, num_frames=sum(len(clip.frames) for clip in clips))
    target = Path(args.output)
    if target.suffix:
        write_video(target, (to_bytes(clip.frames, "truncate") for clip in clips), output.fps)
    else:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.absolute().parent))
        try:
            data["clips"] = [f"clip_{i:02d}.mp4" for i in range(len(clips))]
            for name, clip in zip(data["clips"], clips):
                write_video(temporary / name, to_bytes(clip.frames, "truncate"), output.fps)
            story = {name: data[name] for name in ("prompt", "captions", "ending", "clips", "fps")}
            (temporary / "story.json").write_text(json.dumps(story, indent=2) + "\n", encoding="utf-8")
            temporary.chmod(0o755)
            if target.is_dir():
                target.rmdir()
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    lines = [f"wrote {target}: {len(clips)} clips", *(f"{i}. {text}" for i, text in enumerate(captions, 1))]
    return Result(data, "\n".join([*lines, *([ending] if ending else [])]))


def _video_lavit(args, folder, is_picture):
    from . import generative, loading

    _only_for(args, "Video-LaVIT", ("story", "detokenizer"))
    if not args.prompt and args.image is None:
        raise CommandError("give a prompt, an --image, or both")
    image = None
    if args.image is not None:
        from PIL import Image, UnidentifiedImageError

        try:
            image = Image.open(args.image).convert("RGB")
        except FileNotFoundError as error:
            raise CommandError(f"{args.image}: no such file") from error
        except (UnidentifiedImageError, OSError) as error:
            raise CommandError(f"{args.image}: not a readable image") from error
    pipeline = loading.load_pipeline(folder, args)
    options = _sampling(args)
    if args.max_new_tokens is not None:
        options.update(max_image_tokens=args.max_new_tokens, max_motion_tokens=args.max_new_tokens)
    if args.steps is not None and not is_picture:
        options["keyframe_num_inference_steps"] = args.steps
    names = ("height", "width", "keyframe_height", "keyframe_width", "negative_prompt")
    options.update({name: getattr(args, name) for name in names if getattr(args, name) is not None})
    output = pipeline(
        args.prompt or None,
        image=image,
        modality="image" if is_picture else "video",
        num_clips=args.num_clips,
        **options,
    )
    frames = output.images if is_picture else output.frames[0]
    generative.write_media(args.output, frames, generative.MOTION_FPS)
    data = {"output": args.output, "model": str(folder.path), "prompt": args.prompt, "num_frames": len(frames)}
    data["fps"] = generative.MOTION_FPS
    return Result(data, _wrote(args, data))
