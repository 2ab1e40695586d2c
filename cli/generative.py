"""Videos through the Divot and Video-LaVIT de-tokenizers, and what they generate: shared by several commands."""

import numpy as np

from ..errors import TokenFileError
from . import common, token_files
from .common import CommandError, Result
from .loading import load_pipeline, seeded

MOTION_FPS = 6.0  # Video-LaVIT's videos
RAW_MOTION_FPS = 12.0  # of the authors' example of raw motion
_DETOKENIZERS = {"divot": "DivotReconstructionPipeline", "video_lavit": "VideoLavitReconstructionPipeline"}


def _options(args):
    """Sampling options that were given; the pipelines' defaults are the released settings."""
    options = {"generator": seeded(args), "output_type": "np"}
    if args.steps is not None:
        options["num_inference_steps"] = args.steps
    if args.guidance_scale is not None:
        options["guidance_scale"] = args.guidance_scale
    return options


def _load_detokenizer(folder, args):
    """The pipeline that reads and makes videos; a folder may hold more (Video-LaVIT's language model)."""
    return load_pipeline(folder, args, _DETOKENIZERS[folder.kind.system])


def to_bytes(frames, rounding="nearest"):
    """Array (num_frames, height, width, 3) in [0, 1] -> uint8. The originals differ: Divot's truncates ("truncate")."""
    scaled = np.asarray(frames) * 255
    return (np.round(scaled) if rounding == "nearest" else scaled).astype(np.uint8)


def reconstruct(args, folder):
    """`cinetok reconstruct` with a de-tokenizer: what the model makes of what it kept of a video."""
    from ..video import side_by_side, write_video

    _check_reading(args)
    _check_lavit_options(args, folder)
    pipeline = _load_detokenizer(folder, args)
    start = 0.0
    if folder.kind.system == "divot":
        output = pipeline(args.video, **_options(args))
        frames, fps = to_bytes(output.frames[0], "truncate"), output.fps
    else:
        if args.quantize_motion and pipeline.motion_tokenizer is None:
            raise CommandError(f"{folder.path}: was made without a motion tokenizer, which --quantize-motion needs")
        # A folder with a motion tokenizer holds the network that was trained on motion from its codes.
        raw = args.raw_motion or pipeline.motion_tokenizer is None
        motion_fps = args.motion_fps or (RAW_MOTION_FPS if raw else None)
        motion = pipeline._motion_processor().read(args.video, fps=motion_fps)
        clip = pipeline._motion_processor().clip_for_reconstruction(motion, 1, 1)
        start, fps = clip.start / motion.fps, motion.fps
        options = {"quantize_motion": not raw, "start": clip.start, **_picture_size(args), **_options(args)}
        frames = to_bytes(pipeline(motion, **options).frames[0])
    if not args.only:
        frames = side_by_side(_input_at(args.video, start, fps, len(frames), frames.shape[1:3]), frames)
    write_video(args.output, frames, fps)
    data = {
        "video": args.video,
        "model": str(folder.path),
        "num_frames": len(frames),
        "fps": fps,
        "output": args.output,
    }
    note = "frames are generated, so they resemble the input without being equal to it; no PSNR is computed"
    return Result(data, f"wrote {args.output}: {len(frames)} frames at {fps:g} fps\n{note}")


def _picture_size(args):
    """Video-LaVIT: the size that was asked for; the default is the released network's."""
    return {name: getattr(args, name) for name in ("height", "width") if getattr(args, name) is not None}


def _check_lavit_options(args, folder):
    for name in ("height", "width", "raw_motion", "quantize_motion", "motion_fps"):
        if folder.kind.system != "video_lavit" and getattr(args, name, None):
            raise CommandError(f"--{name.replace('_', '-')} is for Video-LaVIT")


def _check_reading(args):
    if args.fps is not None or args.start or args.end is not None:
        raise CommandError("--fps, --start and --end are for VidTok and VidTwin; these models choose frames themselves")


def _input_at(path, start, fps, num_frames, size):
    """Frames of the input at the times of generated ones, cropped to their shape; the last one is repeated where the
    input ends earlier."""
    from PIL import Image, ImageOps

    from ..video import iter_video

    frames = []
    for clip in iter_video(path, chunk_frames=16, fps=fps, start=start):
        for frame in clip.frames:
            frames.append(np.asarray(ImageOps.fit(Image.fromarray(frame), (size[1], size[0]), Image.BILINEAR)))
        if len(frames) >= num_frames:
            break
    frames += [frames[-1]] * (num_frames - len(frames))
    return np.stack(frames[:num_frames])


# ------------------------------------------------------------------------------------------------------------ tokens


def tokenize(args, folder):
    """Writes the features (Divot) or codes (Video-LaVIT) of a video; returns the facts."""
    import torch

    _check_reading(args)
    if args.size or args.crop or args.sample or args.tile_size:
        raise CommandError("--size, --crop, --sample and --tile-size are for VidTok and VidTwin")
    if args.chunk_frames:
        raise CommandError("--chunk-frames is for VidTok")
    pipeline = _load_detokenizer(folder, args)
    facts = {"system": folder.kind.system, "source": str(args.video), "model": args.model}
    if folder.kind.system == "divot":
        features, clips, frames = pipeline.encode_video(args.video)
        tensors = {"features": features.cpu()}
        facts.update(num_frames=frames[0], fps=float(pipeline.video_processor.fps), num_clips=clips[0])
        modules = (pipeline.video_tokenizer,)
    else:
        tokens = pipeline.tokenize(args.video, generator=seeded(args))
        visual = tokens.visual_indices
        tensors = {
            "visual_indices": torch.cat(visual).to(torch.int32).cpu(),
            "motion_indices": tokens.motion_indices.to(torch.int32).cpu(),
        }
        motion = pipeline._motion_processor()
        facts.update(
            num_frames=len(visual) * motion.num_frames,
            fps=float(motion.fps),
            visual_lengths=[len(codes) for codes in visual],
            clip_starts=tokens.clip_starts[0],
        )
        modules = (pipeline.visual_tokenizer, pipeline.motion_tokenizer)
    facts["fingerprint"] = token_files.fingerprint(*modules)
    token_files.save(args.output, tensors, **facts)
    return {**facts, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}


def detokenize(args, folder):
    """Writes the video that features or codes stand for; returns the facts."""
    import torch

    from ..video import write_video

    if args.tile_size or args.branch != "all":
        raise CommandError("--tile-size and --branch are for VidTok and VidTwin")
    _check_lavit_options(args, folder)
    pipeline = _load_detokenizer(folder, args)
    if folder.kind.system == "divot":
        current = token_files.fingerprint(pipeline.video_tokenizer)
        tensors, facts = token_files.load(args.tokens, "divot", current, ("features",))
        output = pipeline(
            features=tensors["features"],
            clips_per_video=[facts["num_clips"]],
            frames_per_video=[facts["num_frames"]],
            **_options(args),
        )
        frames = [output.frames[0]]
    else:
        if pipeline.visual_tokenizer is None or pipeline.motion_tokenizer is None:
            raise CommandError(f"{folder.path}: was made without tokenizers, so it cannot read codes")
        current = token_files.fingerprint(pipeline.visual_tokenizer, pipeline.motion_tokenizer)
        wanted = ("visual_indices", "motion_indices")
        tensors, facts = token_files.load(args.tokens, "video_lavit", current, wanted)
        if sum(facts["visual_lengths"]) != len(tensors["visual_indices"]):
            raise TokenFileError(f"{args.tokens}: incomplete; tokenize the video again")
        visual = tensors["visual_indices"].to(torch.int64).split(facts["visual_lengths"])
        options = _options(args)
        if args.steps is not None:
            options["keyframe_num_inference_steps"] = args.steps
        frames = [
            pipeline(
                image_indices=[codes],
                motion_indices=motion[None].to(torch.int64),
                **_picture_size(args),
                **options,
            ).frames[0]
            for codes, motion in zip(visual, tensors["motion_indices"])
        ]
    fps = args.fps or facts["fps"]
    rounding = "truncate" if folder.kind.system == "divot" else "nearest"
    write_video(args.output, (to_bytes(clip, rounding) for clip in frames), fps)
    return {"num_frames": sum(len(clip) for clip in frames), "fps": fps}


def write_media(path, frames, fps, rounding="nearest"):
    """Writes generated frames (num_frames, height, width, 3) in [0, 1]; a picture for a picture's suffix."""
    from pathlib import Path

    from ..video import write_video

    frames = to_bytes(frames, rounding)
    if Path(path).suffix.lower() in common.PICTURES[:3]:
        return save_picture(path, frames[0])
    return write_video(path, frames, fps)


def save_picture(path, array):
    """Writes one uint8 picture (height, width, 3); the file appears only when it is complete."""
    import os
    import tempfile
    from pathlib import Path

    from PIL import Image

    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(array).save(file, {".jpg": "jpeg"}.get(path.suffix.lower(), path.suffix[1:].lower()))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
