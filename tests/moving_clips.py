"""Small clips in which a texture moves by a known step, as frames and as files."""

from fractions import Fraction

import av
import torch

HEIGHT, WIDTH = 64, 96


def texture(height, width, seed=0):
    """A smooth random picture, larger than the frame in both directions."""
    noise = torch.randn(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    picture = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic")[0]
    return ((picture.tanh() + 1) * 127).to(torch.uint8).permute(1, 2, 0).numpy()


def moving_frames(count, step=(2, 1), height=HEIGHT, width=WIDTH, seed=0):
    """The texture moves by `step` = (x, y) pixels a frame."""
    big = texture(height + 4 * count, width + 4 * count, seed)
    return [big[2 * count - t * step[1] :][:height, 2 * count - t * step[0] :][:, :width].copy() for t in range(count)]


def write(path, frames, fps=12, codec="mpeg4", **options):
    with av.open(path, "w", **({"format": options.pop("format")} if "format" in options else {})) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = options.pop("pix_fmt", "yuv420p")
        stream.bit_rate = 8_000_000
        stream.gop_size = 12
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def moving_clip(folder, num_frames):
    """Path of an H.264 file of `moving_frames`."""
    return str(write(str(folder / "clip.mp4"), moving_frames(num_frames), codec="libx264"))
