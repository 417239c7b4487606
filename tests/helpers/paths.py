"""Where the repository lies, and how children find its modules. Without torch, which takes seconds to import."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


def child_environment(**variables):
    """The environment of a child process that can import what this one can: fastopt, tables and helpers."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
