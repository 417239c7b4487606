"""Where the repository and g++ lie, and how children find modules. Imports no torch, which takes seconds."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SHIM = TESTS / "cuda_shim"
CXX = shutil.which("g++")


def child_environment(**variables):
    """The environment of a child process that can import what this one can: fastopt, tables and helpers."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
