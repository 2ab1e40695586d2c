"""Packs golden cases for committing: `python tests/pack_goldens.py DIR [DIR ...]`.

Every .safetensors file below the DIRs is replaced by a .safetensors.xz with the same bytes inside (`xz -d` gives the file
back; `golden_kinds.load_tensors` reads both), which keeps the recorded numbers in the repository small.
"""

import argparse
import lzma
from pathlib import Path

# Numbers of 4 bytes and of 1 byte: which of an element's bytes a byte is predicts it well.
_FILTERS = [
    [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 2, "pb": 2}],
    [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 1, "lp": 1, "pb": 1}],
    [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 4, "lp": 0, "pb": 0}],
]


def pack(path):
    """Replaces one file; returns the new path."""
    data = Path(path).read_bytes()
    packed = min((lzma.compress(data, filters=filters) for filters in _FILTERS), key=len)
    if lzma.decompress(packed) != data:
        raise RuntimeError(f"{path}: could not be packed without loss")
    result = Path(f"{path}.xz")
    result.write_bytes(packed)
    Path(path).unlink()
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="DIR")
    for folder in parser.parse_args(argv).folders:
        for path in sorted(Path(folder).rglob("*.safetensors")):
            size = path.stat().st_size
            result = pack(path)
            print(f"{result}: {size} -> {result.stat().st_size} bytes")


if __name__ == "__main__":
    main()
