"""The cache of libraries compiled just in time: find one, or compile it once while other processes wait.

An entry belongs to one state of the sources and of all else that the library depends on: for the extension one torch,
one Python ABI and one compiler, for the CUDA library one nvcc and some architectures. It is built in a folder of its
own and moved into place, under a file lock that the kernel frees when its holder dies, so a killed build does no harm.
A library is loaded only if its checksum matches: one cut short would not fail to load but crash.

The targets are :class:`recipe.CpuLibrary` and :class:`cuda.CudaLibrary`.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from . import identity
from .commands import USE_WRITABLE_CACHE, BuildError
from .environment import cache_dir

_lock_files = set()  # open lock files; a forked child closes its copies


def cached(target):
    """Path of the target's library if it is intact, or None."""
    library = _entry(target) / target.filename
    return library if identity.is_intact(library, target.identity()) else None


def compile(target, verbose=False):
    """Path of the library, compiled by this process or by the one it waited for.

    Args:
        target: the library to compile.
        verbose: pass the compiler's output on to stderr.

    Raises:
        BuildError: the compiler, a build tool or the cache directory cannot be used.
    """
    entry = _entry(target)
    try:
        entry.mkdir(parents=True, exist_ok=True)
        with _locked(entry / "lock"):
            return cached(target) or _compile_locked(entry, target, verbose)
    except OSError as error:
        raise BuildError(f"the cache {entry} cannot be written: {error.strerror or error}", USE_WRITABLE_CACHE) from error


def file_locks():
    """The module ``fcntl``, which only POSIX systems have.

    Raises:
        BuildError: this system does not.
    """
    try:
        import fcntl
    except ImportError:
        raise BuildError(
            f"no kernels are compiled on {platform.system()}, for want of POSIX file locks",
            "Linux and macOS have them; here plain torch serves",
        ) from None
    return fcntl


def close_locks_after_fork():
    """Close a forked child's copies of the lock files, which would keep the locks of a parent that dies."""
    while _lock_files:
        _lock_files.pop().close()


def _entry(target):
    text = json.dumps([target.identity(), target.variant()])
    return cache_dir() / hashlib.sha256(text.encode()).hexdigest()[:24]


def _compile_locked(entry, target, verbose):
    for left_by_killed in entry.glob("build-*"):
        shutil.rmtree(left_by_killed, ignore_errors=True)
    _report(f"compiling {target}, once, into {entry}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=entry, ignore_cleanup_errors=True) as work:
        library = identity.compile_with_identity(target, Path(work), verbose)
        for file in (library, identity.file_of(library)):  # the identity last, for it vouches for the library
            os.replace(file, entry / file.name)
    _report(f"compiled in {time.monotonic() - started:.0f} s")
    return entry / target.filename


@contextlib.contextmanager
def _locked(path):
    """Hold the file lock at ``path``: one process compiles, the others wait."""
    fcntl = file_locks()
    with open(path, "w") as file:
        _lock_files.add(file)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _report("waiting for another process that compiles the kernels")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            _lock_files.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # also of a copy that a fork left in a child


def _report(message):
    print(f"fastopt: {message}", file=sys.stderr, flush=True)
