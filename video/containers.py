"""Is a media file all there? Compares the sizes its container declares with the size of the file, without decoding.

FFmpeg reads what it can: an MP4 with its index in front, a Matroska file or a GIF that was cut off play without any
error, only shorter. Their containers say how long they should be.
"""

import os
import struct

_MATROSKA_SEGMENT = 0x18538067
_MATROSKA_CLUSTER = 0x1F43B675
_MATROSKA_IN_CLUSTER = {0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xAF, 0x5854, 0xEC, 0xBF}  # timestamp, blocks, sizes, padding
_MATROSKA_TOP = {
    0x114D9B74,  # SeekHead
    0x1549A966,  # Info
    0x1654AE6B,  # Tracks
    _MATROSKA_CLUSTER,
    0x1C53BB6B,  # Cues
    0x1941A469,  # Attachments
    0x1043A770,  # Chapters
    0x1254C367,  # Tags
    0xEC,  # Void
    0xBF,  # CRC-32
}


def container_problem(path):
    """What the container of a file shows to be missing or damaged, in words; None when nothing (or nothing known)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(0)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _iso_problem(file, size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _matroska_problem(file, size)
        if head[:4] == b"RIFF":
            return _riff_problem(file, size)
        if head[:6] in (b"GIF87a", b"GIF89a"):
            return _gif_problem(file, size)
    return None


def _cut(size, declared):
    return f"the file is cut off: it has {size} of at least {declared} bytes"


def _iso_problem(file, size):
    """MP4/MOV: a chain of boxes (ISO/IEC 14496-12); each gives its size, 0 meaning "to the end of the file"."""
    position, seen = 0, set()
    while position < size:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            return _cut(size, position + 8)
        length, kind = struct.unpack(">I4s", header[:8])
        if length == 1:
            if len(header) < 16:
                return _cut(size, position + 16)
            length = struct.unpack(">Q", header[8:])[0]
        elif length == 0:
            length = size - position
        if length < 8:
            if not header.strip(b"\0"):  # zeros after the last box: padding, or a hole of a partial download
                break
            return f"the file is damaged: a box at byte {position} declares {length} bytes"
        seen.add(kind)
        if position + length > size:
            return _cut(size, position + length)
        position += length
    if b"moov" not in seen:
        return "the file is cut off: its index (moov box) is missing"
    return None


def _ebml_number(file, keep_marker):
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    rest = file.read(length - 1)
    if len(rest) < length - 1:
        return None
    value = first[0] if keep_marker else first[0] & ((1 << (8 - length)) - 1)
    number = int.from_bytes(bytes([value]) + rest, "big")
    if not keep_marker and number == (1 << (7 * length)) - 1:
        return -1  # "unknown size", as live recordings have
    return number


def _matroska_problem(file, size, check_cluster=None):
    """Matroska/WebM: EBML elements (RFC 8794); the Segment declares its size, clusters follow each other in it."""
    position = 0
    while position < size:
        file.seek(position)
        identifier, length = _ebml_number(file, True), _ebml_number(file, False)
        if identifier is None or length is None:
            return f"the file is cut off or damaged at byte {position}"
        start = file.tell()
        if identifier == _MATROSKA_SEGMENT:
            if length >= 0 and start + length > size:
                return _cut(size, start + length)
            return _segment_problem(file, start, size if length < 0 else start + length, size, check_cluster)
        if length < 0 or start + length > size:
            return _cut(size, start + max(length, 0))
        position = start + length
    return "the file is cut off: it has no segment"


def matroska_block_problem(path):
    """The same for the blocks inside the clusters of a Matroska file, where FFmpeg skips what it cannot parse; None for
    other files. Takes a look at every block: worth it only beside decoding the whole file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(4) != b"\x1a\x45\xdf\xa3":
            return None
        file.seek(0)
        return _matroska_problem(file, size, _check_cluster)


def _check_cluster(file, position, end):
    while position < end:
        file.seek(position)
        identifier, length = _ebml_number(file, True), _ebml_number(file, False)
        if identifier not in _MATROSKA_IN_CLUSTER or length is None or length < 0:
            return f"the file is damaged: no known element at byte {position}"
        position = file.tell() + length
    return None


def _segment_problem(file, position, end, size, check_cluster):
    while position < end:
        file.seek(position)
        identifier, length = _ebml_number(file, True), _ebml_number(file, False)
        if identifier not in _MATROSKA_TOP or length is None:
            return f"the file is damaged: no known element at byte {position}"
        if length < 0:
            return None  # a live recording: where it should end is not known
        start, position = file.tell(), file.tell() + length
        if position > size:
            return _cut(size, position)
        if check_cluster and identifier == _MATROSKA_CLUSTER and (problem := check_cluster(file, start, position)):
            return problem
    return None


def _riff_problem(file, size):
    """AVI and WebP: RIFF chunks; large AVI files have several, one after the other."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF":
            return None  # something was appended
        if position + 8 + length > size:
            return _cut(size, position + 8 + length)
        position += 8 + length + length % 2
    return None


def _gif_problem(file, size):
    """GIF: blocks up to a trailer byte."""
    header = file.read(13)
    if len(header) < 13:
        return _cut(size, 13)
    if header[10] & 0x80:
        file.seek(3 << ((header[10] & 7) + 1), os.SEEK_CUR)

    def skip_sub_blocks():
        while True:
            length = file.read(1)
            if not length:
                return False
            if not length[0]:
                return True
            file.seek(length[0], os.SEEK_CUR)

    images = 0
    while True:
        kind = file.read(1)
        if kind == b";":
            return None
        if kind == b"!":
            file.read(1)
        elif kind == b",":
            descriptor = file.read(9)
            if len(descriptor) == 9:
                if descriptor[8] & 0x80:
                    file.seek(3 << ((descriptor[8] & 7) + 1), os.SEEK_CUR)
                file.read(1)
                images += 1
        elif kind and kind != b"\0":
            return f"the file is damaged: unknown block at byte {file.tell() - 1}"
        if not kind or (kind != b"\0" and not skip_sub_blocks()):
            return f"the file is cut off in or after image {images}: the trailer is missing"


def webp_durations(path):
    """Milliseconds every frame of an animated WebP is shown, from its ANMF chunks; empty for other files."""
    durations = []
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
            return durations
        position = 12
        while position + 8 <= size:
            file.seek(position)
            kind, length = struct.unpack("<4sI", file.read(8))
            if kind == b"ANMF":
                durations.append(int.from_bytes(file.read(16)[12:15], "little"))
            position += 8 + length + length % 2
    return durations
