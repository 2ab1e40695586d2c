"""Reading original checkpoints safely, loading them strictly, and writing results atomically."""

import contextlib
import errno
import json
import logging
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from .mapping import shorten

REPORT_FILE = "conversion.json"
logger = logging.getLogger(__name__)
_EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_WRITE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}


def read_checkpoint(path, left_out=None):
    """Reads every tensor of a checkpoint into one flat dictionary on the CPU.

    Args:
        path: a .ckpt/.bin/.pt/.pth file (read with the weights-only unpickler), a .safetensors file, or a folder with
            an index (`*.index.json`) or with shards of either kind.
        left_out: a list that receives the names of top-level entries that are not model tensors (optimizer states, step
            counters and the like of a training checkpoint).

    Returns:
        dict of name -> tensor. `{"state_dict": {...}}` and `{"module": {...}}` wrappers are unwrapped and a uniform
        leading "module." is stripped. Tensors stored in 8-bit floats are cast to float32, which is exact, and a log
        message says so: no model of transformers or diffusers computes in them or loads them as they are.

    Raises:
        CheckpointError: the file is missing, truncated, holds code instead of tensors, or no tensors.
    """
    path = Path(path)
    left_out = [] if left_out is None else left_out
    if path.is_dir():
        return _read_folder(path, left_out)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file or folder")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again") from error
        return _flatten(tensors, path, left_out)
    if path.suffix not in _PICKLES:
        raise CheckpointError(f"{path}: unknown checkpoint type {path.suffix!r}; expected .safetensors or {_PICKLES}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: refused, because it holds more than tensors or is damaged ({reason}). Nothing was executed. Ask "
            "its author for a safetensors file, or re-save only its state dict."
        ) from error
    except Exception as error:  # damaged archives and pickles fail in every possible way inside the reader
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: not a readable torch checkpoint ({reason}); download it again") from error
    return _flatten(loaded, path, left_out)


def read_checkpoints(paths, left_out=None):
    """Reads several files or folders as the shards of one checkpoint (see `read_checkpoint`).

    Raises:
        CheckpointError: as `read_checkpoint`, or two of them hold the same tensor.
    """
    tensors = {}
    for path in paths:
        part = read_checkpoint(path, left_out)
        if twice := set(part) & set(tensors):
            raise CheckpointError(f"{path}: holds tensors that another shard holds too: {shorten(twice)}")
        tensors.update(part)
    return tensors


def _flatten(loaded, path, left_out):
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            left_out += [str(name) for name in loaded if name != wrapper]
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    left_out += [str(name) for name in loaded if name not in tensors]
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    eight_bit = [name for name, value in tensors.items() if value.dtype in _EIGHT_BIT_FLOATS]
    if eight_bit:
        logger.warning("%s: tensors stored in 8 bits, cast to float32: %d", path, len(eight_bit))
        tensors |= {name: tensors[name].float() for name in eight_bit}
    return tensors


def _read_folder(path, left_out):
    indices = sorted(path.glob("*.index.json"))
    if not indices:
        files = sorted(path.glob("*.safetensors")) or sorted(p for p in path.iterdir() if p.suffix in _PICKLES)
        if not files:
            raise CheckpointError(f"{path}: no .safetensors or {'/'.join(_PICKLES)} file in this folder")
        return read_checkpoints(files, left_out)
    try:
        weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{indices[0]}: not a weight index ({error!r})") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{indices[0]}: names files outside its folder: {shorten(outside)}")
    tensors = read_checkpoints([path / name for name in names], left_out)
    if missing := set(weight_map) - set(tensors):
        raise CheckpointError(f"{path}: the shards lack tensors that {indices[0].name} lists: {shorten(missing)}")
    return tensors


def take_prefix(state_dict, prefix):
    """Removes the entries below `prefix` from `state_dict` and returns them without it."""
    return {name[len(prefix) :]: state_dict.pop(name) for name in [n for n in state_dict if n.startswith(prefix)]}


def check_state_dict(module, state_dict, what):
    """Raises CheckpointError listing the missing, unexpected, wrongly shaped and non-finite tensors of `state_dict`."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = []
    if missing := set(expected) - set(state_dict):
        problems.append(f"{len(missing)} missing: {shorten(missing)}")
    if unexpected := set(state_dict) - set(expected):
        problems.append(f"{len(unexpected)} unexpected: {shorten(unexpected)}")
    wrong = [
        f"{name} {tuple(state_dict[name].shape)} instead of {expected[name]}"
        for name in sorted(set(expected) & set(state_dict))
        if tuple(state_dict[name].shape) != expected[name]
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {'; '.join(wrong[:8])}")
    bad = [name for name, value in state_dict.items() if value.is_floating_point() and not is_finite(value)]
    if bad:
        problems.append(f"{len(bad)} with NaN or infinite values: {shorten(bad)}")
    if problems:
        raise CheckpointError(f"{what} does not fit its configuration. Tensors " + ". Tensors ".join(problems) + ".")


def is_finite(tensor):
    """Whether a floating-point tensor is free of NaN and infinite values; True on the meta device."""
    if tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # 8-bit floats have no reductions
        tensor = tensor.float()
    # The sum is NaN or infinite if any value is; float64 keeps large finite float32 values from overflowing.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def load_strict(module, state_dict, what):
    """Puts `state_dict` (our names) into `module`, which may be on the meta device, or raises a CheckpointError."""
    check_state_dict(module, state_dict, what)
    module.load_state_dict(state_dict, strict=True, assign=True)
    return module


def save_tensors(tensors, path):
    """Writes tensors to a safetensors file; tensors that share memory are written separately.

    Raises:
        CheckpointError: the file could not be written (disk full, no permission).
    """
    with _write_errors(path):
        save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, path)


def write_report(folder, **report):
    """Writes `conversion.json`: what was converted and what was left out, for people and for `cinetok convert`."""
    path = Path(folder) / REPORT_FILE
    path.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def _write_errors(path):
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error}); check the free space and permissions"
        ) from error
    except OSError as error:
        if error.errno not in _WRITE_ERRNOS:
            raise
        raise CheckpointError(
            f"{path}: could not be written ({error}); check the free space and permissions"
        ) from error


@contextlib.contextmanager
def atomic_folder(output):
    """Yields a temporary folder beside `output` that takes its place only if the block succeeds.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, or cannot be written (disk full, permissions).
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: already exists and is not empty; choose another output folder")
    with _write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            yield temporary
            if output.is_dir():
                output.rmdir()
            temporary.chmod(0o755)
            os.replace(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
