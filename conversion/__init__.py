"""Conversion of the authors' checkpoints. One adapter per system (`conversion/<system>.py`), all with the same surface:

- `RELEASES`: tuple of `Release`
- `COMPONENTS`: component name -> function(config) -> `StateDictMapping`
- `manifest_parts(stem, manifest)`: list of `ManifestPart`, for `tests/run_manifests.py`
- `convert(checkpoints, output, *, release, original_config, keep_training_state, **options)`: writes a loadable folder;
  may return the `Release` its model card describes (needed when it was given none)
- `card_facts(release)` (optional): template variables of its model card (see `model_cards/__init__.py`)
- `DEFERRED_MANIFESTS` (optional): manifest stem -> why it is not checked yet
"""

import importlib
import importlib.util
from pathlib import Path

from ..errors import CheckpointError
from .releases import Release

SYSTEMS = ("vidtok", "vidtwin", "divot", "video_lavit", "seer")


def adapter(system):
    """The conversion module of a system. Raises ValueError for an unknown name."""
    if system not in SYSTEMS:
        raise ValueError(f"unknown system {system!r}; choose from {', '.join(SYSTEMS)}")
    return importlib.import_module(f".{system}", __name__)


def _available():
    return [s for s in SYSTEMS if importlib.util.find_spec(f".{s}", __name__) is not None]


def releases(system=None):
    """All releases known, of one system or of all: list of `Release`."""
    return [release for name in ([system] if system else _available()) for release in adapter(name).RELEASES]


def find_release(name, system=None):
    """The release called `name`. Raises CheckpointError with the closest names when there is none."""
    import difflib

    known = {release.name: release for release in releases(system)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise CheckpointError(f"unknown release {name!r}{hint} `cinetok convert --list` shows all names")
    return known[name]


def state_dict_names(system, component, config):
    """The two-way mapping (`.to_hf`, `.from_hf`) between the original names of a component and ours."""
    components = adapter(system).COMPONENTS
    if component not in components:
        raise ValueError(f"{system} has no component {component!r}; choose from {', '.join(components)}")
    return components[component](config)


def manifest_parts(system, stem, manifest):
    """Which modules the tensors of a released file fill (see `ManifestPart`)."""
    return adapter(system).manifest_parts(stem, manifest)


class _DeferredManifests:
    def get(self, key, default=None):
        system, stem = key
        if system not in _available():
            return default
        return getattr(adapter(system), "DEFERRED_MANIFESTS", {}).get(stem, default)


DEFERRED_MANIFESTS = _DeferredManifests()


def convert_checkpoint(
    system,
    checkpoint,
    output,
    *,
    release=None,
    original_config=None,
    keep_training_state=False,
    push_to_hub=None,
    **options,
):
    """Converts an original checkpoint into a folder that the Auto classes or pipelines load.

    Args:
        system: "vidtok", "vidtwin", "divot", "video_lavit" or "seer".
        checkpoint: path of a file or folder, or a list of them.
        output: folder to create. It appears only when everything succeeded.
        release: name of the release the checkpoint is (see `releases()`).
        original_config: the original repository's own .yaml/.json (or an already parsed dict) instead of `release`.
        keep_training_state: also keep what only continued training needs (discriminator, logvar) in a file of its own.
        push_to_hub: Hub id to push the folder to afterwards; the repository is created if there is none.
        options: further options of the system's converter.

    Returns:
        Path of the folder.

    Raises:
        CheckpointError: anything missing, unexpected or of another shape, or the disk is full; nothing is left
            behind then.
        ValueError: neither or both of `release` and `original_config` given.
    """
    from ..model_cards import write_card
    from .checkpoints import atomic_folder
    from .original_config import read_original_config

    module = adapter(system)
    paths = [Path(p) for p in (checkpoint if isinstance(checkpoint, (list, tuple)) else [checkpoint])]
    if (release is None) == (original_config is None):
        raise ValueError("give exactly one of `release` (a name from `cinetok convert --list`) and `original_config`")
    known = find_release(release, system) if release is not None else None
    parsed = read_original_config(original_config) if original_config is not None else None
    with atomic_folder(output) as folder:
        described = module.convert(
            paths,
            folder,
            release=known,
            original_config=parsed,
            keep_training_state=keep_training_state,
            **options,
        )
        described = described if isinstance(described, Release) else known
        if described is not None and not (folder / "README.md").exists():
            write_card(folder, described, model_id=push_to_hub or Path(output).name)
    if push_to_hub:
        from .hub import push_folder

        push_folder(output, push_to_hub)
    return Path(output)


__all__ = ["SYSTEMS", "convert_checkpoint", "find_release", "manifest_parts", "releases", "state_dict_names"]
