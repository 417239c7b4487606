"""The self-test of the shim: its library, processes that load it, and the numbers that its functions take."""

import ctypes
import subprocess
import sys

from paths import CXX, SHIM, child_environment

SOURCES = [SHIM / "self_test.cu", SHIM / "misuse.cu"]  # several, as the kernels of a library are
SEEDS = range(20)
IN_ORDER = -1
TIMEOUT_S = 300

SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9


def compile_library(folder, *flags):
    library = folder / "self_test.so"
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{SHIM}", *flags]
    subprocess.run([CXX, *options, "-x", "c++", *map(str, SOURCES), "-o", str(library)], check=True, timeout=TIMEOUT_S)
    return library


def load(path):
    library = ctypes.CDLL(str(path))
    library.fastopt_shim_seed.argtypes = [ctypes.c_longlong]
    library.error_name.restype = ctypes.c_char_p
    return library


# Code that a separate process runs after loading the library.
PRELUDE = """
import os
import threading
from shim_self_test import *
library = load(sys.argv[1])
"""


def run_apart(path, code, **environment):
    command = [sys.executable, "-c", PRELUDE + code, str(path)]
    return subprocess.run(
        command, env=child_environment(**environment), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run_sanitized(path, code):
    # Python is not sanitized, so the runtime comes first; libstdc++ with it, for it wraps its exceptions.
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip() for name in names]
    return run_apart(path, code, LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0")


def ints(*values):
    return (ctypes.c_int * len(values))(*values)


def unsigneds(*values):
    return (ctypes.c_uint * len(values))(*values)


def sums_are_right(library, kind=0, rows=3, n=1000, blocks=2, threads=256):
    """True if the sums of rows of small whole numbers, which add without error, are correct."""
    values = [(7 * i + i // n) % 13 for i in range(rows * n)]
    out = (ctypes.c_float * rows)()
    assert library.sum_rows(kind, (ctypes.c_float * len(values))(*values), out, rows, n, blocks, threads) == SUCCESS
    return list(out) == [sum(values[row * n : (row + 1) * n]) for row in range(rows)]


KIB = 1024
STATIC = 512  # bytes of static shared memory, with which the shim counts for each kernel
DEFAULT_LIMIT, MAX_LIMIT = 48 * KIB - STATIC, 227 * KIB - STATIC  # of dynamic shared memory
