"""Manifests in small: `tests/manifests/<system>.json.xz` holds {file stem: {tensor name: shape}} of all releases.

`python tests/manifest_files.py FOLDER` packs a folder of manifests (its name is the system).
"""

import json
import lzma
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "manifests"


def load(system):
    """stem -> manifest as `tests/run_manifests.py` reads it."""
    packed = json.loads(lzma.decompress((FOLDER / f"{system}.json.xz").read_bytes()))
    return {
        stem: {"tensors": {name: {"shape": shape} for name, shape in tensors.items()}}
        for stem, tensors in packed.items()
    }


def pack(folder):
    """Writes the packed form of all manifests in `folder`; returns its path."""
    folder = Path(folder)
    manifests = {path.stem: json.loads(path.read_text())["tensors"] for path in sorted(folder.glob("*.json"))}
    shapes = {stem: {name: entry["shape"] for name, entry in tensors.items()} for stem, tensors in manifests.items()}
    path = FOLDER / f"{folder.name}.json.xz"
    path.write_bytes(lzma.compress(json.dumps(shapes, separators=(",", ":")).encode(), preset=9 | lzma.PRESET_EXTREME))
    return path


if __name__ == "__main__":
    print(pack(sys.argv[1]))
