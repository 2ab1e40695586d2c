"""`cinetok evaluate`: PSNR and SSIM of a tokenizer over many videos, by the rules of VidTok's evaluation."""

import csv
import io
import json
from pathlib import Path

from . import common
from .common import CommandError, Result
from .models import find_model

HELP = "measure a tokenizer on many videos (VidTok's protocol)"
EXAMPLE = """  cinetok evaluate videos/ --csv results.csv
  cinetok evaluate videos/ --model vidtok_kl_causal_488_4chn --size 256 --fps 30 --sample --output results.json"""
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".mpg", ".mpeg")


def add_arguments(parser):
    parser.add_argument("videos", nargs="+", metavar="PATH", help="video files, or folders of them")
    common.add_model(parser, "VidTok or VidTwin; default: bundled VidTok")
    parser.add_argument("--size", type=common.positive_int, metavar="PIXELS", help="VidTok: resize and crop to (256)")
    parser.add_argument(
        "--fps",
        type=common.positive_float,
        default=30.0,
        help="rate to sample at: every n-th frame is taken, n = the nearest whole number (default: 30)",
    )
    parser.add_argument(
        "--mode",
        choices=("clips", "whole"),
        help="independent clips, or videos as a whole (default: whole for causal VidTok v1.1, clips otherwise)",
    )
    parser.add_argument(
        "--chunk-frames",
        type=common.positive_int,
        metavar="N",
        help="VidTok: frames per clip (16; causal: + 1)",
    )
    common.add_sampling(parser)
    parser.add_argument("--csv", metavar="FILE", help="table to write, one line per video")
    parser.add_argument("--output", "-o", metavar="FILE", help="JSON to write, with the values of every frame")


def run(args):
    videos = _find_videos(args.videos)
    common.check_file_output(args.csv, (".csv",))
    common.check_file_output(args.output, (".json",))
    folder = find_model(args.model, "evaluate")
    from . import loading
    from .evaluation import evaluate_video

    model, processor = loading.load_tokenizer(folder, args)
    is_vidtwin = model.config.model_type == "vidtwin"
    if is_vidtwin:
        _check_vidtwin(model.config, args)
    args.size, args.chunk_frames = args.size or 256, args.chunk_frames or common.CHUNK_FRAMES
    if not is_vidtwin:
        processor.do_resize = processor.do_center_crop = True
        processor.size = {"shortest_edge": args.size}
        processor.crop_size = {"height": args.size, "width": args.size}
    mode = args.mode or ("whole" if getattr(model.config, "version", None) == "1.1" else "clips")
    if mode == "whole" and (is_vidtwin or not model.config.is_causal):
        raise CommandError("--mode whole is for causal VidTok models; the others work on clips of fixed length")
    generator = loading.seeded(args)
    results = []
    for video in _bar(videos, common.progress(args)):
        quality = evaluate_video(model, processor, video, mode, args, generator)
        results.append({"video": str(video), **quality.compute(), "per_frame": quality.per_frame})
    total = sum(result["num_frames"] for result in results)
    summary = {"videos": len(results), "num_frames": total}
    for name in ("psnr", "ssim"):
        summary[name] = sum(result[name] * result["num_frames"] for result in results) / total
    settings = {"mode": mode, "size": args.size, "fps": args.fps, "chunk_frames": args.chunk_frames}
    settings.update(sample=args.sample, seed=args.seed, dtype=args.dtype)
    if is_vidtwin:
        settings.update(size=[model.config.height, model.config.width], chunk_frames=model.config.num_frames)
    data = {"model": str(folder.path), "settings": settings, "mean": summary, "results": results}
    if args.csv:
        common.write_text(args.csv, _csv(results, summary))
    if args.output:
        common.write_text(args.output, json.dumps(data, indent=1) + "\n")
    rows = [("VIDEO", "FRAMES", "PSNR", "SSIM")]
    rows += [(Path(r["video"]).name, r["num_frames"], f"{r['psnr']:.2f}", f"{r['ssim']:.4f}") for r in results]
    rows.append(("mean over frames", total, f"{summary['psnr']:.2f}", f"{summary['ssim']:.4f}"))
    written = [f"wrote {path}" for path in (args.csv, args.output) if path]
    return Result(data, "\n".join([common.table(rows), *written]))


def _check_vidtwin(config, args):
    """Window and frame size are part of the model."""
    for name, value, own in (
        ("size", args.size, {config.height, config.width}),
        ("chunk-frames", args.chunk_frames, {config.num_frames}),
    ):
        if value is not None and own != {value}:
            raise CommandError(
                f"--{name} {value}: this VidTwin takes {config.num_frames} frames of {config.height}x{config.width} "
                "pixels at a time"
            )


def _find_videos(paths):
    videos = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
            if not found:
                raise CommandError(f"{path}: no videos in this folder ({', '.join(VIDEO_SUFFIXES)})")
            videos += found
        elif path.is_file():
            videos.append(path)
        else:
            raise CommandError(f"{path}: no such file or folder")
    return videos


def _csv(results, summary):
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["video", "num_frames", "psnr", "ssim"])
    for row in [*results, {"video": "mean over frames", **summary}]:
        writer.writerow([row["video"], row["num_frames"], f"{row['psnr']:.6f}", f"{row['ssim']:.6f}"])
    return buffer.getvalue()


def _bar(items, show):
    from tqdm.auto import tqdm

    return tqdm(items, desc="evaluate", unit="video", disable=not show)
