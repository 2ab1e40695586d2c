"""Reading original checkpoints safely, loading them strictly, and writing results atomically."""

import contextlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from .mapping import _shorten

_PICKLES = (".ckpt", ".bin", ".pt", ".pth")


def read_checkpoint(path):
    """Reads every tensor of a checkpoint into one flat dictionary on the CPU.

    Args:
        path: a .ckpt/.bin/.pt/.pth file (read with the weights-only unpickler), a .safetensors file, or a folder with
            an index (`*.index.json`) or with shards of either kind.

    Returns:
        dict of name -> tensor. `{"state_dict": {...}}` and `{"module": {...}}` wrappers are unwrapped and a uniform
        leading "module." is stripped.

    Raises:
        CheckpointError: the file is missing, truncated, holds code instead of tensors, or no tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file or folder")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}); download it again") from error
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
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable torch checkpoint ({error}); download it again") from error
    return _flatten(loaded, path)


def _flatten(loaded, path):
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _read_folder(path):
    indices = sorted(path.glob("*.index.json"))
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{indices[0]}: not a weight index ({error!r})") from error
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors")) or sorted(p for p in path.iterdir() if p.suffix in _PICKLES)
    if not files:
        raise CheckpointError(f"{path}: no .safetensors or {'/'.join(_PICKLES)} file in this folder")
    tensors = {}
    for file in files:
        part = read_checkpoint(file)
        twice = set(part) & set(tensors)
        if twice:
            raise CheckpointError(f"{file}: holds tensors that another shard holds too: {_shorten(twice)}")
        tensors.update(part)
    return tensors


def take_prefix(state_dict, prefix):
    """Removes the entries below `prefix` from `state_dict` and returns them without it."""
    return {name[len(prefix) :]: state_dict.pop(name) for name in [n for n in state_dict if n.startswith(prefix)]}


def check_state_dict(module, state_dict, what):
    """Raises CheckpointError listing every missing, unexpected and wrongly shaped tensor of `state_dict` (our names)."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = []
    if missing := set(expected) - set(state_dict):
        problems.append(f"{len(missing)} missing: {_shorten(missing)}")
    if unexpected := set(state_dict) - set(expected):
        problems.append(f"{len(unexpected)} unexpected: {_shorten(unexpected)}")
    wrong = [
        f"{name} {tuple(state_dict[name].shape)} instead of {expected[name]}"
        for name in sorted(set(expected) & set(state_dict))
        if tuple(state_dict[name].shape) != expected[name]
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {'; '.join(wrong[:8])}")
    bad = [name for name, value in state_dict.items() if value.is_floating_point() and not _finite(value)]
    if bad:
        problems.append(f"{len(bad)} with NaN or infinite values: {_shorten(bad)}")
    if problems:
        raise CheckpointError(f"{what} does not fit its configuration. Tensors " + ". Tensors ".join(problems) + ".")


def _finite(tensor):
    # The sum is NaN or infinite if any value is; float64 keeps large finite float32 values from overflowing.
    return tensor.is_meta or bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def load_strict(module, state_dict, what):
    """Puts `state_dict` (our names) into `module`, which may be on the meta device; anything off is a CheckpointError."""
    check_state_dict(module, state_dict, what)
    module.load_state_dict(state_dict, strict=True, assign=True)
    return module


@contextlib.contextmanager
def atomic_folder(output):
    """Yields a temporary folder beside `output` that takes its place only if the block succeeds.

    Raises:
        CheckpointError: `output` exists and is neither empty nor a folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: already exists and is not empty; choose another output folder")
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
