"""Reads the original repositories' own configuration files (.yaml or .json)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..errors import CheckpointError

_REFERENCE = re.compile(r"\$\{\s*([\w.\-]+)\s*\}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: the original files write 1e-5, which YAML 1.1 (and so PyYAML) takes for a string."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def read_original_config(source):
    """Returns the configuration as a dict; `source` is a path or an already parsed mapping.

    `${a.b.c}` stands for the value at that path, as in OmegaConf. References to what the file does not hold
    (environment variables, resolvers) stay as they are.

    Raises:
        CheckpointError: the file is missing, is not valid yaml/json with a mapping at its top, or refers to itself.
    """
    if isinstance(source, Mapping):
        return _resolve(dict(source), source, ())
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such configuration file")
    try:
        text = path.read_text(encoding="utf-8")
        parsed = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)  # a SafeLoader
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not a valid {path.suffix.lstrip('.')} file ({error})") from error
    if not isinstance(parsed, Mapping):
        raise CheckpointError(f"{path}: expected a mapping at the top, found {type(parsed).__name__}")
    return _resolve(dict(parsed), parsed, ())


def _resolve(value, root, pending):
    if isinstance(value, Mapping):
        return {key: _resolve(item, root, pending) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, pending) for item in value]
    if not isinstance(value, str):
        return value
    if whole := _REFERENCE.fullmatch(value):
        return _follow(whole, root, pending)
    return _REFERENCE.sub(lambda match: str(_follow(match, root, pending)), value)


def _follow(match, root, pending):
    path = match.group(1)
    if path in pending:
        raise CheckpointError(f"the configuration refers to itself: {' -> '.join((*pending, path))}")
    target = root
    for part in path.split("."):
        if isinstance(target, Mapping) and part in target:
            target = target[part]
        elif isinstance(target, list) and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        else:
            return match.group()
    return _resolve(target, root, (*pending, path))
