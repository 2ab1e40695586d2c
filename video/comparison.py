"""Looking at a reconstruction beside its original: side-by-side video, a picture of a few frames, a plot per frame."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np

from .writing import VideoWriter, _as_frames


def side_by_side(original, reconstruction, gap=0):
    """Frames with the original left and the reconstruction right.

    Args:
        original, reconstruction: uint8 (num_frames, height, width, 3) arrays, tensors or clips of one shape.
        gap: white pixels between them.

    Returns:
        uint8 array (num_frames, height, 2 * width + gap, 3).
    """
    left, right = _as_frames(original), _as_frames(reconstruction)
    if left.shape != right.shape:
        raise ValueError(f"original and reconstruction differ in shape: {left.shape} and {right.shape}")
    if gap:
        middle = np.full((*left.shape[:2], gap, 3), 255, dtype=np.uint8)
        return np.concatenate([left, middle, right], axis=2)
    return np.concatenate([left, right], axis=2)


def write_comparison(path, original, reconstruction, fps, *, gap=0, **options):
    """Writes a video with the original left and the reconstruction right.

    Args:
        path: file to write; the suffix selects the format as for `write_video`.
        original, reconstruction: uint8 frames or clips of one shape, or two iterables of such pieces that arrive in
            step (streamed in constant memory).
        fps: frames per second.
        gap: white pixels between the two.
        options: further arguments of `write_video`.

    Raises:
        ValueError: the two differ in shape or number of frames; nothing is written then.
    """
    whole = all(hasattr(video, "frames") or hasattr(video, "ndim") for video in (original, reconstruction))
    pairs = [(original, reconstruction)] if whole else _in_step(original, reconstruction)
    with VideoWriter(path, fps, **options) as writer:
        for left, right in pairs:
            writer.write(side_by_side(left, right, gap))
    return writer.path


def _in_step(original, reconstruction):
    nothing = object()
    rights = iter(reconstruction)
    for left in original:
        right = next(rights, nothing)
        if right is nothing:
            raise ValueError("the reconstruction has fewer pieces than the original")
        yield left, right
    if next(rights, nothing) is not nothing:
        raise ValueError("the reconstruction has more pieces than the original")


def save_comparison_picture(path, original, reconstruction, num_frames=4):
    """Saves a picture with a few frames of the original above the same frames of the reconstruction (PNG, JPEG, ...).

    Args:
        path: file to write; original, reconstruction: uint8 (num_frames, height, width, 3) of one shape.
        num_frames: how many, spread evenly over the video; all of them when it has fewer.
    """
    from PIL import Image

    from .sampling import uniform_indices

    top, bottom = _as_frames(original), _as_frames(reconstruction)
    if top.shape != bottom.shape:
        raise ValueError(f"original and reconstruction differ in shape: {top.shape} and {bottom.shape}")
    chosen = uniform_indices(len(top), min(num_frames, len(top)))
    rows = [np.concatenate([video[i] for i in chosen], axis=1) for video in (top, bottom)]
    _save_bytes(path, lambda file, form: Image.fromarray(np.concatenate(rows)).save(file, form.replace("jpg", "jpeg")))
    return Path(path)


def plot_quality(path, per_frame, fps=None, title=None):
    """Plots quality per frame (needs matplotlib: `pip install 'cinetok[plots]'`).

    Args:
        path: picture to write (.png, .svg, .pdf).
        per_frame: name -> values in the order of the frames, as `VideoQuality.per_frame`.
        fps: frames per second, to label the axis in seconds.
        title: heading.

    Raises:
        ImportError: matplotlib is not installed. ValueError: nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the quality plot needs matplotlib: pip install 'cinetok[plots]'") from error
    if not per_frame or not all(len(values) for values in per_frame.values()):
        raise ValueError("per_frame has no values to plot")
    labels = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
    figure = Figure(figsize=(8, 2.2 * len(per_frame) + 0.4), layout="constrained")
    axes = figure.subplots(len(per_frame), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, per_frame.items()):
        values = np.asarray(values, dtype=np.float64)
        positions = np.arange(len(values)) / (fps or 1)
        axis.plot(positions, values, linewidth=1, marker="." if len(values) < 100 else None)
        axis.axhline(values.mean(), linewidth=0.8, linestyle="--", color="gray")
        axis.set_ylabel(labels.get(name, name))
        axis.set_title(f"mean {values.mean():.4g}, lowest {values.min():.4g}", fontsize="small", loc="right")
    axes[-1].set_xlabel("time (s)" if fps else "frame")
    if title:
        figure.suptitle(title)
    _save_bytes(path, lambda file, form: figure.savefig(file, format=form))
    return Path(path)


def _save_bytes(path, save):
    """Renders in memory, then writes beside `path` and moves into place."""
    path = Path(path)
    if not path.suffix:
        raise ValueError(f"{path}: needs a suffix such as .png")
    buffer = io.BytesIO()
    save(buffer, path.suffix[1:].lower())
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getvalue())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
