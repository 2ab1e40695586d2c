"""Checks manifests of released checkpoints: `python tests/run_manifests.py DIR`.

For every manifest (a JSON file with `tensors`: name -> shape) the models it fills are built on the meta device at the
released configuration; names and shapes must map one to one both ways, and every tensor of the manifest must belong to
a part or be declared as left out with a reason. Manifests of networks of a later issue are listed. Exit code 1 if
anything failed or nothing was found.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from torchvision_shim import install as _install_torchvision_shim

_install_torchvision_shim()

import torch

from cinetok.conversion import DEFERRED_MANIFESTS, manifest_parts


def check_manifest(path):
    """Returns (problems, summary) of one manifest file; the system is the name of the folder it lies in."""
    manifest = json.loads(Path(path).read_text())
    tensors = {name: torch.empty(entry["shape"], device="meta") for name, entry in manifest["tensors"].items()}
    problems, assigned, loaded = [], {}, 0
    for part in manifest_parts(path.parent.name, path.stem, manifest):
        for name in part.tensors:
            if name in assigned:
                problems.append(f"{name}: belongs to both {assigned[name]} and {part.name}")
            assigned[name] = part.name
        if part.left_out:
            continue
        subset = {name: tensors[name] for name in part.tensors}
        ours = part.mapping.to_hf(dict(subset))
        expected = {name: tuple(value.shape) for name, value in part.module.state_dict().items()}
        for name in sorted(set(expected) - set(ours)):
            problems.append(f"{part.name}: {name} is not filled by the checkpoint")
        for name in sorted(set(ours) - set(expected)):
            problems.append(f"{part.name}: the checkpoint's {name} has no place in the model")
        for name in set(ours) & set(expected):
            if tuple(ours[name].shape) != expected[name]:
                problems.append(f"{part.name}: {name} is {tuple(ours[name].shape)}, the model has {expected[name]}")
        loaded += len(ours)
        back = part.mapping.from_hf(dict(ours))
        if {k: tuple(v.shape) for k, v in back.items()} != {k: tuple(v.shape) for k, v in subset.items()}:
            differing = {k: tuple(v.shape) for k, v in back.items()}.items() ^ {
                k: tuple(v.shape) for k, v in subset.items()
            }.items()
            problems.append(f"{part.name}: mapping back gives other names or shapes: {sorted(differing)[:6]}")
    for name in sorted(set(tensors) - set(assigned)):
        problems.append(f"{name}: no part of the system takes it")
    return problems, f"{len(tensors)} tensors, {loaded} loaded"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="DIR")
    arguments = parser.parse_args(argv)
    paths = sorted({p for folder in arguments.folders for p in Path(folder).rglob("*.json")})
    failed = 0
    for path in paths:
        later = DEFERRED_MANIFESTS.get((path.parent.name, path.stem))
        if later:
            print(f"LATER   {path}  {later}")
            continue
        start = time.perf_counter()
        try:
            problems, summary = check_manifest(path)
        except Exception as error:
            traceback.print_exc()
            problems, summary = [f"{type(error).__name__}: {error}"], ""
        failed += bool(problems)
        print(f"{'FAIL' if problems else 'PASS'}    {path}  {summary} {time.perf_counter() - start:.1f}s")
        for problem in problems[:20]:
            print(f"    {problem}")
        if len(problems) > 20:
            print(f"    ... and {len(problems) - 20} more")
    print(f"{len(paths) - failed} passed or listed, {failed} failed of {len(paths)} manifests")
    return 0 if paths and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
