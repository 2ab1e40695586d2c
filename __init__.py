"""cinetok: VidTok, VidTwin, Divot, Video-LaVIT and Seer as transformers and diffusers models.

Every public name is imported on first use, so `import cinetok` costs milliseconds. It also makes the Auto classes of
transformers and the generic `DiffusionPipeline.from_pretrained` know the models (see `_registration.py`).
"""

import importlib

from ._exports import DIFFUSERS_BASES, EXPORTS
from ._registration import install as _install_registration

__version__ = "0.1.0"
__all__ = [*EXPORTS, "__version__"]


def __getattr__(name):
    if name in EXPORTS:
        value = getattr(importlib.import_module(EXPORTS[name], __name__), name)
    elif name in DIFFUSERS_BASES:
        value = getattr(importlib.import_module(DIFFUSERS_BASES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


_install_registration()
