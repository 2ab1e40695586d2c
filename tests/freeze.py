"""Records the public surface that tests hold still: `python tests/freeze.py` writes `tests/frozen/*.json`.

Run it only for a wanted change, and look at the difference before committing: a name that changed breaks checkpoints
(`state_dict_keys.json`) or programs (`exports.json`) that exist.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

FOLDER = Path(__file__).resolve().parent / "frozen"


def state_dict_keys(module):
    """A digest of the names in a state dict."""
    names = sorted(module.state_dict())
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"count": len(names), "sha256": digest, "first": names[0], "last": names[-1]}


def exports():
    """The public names and, for callables, nothing more: signatures may grow."""
    import cinetok

    return sorted(cinetok.__all__)


def main():
    import torch
    from torchvision_shim import install

    install()
    from model_cases import model_cases

    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    tables = {"state_dict_keys": {case.name: state_dict_keys(case.build()) for case in model_cases()}}
    tables["exports"] = exports()
    for name, table in tables.items():
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
        print(f"{path}: {len(table)} entries")


if __name__ == "__main__":
    main()
