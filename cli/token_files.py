"""Files of tokens of the systems besides VidTok (whose `VidTokTokens` has a format of its own)."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from ..errors import TokenFileError

FORMAT = "cinetok-tokens"
VIDTOK_FORMAT = "cinetok-vidtok-tokens"
_VERSION = "1"


def fingerprint(*modules):
    """Short hash of a sample of the weights: tells whether tokens fit these models."""
    import torch

    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)].to("cpu", torch.float32)
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.half().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(path, tensors, **facts):
    """Writes tensors with `facts` in the header; the file appears only when it is complete."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    header = {"format": FORMAT, "format_version": _VERSION, "facts": json.dumps(facts)}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.absolute().parent)
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: writing failed ({error})") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read_header(path):
    """(format, facts, {name: (dtype, shape)}) of a file of tokens of any system.

    Raises:
        TokenFileError: no such file, damaged, or not a file of tokens.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise TokenFileError(f"{path}: no such file of tokens")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {}
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                tensors[name] = (view.get_dtype(), list(view.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise TokenFileError(f"{path}: not a readable safetensors file ({error})") from error
    if header.get("format") not in (FORMAT, VIDTOK_FORMAT):
        raise TokenFileError(f"{path}: not a file of tokens; make one with `cinetok tokenize`")
    if header.get("format_version") != _VERSION:
        raise TokenFileError(f"{path}: format version {header.get('format_version')} is not known to this release")
    try:
        facts = json.loads(header["facts"])
    except (KeyError, ValueError) as error:
        raise TokenFileError(f"{path}: incomplete ({error!r}); tokenize the video again") from error
    if header["format"] == VIDTOK_FORMAT:
        facts["system"] = "vidtok"
    return header["format"], facts, tensors


def load(path, system, current, wanted):
    """(tensors, facts) of a file of `system`, made by the model with the fingerprint `current`.

    Raises:
        TokenFileError: as `read_header`; tokens of another system or model; a tensor of `wanted` is missing.
    """
    from safetensors.torch import load_file

    _, facts, tensors = read_header(path)
    if facts.get("system") != system:
        raise TokenFileError(f"{path}: tokens of {facts.get('system')}, the model is one of {system}")
    if facts.get("fingerprint") != current:
        raise TokenFileError(
            f"{path}: made by another model (fingerprint {facts.get('fingerprint')}, this model's is {current}); "
            "decode it with the model that made it"
        )
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise TokenFileError(f"{path}: lacks {', '.join(missing)}; tokenize the video again")
    return load_file(path), facts
