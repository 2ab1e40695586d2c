"""Test setup shared by all tests: the torchvision shim, offline switches, small thread counts, fixtures."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several test processes run side by side, and threads that wait for a busy core slow each other down many times over.
os.environ.setdefault("CINETOK_TEST_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", os.environ["CINETOK_TEST_THREADS"])

import torch
from torchvision_shim import install as _install_torchvision_shim

_install_torchvision_shim()

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(Path(__file__).resolve().parent))
torch.set_num_threads(max(1, int(os.environ["CINETOK_TEST_THREADS"])))


def pytest_collection_modifyitems(config, items):
    if not SHARED.is_dir():
        skip = pytest.mark.skip(
            reason="the reference material beside the repository is absent; the committed cases ran"
        )
        for item in items:
            if "shared" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
