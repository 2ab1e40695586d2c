"""Reading and writing video with PyAV (which ships its own FFmpeg) and Pillow; nothing else is needed."""

import importlib

from .clip import VideoClip
from .reading import iter_video, read_video
from .writing import VideoWriter, write_video

_COMPARISON = ("plot_quality", "save_comparison_picture", "side_by_side", "write_comparison")
_LAZY = {"read_motion_vectors": ".motion", **dict.fromkeys(_COMPARISON, ".comparison")}

__all__ = ["VideoClip", "VideoWriter", "iter_video", "read_video", "write_video", *_LAZY]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
