"""What subcommands share: their result, early checks of outputs, progress, options, tables."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_FRAMES = 16  # that VidTok encodes at a time unless told otherwise
_LONGEST_ERROR = 600


class CommandError(Exception):
    """An error of what the user asked for; its message is all that is shown."""


@dataclass
class Result:
    """What a command prints: `text` for people, `data` with `--json`."""

    data: dict = field(default_factory=dict)
    text: str = ""


def one_line(error):
    """The message of an error on one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + " ... (--debug shows all)"


def progress(args):
    """Whether to show progress bars: on a terminal, unless --quiet."""
    return not args.quiet and sys.stderr.isatty()


# --------------------------------------------------------------------------------------------------------- arguments


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


# argparse names the type in its messages
positive_int.__name__ = "whole number"
positive_float.__name__ = "number"


def add_model(parser, what, required=False):
    """--model, --device and --dtype."""
    parser.add_argument("--model", required=required, metavar="FOLDER", help=f"{what} (folder or Hub id)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision of the weights"
    )


def add_range(parser):
    """--fps, --start and --end of what is read."""
    parser.add_argument("--fps", type=positive_float, help="frames per second to read at (default: the file's)")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="where to begin")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="where to stop (default: the end)")


def add_size(parser):
    """--size and --crop (VidTok)."""
    parser.add_argument(
        "--size", type=positive_int, metavar="PIXELS", help="resize the shorter side (default: keep the size)"
    )
    parser.add_argument("--crop", action="store_true", help="with --size: cut out the central square")


def add_sampling(parser):
    """--sample and --seed (tokenizers)."""
    parser.add_argument("--sample", action="store_true", help="sample the latents instead of taking their mean")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")


# ------------------------------------------------------------------------------------------------------------ checks


def existing_video(path):
    """Fails early where a video file or folder of pictures is missing."""
    if not Path(path).exists():
        raise CommandError(f"{path}: no such file")
    return path


def check_video_output(path, *inputs):
    """Fails, before anything is computed, for a path no video can be written to."""
    if path is None:
        return
    from ..video import VideoWriter

    _check_not_input(path, inputs)
    VideoWriter(path, 1).abort()  # checks suffix and folder; creates nothing
    _check_writable(path)


def check_file_output(path, suffixes, *inputs):
    """The same for other files; `suffixes` are those it may have."""
    if path is None:
        return
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise CommandError(f"{path}: the name must end in {' or '.join(suffixes)}")
    _check_not_input(path, inputs)
    if path.is_dir():
        raise CommandError(f"{path}: is a folder")
    _check_writable(path)


def _check_not_input(path, inputs):
    for source in inputs:
        if source is not None and Path(source).exists() and Path(source).resolve() == Path(path).resolve():
            raise CommandError(f"{path}: is the input; choose another output")


def _check_writable(path):
    import os

    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise CommandError(f"{path}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise CommandError(f"{path}: no permission to write in {parent}")


PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PLOTS = (".png", ".svg", ".pdf")


def check_plot(path):
    """Fails early for a plot that cannot be drawn or written."""
    if path is None:
        return
    import importlib.util

    check_file_output(path, PLOTS)
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("the plot needs matplotlib: pip install 'cinetok[plots]'")


def check_range(args):
    if args.start < 0 or (args.end is not None and args.end <= args.start):
        raise CommandError(f"need 0 <= --start < --end, got {args.start:g} and {args.end:g} seconds")


# ----------------------------------------------------------------------------------------------------------- writing


def write_text(path, text):
    """Writes a text file; it appears only when it is complete."""
    import os
    import tempfile

    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def table(rows):
    """Rows of strings as aligned columns."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def quality_text(quality):
    """PSNR and SSIM of a summary as a line."""
    parts = [f"PSNR {quality['psnr']:.2f} dB"]
    if "ssim" in quality:
        parts.append(f"SSIM {quality['ssim']:.4f}")
    return ", ".join(parts) + f" over {quality['num_frames']} frames"
