"""What the measuring scripts share. Importing it lets them, and their children, import this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment, in which a child finds the package too, and `more` on top."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def lowmem_command(*arguments: str) -> list[str]:
    """The command line `lowmem ARGUMENTS`, with the Python that runs this script."""
    return [sys.executable, "-m", "lowmem", *arguments]
