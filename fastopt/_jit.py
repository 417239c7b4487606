"""The cache of libraries compiled just in time: find one, or compile it once while other processes wait.

An entry belongs to one torch, one Python ABI, one compiler and one state of the sources. It is built in a folder of its
own and moved into place, under a file lock that the kernel frees when its holder dies, so a killed build leaves nothing
that matters. A library is trusted only if its checksum matches: one cut short would not fail to load but crash.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from . import _build
from ._build import BuildError

LIBRARY = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
USE_WRITABLE_CACHE = "free some space, or set FASTOPT_CACHE_DIR to a directory that can be written"
COMPILER_ERROR = re.compile(r"\berror: |\bundefined reference\b|\bNo space left|^FAILED: |ModuleNotFoundError")

_lock_files = set()  # open lock files; a forked child closes its copies


def cache_dir():
    """``$FASTOPT_CACHE_DIR``, else ``$XDG_CACHE_HOME/fastopt``, else ``~/.cache/fastopt``."""
    named = os.environ.get("FASTOPT_CACHE_DIR")
    folder = named or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastopt")
    return Path(os.path.abspath(os.path.expanduser(folder)))


def cached():
    """Path of the library that fits this process and is whole, or None.

    Raises:
        BuildError: there is no compiler, which names the entry as much as torch does.
    """
    library = _entry() / LIBRARY
    found = read_identity(library)
    return library if fits(found) and _sha256(library) == found.get("sha256") else None


def compile(verbose=False):
    """Path of the library, compiled by this process or by the one it waited for.

    Args:
        verbose: pass the compiler's output on to stderr.

    Raises:
        BuildError: the compiler, a build tool or the cache directory does not serve.
    """
    entry = _entry()
    try:
        entry.mkdir(parents=True, exist_ok=True)
        with _locked(entry / "lock"):
            return cached() or _compile_locked(entry, verbose)
    except OSError as error:
        raise BuildError(
            f"the cache {entry} cannot be written: {error.strerror or error}", USE_WRITABLE_CACHE
        ) from error


def read_identity(library):
    """What a library was built from and for; empty if nothing readable says so."""
    try:
        found = json.loads(library.with_name(_build.IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fits(found):
    """Whether a library of that identity may be loaded into this process."""
    return found.items() >= _build.identity().items()


def close_locks_after_fork():
    """Close a forked child's copies of the lock files, which would keep the locks of a parent that dies."""
    while _lock_files:
        _lock_files.pop().close()


def _entry():
    return cache_dir() / _build.cache_key(_build.find_compiler())


def _sha256(path):
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _compile_locked(entry, verbose):
    for left_by_killed in entry.glob("build-*"):
        shutil.rmtree(left_by_killed, ignore_errors=True)
    compiler, built_for = _build.find_compiler(), _build.identity()
    _say(f"compiling the kernels for torch {torch.__version__}, once, into {entry}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=entry, ignore_cleanup_errors=True) as work:
        _run_build(work, compiler, verbose)
        if _build.identity() != built_for:
            raise BuildError(f"{_build.csrc()} changed during the build", "try again")
        library, identity = Path(work, "lib", LIBRARY), Path(work, _build.IDENTITY)
        _build.write_identity(identity, built_for, compiler, sha256=_sha256(library))
        os.replace(library, entry / LIBRARY)
        os.replace(identity, entry / _build.IDENTITY)  # last, for it vouches for the library
    _say(f"compiled in {time.monotonic() - started:.0f} s")
    return entry / LIBRARY


def _run_build(work, compiler, verbose):
    """Run _build.py as a program in ``work``: its own process keeps the compiler's noise and memory out of ours."""
    if importlib.util.find_spec("setuptools") is None:
        raise BuildError("setuptools is missing", "pip install setuptools")
    env = {**os.environ, **_build.build_environment(compiler), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env.pop("LD_PRELOAD", None)  # a sanitizer's runtime is for the tests, not for the compiler
    log = []
    with _build.spawn([sys.executable, _build.__file__, work], env=env) as process:
        for line in process.stdout:
            log.append(line.rstrip())
            if verbose:
                print(line, end="", file=sys.stderr)
    if process.returncode != 0:
        raise _explain(log, compiler)


def _explain(log, compiler):
    """The failure of a build, from what it printed."""
    errors = [line for line in log if COMPILER_ERROR.search(line)] or log[-4:]
    excerpt = "\n    ".join([f"compiling failed with {compiler}:", *(line[:200] for line in errors[:6])])
    if any("No space left on device" in line for line in log):
        return BuildError(excerpt, USE_WRITABLE_CACHE)
    if any("Python.h" in line for line in log):
        return BuildError(excerpt, "install Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    return BuildError(excerpt, f"{_build.INSTALL_COMPILER}; fastopt.build(verbose=True) shows everything")


@contextlib.contextmanager
def _locked(path):
    """Hold the file lock at ``path``: one process compiles, the others wait."""
    import fcntl  # POSIX only, and no kernel of ours needs it

    with open(path, "w") as file:
        _lock_files.add(file)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say("waiting for another process that compiles the kernels")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            _lock_files.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # also of a copy that a fork left in a child


def _say(message):
    print(f"fastopt: {message}", file=sys.stderr, flush=True)
