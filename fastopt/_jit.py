"""The cache of libraries compiled just in time: find one, or compile it once while other processes wait.

An entry belongs to one state of the sources and all that a library of its kind depends on: for the extension one torch,
one Python ABI and one compiler, for the CUDA library one nvcc and some architectures. It is built in a folder of its
own and moved into place, under a file lock that the kernel frees when its holder dies, so a killed build does no
harm. A library is loaded only if its checksum matches: one cut short would not fail to load but crash.

The two targets are :class:`_build.CpuLibrary` and :class:`_build_cuda.CudaLibrary`.
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

from . import _build
from ._build import BuildError

_lock_files = set()  # open lock files; a forked child closes its copies


def cache_dir():
    """``$FASTOPT_CACHE_DIR``, else ``$XDG_CACHE_HOME/fastopt``, else ``~/.cache/fastopt``."""
    named = os.environ.get("FASTOPT_CACHE_DIR")
    folder = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastopt")
    return Path(os.path.abspath(os.path.expanduser(folder)))


def cached(target):
    """Path of the target's library if it is intact, or None."""
    library = _entry(target) / target.filename
    return library if is_intact(library, target.identity()) else None


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
        raise BuildError(
            f"the cache {entry} cannot be written: {error.strerror or error}", _build.USE_WRITABLE_CACHE
        ) from error


def read_identity(library):
    """The identity that a library was built with; empty if there is no readable one."""
    try:
        found = json.loads(_build.identity_file(library).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def matches(library, identity):
    """True if the library's identity file agrees with ``identity``."""
    return read_identity(library).items() >= identity.items()


def is_intact(library, identity):
    """True if the library matches ``identity`` and has the checksum that its identity file records."""
    checksum = read_identity(library).get("sha256")
    return matches(library, identity) and checksum is not None and _build.sha256(library) == checksum


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
    built_for = target.identity()
    _report(f"compiling {target}, once, into {entry}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=entry, ignore_cleanup_errors=True) as work:
        library = target.compile(Path(work), verbose)
        if target.identity() != built_for:
            raise BuildError(f"{_build.csrc()} changed during the build", "try again")
        _build.write_identity(library, built_for, **target.details(), sha256=_build.sha256(library))
        os.replace(library, entry / library.name)
        identity = _build.identity_file(library)
        os.replace(identity, entry / identity.name)  # last, for it vouches for the library
    _report(f"compiled in {time.monotonic() - started:.0f} s")
    return entry / target.filename


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
