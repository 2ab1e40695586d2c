"""Lets a CUDA build of torchvision import beside a CPU-only torch: its import asks for two operators that such a build
cannot register. Everything the processors use of it is plain torch. Users with matching builds need nothing."""

import torch

_library = None


def install():
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library("torchvision", "DEF")  # the reference keeps the operators alive
        for name in ("nms", "qnms"):
            _library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        pass
