"""Runs the ```python blocks of a model card as a user would: in a process of their own, in a prepared folder."""

import os
import re
import subprocess
import sys


def python_blocks(text):
    """The ```python blocks of a markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run_card(text, folder, timeout=300):
    """Runs all blocks of a card one after another in `folder`; fails with their output if they fail."""
    blocks = python_blocks(text)
    assert blocks, "the card has no python block"
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
