"""Reads the original repositories' own configuration files (.yaml or .json)."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..errors import CheckpointError


def read_original_config(source):
    """Returns the configuration as a dict; `source` is a path or an already parsed mapping.

    Raises:
        CheckpointError: the file is missing or is not valid yaml/json with a mapping at its top.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such configuration file")
    try:
        text = path.read_text(encoding="utf-8")
        parsed = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not a valid {path.suffix.lstrip('.')} file ({error})") from error
    if not isinstance(parsed, Mapping):
        raise CheckpointError(f"{path}: expected a mapping at the top, found {type(parsed).__name__}")
    return dict(parsed)
