"""Runs code in a process of its own, as a user's script; it can import the modules beside this one."""

import subprocess
import sys
import textwrap
from pathlib import Path

# The first line is for the torchvision of machines without the package's compiled operators.
PRELUDE = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent)!r}); "
    "import torchvision_shim; torchvision_shim.install()\n"
)


def run_python(code, *arguments, timeout=300):
    """Runs `code` with `sys.argv[1:] == arguments` and returns the last line it printed; fails with its errors."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().rpartition("\n")[2]
